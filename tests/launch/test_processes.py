"""`alignkit train --processes 2`: first with stand-ins for the processes, then a run that is killed and stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit import launch
from alignkit.core.errors import RunFailed
from alignkit.loop.checkpoint import find_fault
from tests.launch.conftest import SAVE, Job, until

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("launch")]

AFTER_OTHER = "until [ -e there ] || (( SECONDS > 60 )); do sleep 0.05; done"
"""Shell: wait for the other process, however late a busy machine starts it."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Have every process run a shell script instead of alignkit."""

    def use(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(launch.sys, "executable", str(path))

    monkeypatch.delenv("OMP_NUM_THREADS")
    return use


def test_each_process_is_told_its_place(stand_in, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    names = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "ALIGNKIT_LAUNCHED",
        "OMP_NUM_THREADS",
    )
    stand_in(f'echo "$@" {" ".join(f"${name}" for name in names)} > said-$RANK')
    assert launch.run_processes(["train", "recipe.yaml"], 2) == 0
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert said == [f"-m alignkit train recipe.yaml {rank} {rank} 2 2 127.0.0.1 1 4\n" for rank in (0, 1)]


def test_the_exit_code_is_that_of_the_first_to_fail(stand_in) -> None:
    stand_in(f"if [ $RANK = 0 ]; then {AFTER_OTHER}; sleep 0.5; exit 1; fi; touch there; exit 3")
    assert launch.run_processes(["train"], 2) == 3


def test_nobody_waits_where_nothing_was_begun(stand_in) -> None:
    stand_in("if [ $RANK = 0 ]; then exit 2; fi; exec sleep 20")
    began = time.monotonic()
    assert launch.run_processes(["train"], 2) == 2
    assert time.monotonic() - began < 10


def test_a_process_that_waits_for_a_lost_one_is_killed(stand_in, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.3)
    stand_in(
        f"trap '' TERM; if [ $RANK = 0 ]; then sleep 60 & echo $! > child; touch there; wait; fi; {AFTER_OTHER}; exit 3"
    )
    began = time.monotonic()
    assert launch.run_processes(["train"], 2) == 3
    assert time.monotonic() - began < 10
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    until(lambda: not child.exists() or ") Z " in child.read_text(), "the end of what the process started", 10)


def test_a_killed_process_is_named(stand_in) -> None:
    stand_in(f"if [ $RANK = 1 ]; then touch there; kill -9 $$; fi; {AFTER_OTHER}; sleep 0.2; exit 1")
    with pytest.raises(RunFailed, match="process 1 of 2 was ended by SIGKILL"):
        launch.run_processes(["train"], 2)


@pytest.fixture
def disposed() -> Iterator[Callable[[signal.Signals, Any], None]]:
    """Set what this process does on a signal. A job that a script started in the background ignores SIGINT."""
    before: dict[signal.Signals, Any] = {}

    def dispose(number: signal.Signals, handler: Any) -> None:
        before[number] = signal.signal(number, handler)

    yield dispose
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_process_once(stand_in, disposed, tmp_path: Path, number, handler) -> None:
    """Also one that was ignored when the command was started, as a run of one process hears it."""
    name = number.name.removeprefix("SIG")
    stand_in(
        f"trap 'echo {name} >> said-$RANK' {name}; touch ready-$RANK; "
        "until [ -e said-$RANK ] || (( SECONDS > 60 )); do sleep 0.1; done; sleep 0.5; exit 130"
    )
    disposed(number, handler)

    def interrupt() -> None:
        until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "two processes", 20)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch.run_processes(["train"], 2) == 130
    thread.join()
    assert [(tmp_path / f"said-{rank}").read_text().split() for rank in (0, 1)] == [[name], [name]]
    assert signal.getsignal(number) is handler


def test_nohup_counts_for_every_process(stand_in, disposed, tmp_path: Path) -> None:
    """SIGHUP is the one that stays ignored, here and in the processes."""
    stand_in(f"touch ready-$RANK; {AFTER_OTHER}; kill -HUP $$; exit 0")
    disposed(signal.SIGHUP, signal.SIG_IGN)

    def hang_up() -> None:
        until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "two processes", 20)
        os.kill(os.getpid(), signal.SIGHUP)
        (tmp_path / "there").touch()

    thread = threading.Thread(target=hang_up)
    thread.start()
    assert launch.run_processes(["train"], 2) == 0
    thread.join()


def test_a_process_that_a_forwarded_signal_ends_was_stopped(stand_in, tmp_path: Path) -> None:
    """It had no handler yet: a shell would say 143 as well."""
    stand_in("touch ready-$RANK; exec sleep 20")

    def interrupt() -> None:
        until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "two processes", 20)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch.run_processes(["train"], 2) == 128 + signal.SIGTERM
    thread.join()


def test_a_bad_recipe_starts_nothing(job: Job) -> None:
    command = [sys.executable, "-m", "alignkit", "train", job.recipe, "train.bacth_size=2", "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1


def rank(process: subprocess.Popen[bytes], number: int) -> int:
    """The process of this rank, a child of the one that started them."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(
        int(pid)
        for pid in children
        if f"RANK={number}".encode() in Path("/proc", pid, "environ").read_bytes().split(b"\0")
    )


def test_a_run_that_is_stopped_goes_on_with_as_many_and_dies_with_any(job: Job) -> None:
    run, said = job["broken"], job["broken.log"]
    process = job.start("train", job.recipe, f"output_dir={run}", "--processes", 2, said=said)
    until(lambda: job.reached("broken"), "the first checkpoint")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    newest = max(run.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    assert find_fault(newest) is None
    step = int(newest.name.removeprefix("checkpoint-"))
    assert said.read_text().count(f"error: stopped by SIGTERM after step {step}; continue with") == 1

    process = job.start("resume", run, said=said)
    until(lambda: job.reached("broken", SAVE * (step // SAVE + 1)), "the next checkpoint")
    os.kill(rank(process, 1), signal.SIGKILL)
    assert process.wait(60) == 1
    text = said.read_text()
    assert f"continuing from {newest}" in text
    assert "on 2 processes" in text
    assert "error: process 1 of 2 was ended by SIGKILL" in text
    assert "error: another process of this run is gone, or cannot be reached: " in text
    assert "Traceback" not in text
