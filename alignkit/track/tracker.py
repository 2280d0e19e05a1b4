"""What a run says while it runs: a window of metrics, written to metrics.jsonl and handed to the sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.core.types import Metric
from alignkit.track.metrics import Totals, add, values

if TYPE_CHECKING:
    from alignkit.core.contracts import Sink
    from alignkit.track.sinks import JsonlSink

Derive = Callable[[dict[str, float]], dict[str, float]]


class Tracker:
    """Gathers metrics over `logging_steps` steps and logs them; rank 0 has sinks, the others have none.

    `derive`: what the algorithm makes of a window's values.
    """

    def __init__(
        self, jsonl: JsonlSink | None, sinks: Sequence[Sink], logging_steps: int, derive: Derive = dict
    ) -> None:
        self._jsonl, self._sinks, self._every, self._derive = jsonl, list(sinks), logging_steps, derive
        self._window: Totals = {}
        self._steps = 0
        self._last: dict[str, float] = {}

    def start(self, facts: Mapping[str, Any]) -> None:
        """Open every sink."""
        for sink in self._all():
            sink.start(facts)

    def wants(self, step: int) -> bool:
        """Whether the step that will be number `step` ends a window, so that costly metrics are worth computing."""
        return step % self._every == 0

    def step(self, step: int, totals: Totals, facts: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Take one step's globally reduced metrics; log when the window is full.

        `facts` (learning rate, epoch, …) and `timings` are of this step alone.
        """
        add(self._window, totals)
        self._steps, self._last = self._steps + 1, {"step": step, **facts}
        if self.wants(step):
            self.flush(timings)

    def flush(self, timings: Mapping[str, float] | None = None) -> None:
        """Log the open window: the last one of a run may hold fewer steps than the others."""
        if not self._steps:
            return
        # Sums (the loss among them) are of one step; the window shows their mean.
        means = {n: Metric(float(m.sum), self._steps) if m.how == "sum" else m for n, m in self._window.items()}
        self.log({**self._last, **self._derive(values(means)), **(timings or {})})
        self._window, self._steps = {}, 0

    def log(self, record: Mapping[str, float]) -> None:
        """One record to every sink."""
        for sink in self._all():
            sink.log(record)

    def close(self) -> None:
        """Close every sink, the last opened first."""
        for sink in reversed(self._all()):
            sink.close()

    def state_dict(self) -> dict[str, Any]:
        """The open window and how far metrics.jsonl was written."""
        window = {name: [float(m.sum), float(m.count), m.how] for name, m in self._window.items()}
        if self._jsonl is not None:
            self._jsonl.sync()
        return {
            "window": window,
            "steps": self._steps,
            "last": self._last,
            "jsonl": self._jsonl.state_dict() if self._jsonl is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the window; cut metrics.jsonl back to where the checkpoint was."""
        self._window = {name: Metric(*fields) for name, fields in state["window"].items()}
        self._steps, self._last = state["steps"], state["last"]
        if self._jsonl is not None:
            self._jsonl.load_state_dict(state["jsonl"])

    def _all(self) -> list[Sink]:
        return [*([self._jsonl] if self._jsonl is not None else []), *self._sinks]
