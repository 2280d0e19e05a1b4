"""Which evaluation was the best, and when a run has waited long enough for a better one. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any

from alignkit.core.errors import RecipeError
from alignkit.core.reading import did_you_mean
from alignkit.loop.config import EvalConfig


class Best:
    """The best value of `eval.best_metric` and its step. Every rank is told the same records, so all agree.

    Of equal values the earliest is the best. What is not finite, or was not measured, is never the best.
    """

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self.step: int | None = None
        self.value: float | None = None
        self._mark: float | None = None
        self._waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether `patience` evaluations in a row, the one before training not counted, brought no gain."""
        return self._config.patience is not None and self._waited >= self._config.patience

    def check(self, names: Collection[str]) -> None:
        """Refuse a metric that evaluations do not measure. Raises RecipeError with the `names` of those they do."""
        metric = self._config.best_metric
        if metric is None or metric in names:
            return
        known = sorted(names)
        hint = did_you_mean(metric, known)
        raise RecipeError(
            f"eval.best_metric: evaluations of this run do not measure {metric!r}; {f'{hint} ' if hint else ''}They "
            f"measure {', '.join(known)}. Nothing was trained: correct it and start again with --overwrite."
        )

    def judge(self, step: int, record: Mapping[str, float]) -> bool:
        """Take note of an evaluation; whether it is the best so far."""
        metric, sign = self._config.best_metric, -1.0 if self._config.smaller_is_better else 1.0
        if metric is None:
            return False
        value = record.get(metric)
        if value is None or not isfinite(value):
            self._waited += step > 0
            return False
        # Gains add up: many small ones in a row are progress once their sum exceeds min_delta.
        if self._mark is None or sign * (value - self._mark) > self._config.min_delta:
            self._mark, self._waited = value, 0
        else:
            self._waited += step > 0
        if self.value is not None and sign * value <= sign * self.value:
            return False
        self.step, self.value = step, value
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best so far, and how long ago the last gain was."""
        return {"step": self.step, "value": self.value, "mark": self._mark, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step, self.value, self._mark, self._waited = (state[k] for k in ("step", "value", "mark", "waited"))
