"""`alignkit train` on several devices of one machine, where no launcher did it: one process each.

The process that starts them only waits: it holds no device and forwards every signal once. Torch's own launcher gives
workers 30 seconds to end and turns their exit codes into 1; a checkpoint may take longer, and scripts read the codes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from alignkit.core.errors import EnvironmentProblem, RecipeError, RunFailed
from alignkit.dist.launcher import adopt_launcher, launched_size
from alignkit.recipe import Recipe

GRACE = 30.0
"""Seconds that the others have to end after the first process failed; one may wait for its lost peer forever."""
LOOK = 0.05
"""Seconds between two looks at the processes."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def processes_to_start(recipe: Recipe, asked: int | None, *, resume: bool = False) -> int:
    """How many processes this command must start; 1 = none, since this one is the run or a part of it.

    Args:
        recipe: its `dist.world_size` counts where nothing was asked for, then the size of the run that is resumed, then
            the number of CUDA devices.
        asked: `--processes`.
        resume: a run in `output_dir` is continued.

    Raises:
        RecipeError: the number asked for is not that of the recipe, or of the launcher.
        EnvironmentProblem: there are fewer devices than processes.
    """
    launcher, wanted = adopt_launcher(), recipe.dist.world_size
    if launcher != "python":
        if asked not in (None, launched_size()):
            raise RecipeError(f"--processes {asked}, but {launcher} started {launched_size()}; leave the option out")
        return 1
    if asked is not None and wanted not in (None, asked):
        raise RecipeError(f"--processes {asked}, but dist.world_size is {wanted}; change one of them")
    count = asked or wanted or (_size_before(Path(recipe.output_dir)) if resume else None)
    if count == 1:
        return 1
    import torch

    devices = torch.cuda.device_count()
    if count is not None and 0 < devices < count:
        raise EnvironmentProblem(
            f"{count} processes are asked for and this machine has {devices} device(s), one of which each needs. Lower "
            "--processes or dist.world_size, or launch on several machines: docs/cluster.md"
        )
    return count or max(devices, 1)


def run_processes(arguments: Sequence[str], count: int) -> int:
    """`alignkit <arguments>` as `count` processes of one group; the exit code of the first that failed, else 0.

    Raises:
        RunFailed: a signal that was not sent to the run ended a process.
    """
    environment = {
        **os.environ,
        "ALIGNKIT_LAUNCHED": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    processes: list[subprocess.Popen[bytes]] = []
    sent: set[int] = set()

    def forward(number: int, frame: FrameType | None) -> None:
        sent.add(number)
        for process in processes:
            process.send_signal(number)

    # SIGHUP stays ignored under nohup. SIGINT does not where a script started us in the background: the loop hears it.
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in FORWARDED if not (nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        for rank in range(count):
            ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "alignkit", *arguments]
            # A session each: a terminal's Ctrl-C would reach them a second time, beside the one that is forwarded.
            processes.append(subprocess.Popen(command, env=ranked, start_new_session=True))
        return _verdict(_wait(processes), count, sent)
    finally:
        for process in processes:
            _end(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Rank → exit code, in the order in which they ended; without those that did not in time after one failed."""
    codes: dict[int, int] = {}
    patience = float("inf")
    while len(codes) < len(processes) and time.monotonic() < patience:
        for rank, process in enumerate(processes):
            code = process.poll()
            if code is not None and rank not in codes:
                codes[rank] = code
                if code:
                    grace = 0.0 if code == RecipeError.exit_code else GRACE  # nothing was begun that could be lost
                    patience = min(patience, time.monotonic() + grace)
        time.sleep(LOOK)
    return codes


def _verdict(codes: dict[int, int], count: int, sent: set[int]) -> int:
    """What the run ends with. A process that a signal ended is the cause of what the others say."""
    for rank, code in codes.items():
        if code < 0 and -code in sent:
            return 128 - code
        if code < 0:
            raise RunFailed(
                f"process {rank} of {count} was ended by {signal.Signals(-code).name}, as where memory is short. "
                "Continue from the newest checkpoint with `alignkit resume`."
            )
    return next((code for code in codes.values() if code), 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of those it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _size_before(folder: Path) -> int | None:
    """Processes of the run in this folder; None where there is none."""
    lock = folder / "run.lock"
    size: int | None = json.loads(lock.read_text(encoding="utf-8"))["world_size"] if lock.is_file() else None
    return size


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
