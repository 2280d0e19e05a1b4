"""Ctrl-C, SIGTERM and SIGUSR1 ask the run to stop at the next step border; a second Ctrl-C stops it at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch

from alignkit.core.contracts import World
from alignkit.dist.launcher import launched_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notes signals while the loop runs; handlers are put back afterwards."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked: all stop at the same step."""
        if world.size == 1:
            return self.name is not None
        return bool(world.sum(torch.tensor(float(self.name is not None))) > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if launched_rank() == 0:
            again = "; again = at once" if number == signal.SIGINT else ""
            print(f"\n{self.name}: stopping after this step{again}", file=sys.stderr, flush=True)
