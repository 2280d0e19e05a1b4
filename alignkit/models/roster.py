"""The run's other models — reference today; previous, teacher, judge later — and the columns they fill."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from alignkit.core.errors import RunFailed
from alignkit.core.types import BEHAVIOUR, Batch, Forward, Unit
from alignkit.data.collate import select_units
from alignkit.models.cache import Bar, LogpsCache
from alignkit.models.policy import SCORING_TOKENS, CausalPolicy

NO_SLOTS: Mapping[str, tuple[int, ...]] = {}
"""Every column for all rows."""
OLD, WEIGHT = "policy.logps", "behaviour.weight"
"""Columns about the writer of a completion: the policy's log-probabilities before the round, and importance weights."""


class ScoringModel(Protocol):
    """A model of the run that scores without gradient."""

    def forward(self, batch: Batch, outputs: frozenset[str]) -> Forward:
        """Scores of a padded batch."""
        ...

    def release(self) -> None:
        """Free the memory; the next forward loads again."""
        ...


class AdapterReference:
    """The policy's own weights as they were before training: adapter off, or the frozen adapter it started from."""

    def __init__(self, policy: CausalPolicy) -> None:
        self._policy = policy

    def forward(self, batch: Batch, outputs: frozenset[str]) -> Forward:
        """Scores of the reference, eval mode."""
        with self._policy.evaluating(), self._policy.as_reference():
            return self._policy.forward(batch, outputs)

    def release(self) -> None:
        """Nothing of its own to free."""


class FrozenModel:
    """Weights of its own, loaded at the first forward and freed by `release`."""

    def __init__(self, load: Callable[[], CausalPolicy]) -> None:
        self._load = load
        self._loaded: CausalPolicy | None = None

    def forward(self, batch: Batch, outputs: frozenset[str]) -> Forward:
        """Scores, eval mode."""
        if self._loaded is None:
            self._loaded = self._load()
        with self._loaded.evaluating():
            return self._loaded.forward(batch, outputs)

    def release(self) -> None:
        """Free the weights."""
        self._loaded = None
        gc.collect()


@dataclass(frozen=True)
class Sampled:
    """What to make of the log-probabilities that come with completions.

    `trusted`: they are the policy's own, so no pass is needed for them. Where they are not, a token counts as much more
    or less as the policy likes it better or worse than its writer did, at most `cap` times; None = always once.
    """

    trusted: bool = True
    cap: float | None = None


class Roster:
    """Models by name, and their log-probability caches by name.

    A cached model is one that never moves: each of its rows is scored once, kept on disk, and found again.
    """

    def __init__(
        self,
        policy: CausalPolicy,
        models: Mapping[str, ScoringModel],
        caches: Mapping[str, LogpsCache],
        sampled: Sampled | None = None,
    ) -> None:
        self._policy, self._models, self._caches = policy, dict(models), dict(caches)
        self._sampled = sampled if sampled is not None else Sampled()

    def refresh(self, round: int) -> None:
        """The one moment other models move: after scoring, before columns. None moves yet."""
        del round

    def fill(self, batch: Batch, columns: Iterable[str], slots: Mapping[str, tuple[int, ...]] = NO_SLOTS) -> Batch:
        """`<model>.<output>` columns, without gradient, micro-batched.

        A column of tokens that `slots` names is filled for these rows of every unit, and is 0 elsewhere.

        Raises:
            RunFailed: a model answers nan or infinity.
        """
        known: dict[str, Tensor] = {}
        for name in sorted({*columns} - {WEIGHT}):
            if name == OLD and self._sampled.trusted and BEHAVIOUR in batch:
                known[name] = batch[BEHAVIOUR]
            else:
                known[name] = self._partly(batch, name, slots[name]) if name in slots else self._column(batch, name)
        if WEIGHT in columns:
            known[WEIGHT] = self._weight(batch, known.get(OLD))
        return batch.with_columns(known)

    def _weight(self, batch: Batch, old: Tensor | None) -> Tensor:
        """[N, L]: how much likelier the policy finds each token than its writer did, cut off above; 1 where not asked.

        Source: truncated importance sampling.
        """
        cap = self._sampled.cap
        if old is None or cap is None or self._sampled.trusted or BEHAVIOUR not in batch:
            return torch.ones(batch["mask"].shape)
        return (old - batch[BEHAVIOUR]).clamp(-20.0, 20.0).exp().clamp(max=cap).where(batch["mask"], 1.0)

    def precompute(
        self, units: Sequence[Unit], columns: Iterable[str], progress: Callable[[str], None], bar: Bar
    ) -> None:
        """Score all rows of a run once for its cached models, then free those models."""
        for column in sorted(columns):
            name, _, output = column.partition(".")
            if output != "logps" or name not in self._caches or not units:
                continue
            cache, model = self._caches[name], self._models[name]
            cache.fill(units, partial(_logps, model), self._cut, progress, bar)
            model.release()

    def _cut(self, batch: Batch, max_tokens: int) -> list[list[int]]:
        return self._policy.cut(batch, range(batch.num_units), max_tokens)

    def _partly(self, batch: Batch, column: str, slots: tuple[int, ...]) -> Tensor:
        """The [N, L] column of these rows of every unit; rows without a trained token cost no forward."""
        some = batch.keep_rows(*slots)
        index = some.by_unit(some["mask"].any(-1)).any(-1).nonzero().flatten()
        full = torch.zeros(batch["mask"].shape)
        if len(index):
            found = self._column(select_units(some, index.tolist()), column)
            rows = (index[:, None] * batch.k + torch.tensor(slots)).reshape(-1)
            full[rows, : found.shape[1]] = found
        return full

    def _column(self, batch: Batch, column: str) -> Tensor:
        name, _, output = column.partition(".")
        cache = self._caches.get(name) if output == "logps" else None
        if cache is not None:
            cached = cache.lookup(batch)
            if cached is not None:
                return cached
        model = self._models[name] if name != "policy" else None
        parts: list[tuple[list[int], Tensor]] = []
        for index in self._cut(batch, SCORING_TOKENS):
            micro = select_units(batch, index)
            with self._policy.evaluating():
                out = (model or self._policy).forward(micro, frozenset({output}))
            value: Tensor | None = getattr(out, output)
            if value is None:
                raise RunFailed(f"column {column!r}: the model {name!r} has no output {output!r}")
            parts.append((index, value.cpu()))
        return _assemble(batch, parts, column)


def _logps(model: ScoringModel, batch: Batch) -> Tensor:
    return model.forward(batch, frozenset({"logps"})).logps


def _assemble(batch: Batch, parts: Sequence[tuple[list[int], Tensor]], column: str) -> Tensor:
    width = batch["mask"].shape[1]
    full: Tensor | None = None
    for index, value in parts:
        rows = (torch.tensor(index)[:, None] * batch.k + torch.arange(batch.k)).reshape(-1)
        if full is None:
            by_token = (width, *value.shape[2:]) if value.ndim > 1 else ()
            full = value.new_zeros(batch.num_rows, *by_token)
        if value.ndim > 1:
            full[rows, : value.shape[1]] = value
        else:
            full[rows] = value
    assert full is not None
    if not bool(torch.isfinite(full).all()):
        raise RunFailed(
            f"column {column!r} holds nan or infinity: the model that fills it has broken weights, or its dtype "
            "overflows. Look for nan in its weights, or try model.dtype: float32."
        )
    return full
