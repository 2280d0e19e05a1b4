"""The command line in processes of their own, with a fault planted on request.

Importing torch takes longer than a tiny run. So a fork server imports once, and each call forks it: the child is an
ordinary process, with its own pid, signals and exit code, that calls what `python -m alignkit` calls.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

Plant = tuple[Callable[..., None], Any]
"""A function of `plants` and its argument."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["alignkit.run", "datasets", "peft", "tests.faults.plants"])


@dataclass
class Command:
    """A running `alignkit`."""

    process: ForkServerProcess
    said: Path

    @property
    def output(self) -> str:
        """Everything it has printed so far."""
        return self.said.read_text(encoding="utf-8") if self.said.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        """The exit code; minus the signal's number when a signal ended it."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}")
        return code


def start(arguments: Sequence[object], said: Path, plant: Plant | None = None) -> Command:
    """Begin `alignkit <arguments>`; its output goes to the file `said`."""
    said.unlink(missing_ok=True)
    process = _context.Process(target=_child, args=([str(a) for a in arguments], said, dict(os.environ), plant))
    process.start()
    return Command(process, said)


def alignkit(*arguments: object, said: Path, plant: Plant | None = None) -> tuple[int, str]:
    """Exit code and output of `alignkit <arguments>`."""
    command = start(arguments, said, plant)
    return command.wait(), command.output


def _child(arguments: list[str], said: Path, environment: dict[str, str], plant: Plant | None) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 — lives as long as the process
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = ["alignkit", *arguments]
    if plant is not None:
        fault, argument = plant
        fault(argument)
    from alignkit import run
    from alignkit.cli import main

    run.write_report = lambda folders: None  # drawing takes longer than the run, and is tested elsewhere
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
