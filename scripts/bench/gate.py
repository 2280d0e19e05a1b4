"""The gate in a side's process: it measures what lies between two stops, and waits until the parent asks for more."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Tokens = tuple[tuple[int, ...], ...]
"""A row: prompt and completions, token by token."""


class Stopped(BaseException):
    """The race is over. Not an Exception, so that no trainer takes it for a fault and saves what is left."""


@dataclass(frozen=True)
class Lap:
    """What lay between two stops. `peak` and `resident` are bytes: of the process, or of the GPU's allocator."""

    wall: float
    cpu: float
    peak: int
    resident: int


@dataclass
class Evidence:
    """What shows that both sides did the same work, gathered while they raced."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    batches: list[list[Tokens]] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    """Tokens of each completion that the side wrote itself, by step."""
    facts: dict[str, Any] = field(default_factory=dict)

    def summary(self, steps: int) -> dict[str, Any]:
        """Plain data on the first `steps` steps; a digest does not depend on the order of rows within its batch."""
        batches = [sorted(batch) for batch in self.batches[:steps]]
        return {
            "losses": self.losses[:steps],
            "grad_norms": self.grad_norms[:steps],
            "tokens": [sum(len(part) for row in batch for part in row) for batch in batches],
            "digests": [sha256(repr(batch).encode()).hexdigest()[:16] for batch in batches],
            "lengths": self.lengths[:steps],
            "facts": self.facts,
        }


class Meter:
    """Wall clock, processor time of all threads and peak memory since the last reset."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self.reset()

    def reset(self) -> None:
        """Measure from here."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # 5 is the kernel's word for: peak := resident
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Lap:
        """Everything since the reset; work still queued on the GPU is waited for."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        peak, resident = self._memory()
        return Lap(wall, cpu, peak, resident)

    def _memory(self) -> tuple[int, int]:
        if self._on_gpu:
            import torch

            return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        status = Path("/proc/self/status").read_text()
        peak, resident = (
            int(re.findall(rf"^{name}:\s+(\d+) kB$", status, re.M)[0]) * 1024 for name in ("VmHWM", "VmRSS")
        )
        return peak, resident


class Gate:
    """A side says `imported`, builds, says `model_built`, and `passed` before the first step and after every one.

    Messages are pairs of a kind and a value; the parent answers with a word.
    """

    def __init__(self, connection: Connection, device: str) -> None:
        self._connection, self._device = connection, device
        self._meter: Meter | None = None
        self._base = 0

    def imported(self) -> None:
        """Imports are done: they are nobody's set-up. Measuring begins with the parent's word."""
        self._send("imported", None)
        self._wait()
        self._meter = Meter(self._device)

    def model_built(self) -> None:
        """The weights are loaded, nothing is trained yet: what training adds is counted from here."""
        assert self._meter is not None
        self._base = self._meter.read().resident

    def passed(self) -> None:
        """Report the lap that ends here, and wait for the word to go on. Raises Stopped when the race is over."""
        assert self._meter is not None
        self._send("lap", self._meter.read())
        self._wait()
        self._meter.reset()

    def finished(self, summary: dict[str, Any]) -> None:
        """The side's evidence: its last message."""
        self._send("evidence", {**summary, "base": self._base})

    def failed(self, trace: str) -> None:
        """The side's last message when it broke."""
        self._send("failed", trace)

    def _send(self, kind: str, value: Any) -> None:
        self._connection.send((kind, value))

    def _wait(self) -> None:
        if self._connection.recv() == "stop":
            raise Stopped


def rows_of(examples: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[Tokens]:
    """Token rows of a batch of mappings."""
    return [tuple(tuple(example[column]) for column in columns) for example in examples]
