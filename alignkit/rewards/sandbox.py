"""The process in which a program that a model wrote runs once. Started by `programs.py` as a file of its own.

It takes away what the operating system lets it take (processor time, memory, size of files, network) and, by an audit
hook, sockets, further processes and writing outside its folder. That stops accidents and ordinary tricks; it is no wall
against an attacker. The job lies in the current folder, and so does the result.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
"""Flags of Linux's unshare: a network of its own has no way out, and takes a user of its own where one is not root."""
REFUSED = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.kill",
    "ctypes.",
)
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the program of the job, then its check, and write down what came of it."""
    path, result = Path.cwd() / "job.json", Path.cwd() / "result"  # a program may go elsewhere
    job = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    limit(job["seconds"], job["memory"], job["output"])
    sys.addaudithook(guard(os.getcwd()))
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(job["program"], "program", "exec"), space)
    value: Any = None
    if "assert" in job:
        exec(compile(job["assert"], "test", "exec"), space)
    elif "entry_point" in job:
        value = space[job["entry_point"]](*job["positional"], **job["named"])
    # the program cannot know this word beforehand: leaving early, or printing, does not pass for a result
    result.write_text(f"{job['word']}\n{json.dumps(value)}", encoding="utf-8")


def limit(seconds: int, memory: int, output: int) -> None:
    """Seconds of processor time, bytes of memory and of any file, no network; as far as this system knows how."""
    import resource  # not at the top: a platform without it can still list the rewards there are

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output, output))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)  # may be forbidden; the audit hook stands behind it
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def guard(folder: str) -> Any:
    """An audit hook that refuses sockets, processes, and changes of files outside `folder`."""
    root = os.path.realpath(folder)

    def outside(path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False  # a file that is open already
        return os.path.commonpath([root, os.path.realpath(os.fsdecode(path))]) != root

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING and outside(arguments[0]):
            raise PermissionError(f"writing {arguments[0]!r} is not allowed here")
        if event in CHANGES and any(outside(path) for path in arguments[:2]):
            raise PermissionError(f"{event} is not allowed outside the folder")

    return hook


if __name__ == "__main__":
    main()
