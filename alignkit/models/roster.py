"""The run's other models (reference, previous, base, teacher, …): how each moves, and the columns they fill."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from alignkit.core.contracts import Needs
from alignkit.core.errors import RunFailed
from alignkit.core.types import BEHAVIOUR, Batch, Unit
from alignkit.data.collate import select_units
from alignkit.models.cache import Bar, LogpsCache
from alignkit.models.policy import SCORING_TOKENS, CausalPolicy

NO_SLOTS: Mapping[str, tuple[int, ...]] = {}
"""Every column for all rows."""
NO_NAMES: Mapping[str, str] = {}
OLD, WEIGHT = "policy.logps", "behaviour.weight"
"""Columns about the writer of a completion: the policy's log-probabilities before the round, and importance weights."""


class ScoringModel(Protocol):
    """A model of the run beside the policy."""

    def holding(self) -> AbstractContextManager[CausalPolicy]:
        """Its weights, to score or write with: eval mode, no gradient."""
        ...

    def release(self) -> None:
        """Free the memory; the next use loads again."""
        ...


class AdapterReference:
    """The policy's own weights as they were before training: adapter off, or the frozen adapter it started from."""

    def __init__(self, policy: CausalPolicy) -> None:
        self._policy = policy

    @contextmanager
    def holding(self) -> Iterator[CausalPolicy]:
        """The policy with its adapter off."""
        with self._policy.evaluating(), self._policy.as_reference():
            yield self._policy

    def release(self) -> None:
        """Nothing of its own to free."""


class FrozenModel:
    """Weights of its own, loaded at the first use and freed by `release`."""

    def __init__(self, load: Callable[[], CausalPolicy]) -> None:
        self._load = load
        self._loaded: CausalPolicy | None = None

    @contextmanager
    def holding(self) -> Iterator[CausalPolicy]:
        """The model, loaded where it is not."""
        if self._loaded is None:
            self._loaded = self._load()
        with self._loaded.evaluating():
            yield self._loaded

    def release(self) -> None:
        """Free the weights."""
        self._loaded = None
        gc.collect()


class MovingModel:
    """What the policy was at the last round's refresh; before the first one `start`, or the policy it began as."""

    def __init__(self, policy: CausalPolicy, start: ScoringModel | None = None) -> None:
        self._policy, self._start = policy, start
        self.weights: Mapping[str, Tensor] | None = policy.weights() if start is None else None

    def move(self, weights: Mapping[str, Tensor]) -> None:
        """Become these weights of the policy."""
        self.weights = weights
        if self._start is not None:
            self._start.release()

    @contextmanager
    def holding(self) -> Iterator[CausalPolicy]:
        """The policy with the kept weights in place of its own."""
        if self.weights is None:
            assert self._start is not None
            with self._start.holding() as start:
                yield start
            return
        with self._policy.holding(self.weights):
            yield self._policy

    def release(self) -> None:
        """Nothing: what it was cannot be loaded again."""


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

    Args:
        identities: what tells each model's weights from others' until it moves, `policy` the start.
    """

    def __init__(
        self,
        policy: CausalPolicy,
        models: Mapping[str, ScoringModel],
        caches: Mapping[str, LogpsCache],
        sampled: Sampled | None = None,
        identities: Mapping[str, str] = NO_NAMES,
    ) -> None:
        self._policy, self._models, self._caches = policy, dict(models), dict(caches)
        self._sampled = sampled if sampled is not None else Sampled()
        self._identities = dict(identities)

    @property
    def names(self) -> list[str]:
        """The models that can be asked, the policy first."""
        return ["policy", *sorted(self._models)]

    @property
    def precomputes(self) -> bool:
        """Whether a model scores all rows before the run."""
        return bool(self._caches)

    def asks_policy(self, needs: Needs) -> bool:
        """Whether a round needs the policy's weights, or those it had, before its first update."""
        own = {name for name, model in self._models.items() if not isinstance(model, FrozenModel)} | {"policy"}
        moves = any(isinstance(model, MovingModel) for model in self._models.values())
        asked = {column.partition(".")[0] for column in needs.columns} - set(self._caches)
        return needs.rewards or moves or bool(asked & own)

    def refresh(self, version: int) -> None:
        """The one moment other models move: after scoring, before columns. `version`: the policy's."""
        moving = {name: model for name, model in self._models.items() if isinstance(model, MovingModel)}
        weights = self._policy.weights() if moving else {}
        for name, model in moving.items():
            model.move(weights)
            self._identities[name] = self.identity("policy", version)

    def identity(self, name: str, version: int) -> str:
        """Tells the present weights of a model from all others'. `version`: the policy's."""
        if name == "policy" and version > 0:
            return f"step {version}"
        return self._identities[name]

    @contextmanager
    def holding(self, name: str) -> Iterator[CausalPolicy]:
        """A model by name, to score or write with: eval mode, no gradient."""
        if name == "policy":
            with self._policy.evaluating():
                yield self._policy
            return
        with self._models[name].holding() as model:
            yield model

    def state_dict(self) -> dict[str, Any]:
        """What moved: models that moved together share their weights."""
        moved = {name: m.weights for name, m in self._models.items() if isinstance(m, MovingModel) and m.weights}
        kept = list({id(weights): dict(weights) for weights in moved.values()}.items())
        place = {key: i for i, (key, _) in enumerate(kept)}
        return {
            "weights": [weights for _, weights in kept],
            "models": {name: place[id(weights)] for name, weights in moved.items()},
            "identities": self._identities,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the weights of the models that move."""
        device = self._policy.dist.device
        weights = [{name: x.to(device) for name, x in kept.items()} for kept in state["weights"]]
        for name, i in state["models"].items():
            model = self._models[name]
            assert isinstance(model, MovingModel), name
            model.move(weights[i])
        self._identities = dict(state["identities"])

    def logps(self, batch: Batch, name: str) -> Tensor:
        """[N, L] in nats: what a model says of the trained tokens of padded rows, whoever wrote them."""
        return self._column(batch, f"{name}.logps")

    def fill(
        self,
        batch: Batch,
        columns: Iterable[str],
        slots: Mapping[str, tuple[int, ...]] = NO_SLOTS,
        *,
        began: bool = True,
    ) -> Batch:
        """`<model>.<output>` columns, without gradient, micro-batched.

        A column of tokens that `slots` names is filled for these rows of every unit, and is 0 elsewhere. `began`:
        whether the round just begins, so that what the policy wrote in it is still the policy's.

        Raises:
            RunFailed: a model answers nan or infinity.
        """
        known: dict[str, Tensor] = {}
        for name in sorted({*columns} - {WEIGHT}):
            if name == OLD and began and self._sampled.trusted and BEHAVIOUR in batch:
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
        parts: list[tuple[list[int], Tensor]] = []
        with self.holding(name) as model:
            for index in self._cut(batch, SCORING_TOKENS):
                out = model.forward(select_units(batch, index), frozenset({output}))
                value: Tensor | None = getattr(out, output)
                if value is None:
                    raise RunFailed(f"column {column!r}: the model {name!r} has no output {output!r}")
                parts.append((index, value.cpu()))
        return _assemble(batch, parts, column)


def _logps(model: ScoringModel, batch: Batch) -> Tensor:
    with model.holding() as policy:
        return policy.forward(batch, frozenset({"logps"})).logps


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
