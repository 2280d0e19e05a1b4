"""The parent: two processes, one workload, steps in turn."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from bench.gate import Lap
from bench.job import Job
from bench.workloads import Workload, in_training_order, make_rows, write_model, write_rows

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("alignkit", "trl")
SHOWN_LOG = 4000
"""Characters of a side's output that are shown when it ends without a word."""


class BenchFailed(Exception):
    """A side broke, hung, or did other work than the other."""


@dataclass(frozen=True)
class Settings:
    """What the command line chooses. `batch_size` None is the workload's own."""

    steps: int = 8
    warmup: int = 2
    batch_size: int | None = None
    setup_pairs: int = 64
    layout: str = "auto"
    stock: bool = False
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    timeout: float = 1800.0


@dataclass(frozen=True)
class Track:
    """One side's race: its set-up, its steps, warm-up included, and its evidence."""

    setup: Lap
    steps: list[Lap]
    base: int
    losses: list[float]
    grad_norms: list[float]
    tokens: list[int]
    digests: list[str]
    lengths: list[list[int]]
    facts: dict[str, Any]


class Runner:
    """A process that races one side. `log` takes what it prints; a silence longer than `timeout` seconds ends it."""

    def __init__(
        self, name: str, command: Sequence[str], environment: dict[str, str], log: Path, timeout: float
    ) -> None:
        self.name, self._log, self._timeout = name, log, timeout
        self._connection, theirs = Pipe()
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )

    def send(self, message: object) -> None:
        """One message to the side. Raises BenchFailed when it is gone."""
        try:
            self._connection.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self, kind: str) -> Any:
        """The value of the side's next message. Raises BenchFailed with the side's own account of what went wrong."""
        try:
            if not self._connection.poll(self._timeout):
                raise BenchFailed(f"{self.name} was silent for {self._timeout:g} s; its output:\n{self._tail()}")
            found, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if found == "failed":
            raise BenchFailed(f"{self.name} failed:\n{value}")
        if found != kind:
            raise BenchFailed(f"{self.name} sent {found!r} where {kind!r} was due")
        return value

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _ended(self) -> BenchFailed:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return BenchFailed(f"{self.name} closed its channel; its output:\n{self._tail()}")
        return BenchFailed(f"{self.name} ended with exit code {code}; its output:\n{self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-SHOWN_LOG:]


def race(
    name: str, workload: Workload, settings: Settings, folder: Path, say: Callable[[str], None]
) -> dict[str, Track]:
    """Race one workload in a new folder. Raises BenchFailed."""
    job = prepare(workload, settings, folder)
    runners: list[Runner] = []
    total = settings.warmup + settings.steps
    try:
        for side in NAMES:
            command = [sys.executable, "-m", "bench.child", side]
            runners.append(Runner(side, command, environment(job), folder / f"{side}.log", settings.timeout))
            runners[-1].send((job, total))
        for runner in runners:
            runner.receive("imported")
        laps: dict[str, list[Lap]] = {side: [] for side in NAMES}
        for step in range(total + 1):  # the lap before the first step is the set-up
            turn = runners if step % 2 == 0 else runners[::-1]
            for runner in turn:
                runner.send("go")
                laps[runner.name].append(runner.receive("lap"))
            shown = ", ".join(f"{side} {laps[side][-1].wall:.2f} s ({laps[side][-1].cpu:.2f} cpu)" for side in NAMES)
            say(f"{name}: {f'step {step} of {total}' if step else 'set-up'}: {shown}")
        evidence = {}
        for runner in runners:
            runner.send("stop")
            evidence[runner.name] = runner.receive("evidence")
    finally:
        for runner in runners:
            runner.close()
    tracks = {side: Track(laps[side][0], laps[side][1:], **evidence[side]) for side in NAMES}
    check_equal(tracks, total)
    return tracks


def prepare(workload: Workload, settings: Settings, folder: Path) -> Job:
    """Write model and rows into a new folder; the job both sides get. Raises BenchFailed when that cannot be."""
    batch_size, samples = settings.batch_size or workload.batch_size, workload.samples
    if samples and batch_size % samples:
        raise BenchFailed(f"a batch of {batch_size} cannot hold {samples} completions of every prompt")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise BenchFailed(f"{folder} exists: what an earlier bench left there would count as set-up done") from None
    rows_a_step = batch_size // (samples or 1)
    most = max(settings.setup_pairs, (settings.warmup + settings.steps) * rows_a_step)
    compact = None if settings.device == "cuda" or settings.stock else True
    job = Job(
        algorithm=workload.algorithm,
        folder=folder,
        batch_size=batch_size,
        rows=-(-most // rows_a_step) * rows_a_step,
        max_length=workload.lengths.longest,
        seed=settings.seed,
        threads=settings.threads,
        device=settings.device,
        layout=settings.layout,
        compact=compact,
        samples=samples,
        longest=workload.lengths.completion_range[1],
    )
    rows = make_rows(workload, job.rows, settings.seed)
    write_rows(job.rows_file, rows)
    write_rows(job.ordered_file, in_training_order(rows, settings.seed))
    written_after = workload.lengths.prompt_median if samples else None
    write_model(job.model_folder, workload.shape, workload.lengths.longest, settings.seed, written_after)
    return job


def environment(job: Job) -> dict[str, str]:
    """A side's variables: equal threads, this tree's alignkit, and caches that nothing has filled before."""
    changed = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)]),
        "OMP_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(job.folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "ALIGNKIT_CACHE": str(job.folder / "cache"),
    }
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # TRL refuses a process that sees several
    changed["CUDA_VISIBLE_DEVICES"] = gpu if job.device == "cuda" else ""
    return {**os.environ, **changed}


def check_equal(tracks: dict[str, Track], steps: int) -> None:
    """Raises BenchFailed unless both sides made these steps on the same tokens in the same batches."""
    ours, theirs = (tracks[side] for side in NAMES)
    for side, track in tracks.items():
        if not len(track.steps) == len(track.losses) == len(track.digests) == steps:
            raise BenchFailed(f"{side} made {len(track.losses)} steps on {len(track.digests)} batches, not {steps}")
    for step in range(steps):
        if ours.digests[step] != theirs.digests[step]:
            raise BenchFailed(
                f"step {step + 1} was made on other rows: alignkit saw {ours.tokens[step]} tokens, TRL "
                f"{theirs.tokens[step]}"
            )
    if ours.facts["threads"] != theirs.facts["threads"]:
        raise BenchFailed(f"alignkit ran on {ours.facts['threads']} threads, TRL on {theirs.facts['threads']}")
