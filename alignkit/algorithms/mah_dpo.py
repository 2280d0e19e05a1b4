"""Multi-action-head DPO: one backbone, one output layer an objective. Shen et al. 2025, arXiv 2510.01167.

    ℓ_i = −log σ(β·h_i)   from the log-probabilities of the head of pair i's objective
    L   = Σ_o w_o · mean_{i of o} ℓ_i / Σ_o w_o   over the objectives that the optimizer batch holds

Heads begin as copies of the reference's output layer; the reference keeps that one. Equal w_o as in the authors' code.

Deviations: the authors disturb the heads at the start (`head_init_noise` 0.001), so that the loss does not begin at
log 2; here it is 0 unless asked for. Their mean is over the heads of a micro-batch, ours over those of the optimizer
batch. `objective_weights` is ours. `ipo` divides log-ratios by the tokens of their answer, as `dpo` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, log
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    DataError,
    Forward,
    Group,
    Metric,
    Metrics,
    Needs,
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.contracts import Heads
from alignkit.core.lazy import torch
from alignkit.core.pairs import best_worst, pair_metrics
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor

SHARE = "head_share"
"""The column [U] with the weight of a pair's head in the loss of the optimizer batch."""


class MahDPOConfig(AlgorithmConfig):
    """Keys of multi-action-head DPO."""

    objectives: list[str] = Field(
        min_length=1, description="the values of the column `objective`, in the order of the heads"
    )
    beta: float = Field(0.1, gt=0, description="tether to the reference; dimensionless")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels (conservative DPO)")
    loss_type: Literal["sigmoid", "ipo"] = Field("sigmoid", description="the loss of a pair, as in dpo")
    objective_weights: dict[str, float] | None = Field(
        None, description="what each objective counts in the loss, > 0; null = all the same"
    )
    head_init_noise: float = Field(
        0.0, ge=0, description="standard deviation of what is added to each head at the start; the authors' is 0.001"
    )

    @property
    def weights(self) -> list[float]:
        """What each objective counts, in the order of the heads."""
        given = self.objective_weights
        return [1.0 if given is None else given[name] for name in self.objectives]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.objectives)) < len(self.objectives) or "" in self.objectives:
            raise ValueError("`objectives` names each objective once, and none of them is empty")
        if self.label_smoothing and self.loss_type == "ipo":
            raise ValueError("`label_smoothing` does nothing to ipo; remove it")
        given = self.objective_weights
        if given is not None and (
            given.keys() != set(self.objectives) or not all(isfinite(w) and w > 0 for w in given.values())
        ):
            raise ValueError(
                f"`objective_weights` has one number above 0 for each of {', '.join(self.objectives)}, and no others"
            )
        return self


def of_objective(name: str) -> str:
    """The boolean column [U] of the pairs whose loss belongs to an objective."""
    return f"objective/{name}"


def asked_for(name: str) -> str:
    """The boolean column [U] of held-out pairs of an objective, whichever head they are under."""
    return f"asked/{name}"


def head_of_unit(batch: Batch) -> Tensor:
    """[U]: the head that each unit goes through."""
    return batch.by_unit(batch.inputs["head"])[:, 0].long()


def under_every_head(batch: Batch, names: Sequence[str]) -> Batch:
    """Each unit as it is, and again under every other head, where no loss and no count sees it."""
    repeats, units = len(names), batch.num_units

    def repeated(x: Tensor) -> Tensor:
        return torch.cat([x] * repeats)

    own = torch.arange(units * repeats) < units
    rows = own.repeat_interleave(batch.k)
    counted = {"unit": own, "row": rows, **{of_objective(name): own for name in names}}
    columns = {name: repeated(x) for name, x in batch.columns.items()}
    columns |= {asked_for(name): columns[of_objective(name)] for name in names}
    columns |= {name: columns[name] & where for name, where in counted.items()}
    inputs = {name: repeated(x) for name, x in batch.inputs.items()}
    turn = torch.arange(repeats, dtype=inputs["head"].dtype).repeat_interleave(batch.num_rows)
    inputs["head"] = (inputs["head"] + turn) % repeats
    return Batch(inputs=inputs, columns=columns, k=batch.k)


@register.algorithm("mah_dpo")
class MahDPO(Algorithm[MahDPOConfig]):
    """Preference pairs of several objectives, each with an output layer of its own, to be mixed when it writes."""

    needs = Needs(
        completions=2,
        columns=frozenset({"reference.logps"}),
        fields=frozenset({"objective"}),
        preferences=True,
        strata="objective",
    )

    def heads(self) -> Heads:
        return Heads(names=tuple(self.config.objectives), noise=self.config.head_init_noise)

    def prepare(self, groups: Sequence[Group]) -> None:
        """Refuses rows of unknown objectives, and objectives without a row: their heads would learn nothing."""
        there = {self._head(group) for group in groups}
        for i, name in enumerate(self.config.objectives):
            if i not in there:
                raise DataError(
                    f"no row has the objective {name!r}, so its head would learn nothing; give it rows, or take it out "
                    "of algorithm.objectives"
                )

    def build(self, groups: list[Group]) -> list[Unit]:
        units: list[Unit] = []
        for group in groups:
            unit = best_worst(group)
            for row in unit:
                row.inputs["head"] = float(self._head(group))
            units.append(unit)
        return units

    def _head(self, group: Group) -> int:
        """The number of the head of a group's objective. Raises DataError where there is none of that name."""
        name = group.fields.get("objective")
        if name not in self.config.objectives:
            raise DataError(
                f"row {group.id!r}: objective is {name!r}, expected one of algorithm.objectives: "
                f"{', '.join(self.config.objectives)}"
            )
        return self.config.objectives.index(name)

    def annotate(self, batch: Batch, world: World) -> Batch:
        """A column for each objective's pairs, and what the head of each pair counts among those of the batch."""
        head, names = head_of_unit(batch), self.config.objectives
        columns = {of_objective(name): batch["unit"] & (head == i) for i, name in enumerate(names)}
        counts = world.sum(torch.stack([column.sum() for column in columns.values()]).double())
        weights = torch.tensor(self.config.weights, dtype=torch.float64).where(counts > 0, 0.0)
        shares = weights / weights.sum() if counts.any() else weights
        return batch.with_columns({**columns, SHARE: shares[head]})

    def annotate_held_out(self, batch: Batch, world: World) -> Batch:
        """The same, and every pair also under the heads of other objectives, for the matrix of accuracies."""
        batch = self.annotate(batch, world)
        return under_every_head(batch, self.config.objectives) if len(self.config.objectives) > 1 else batch

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        mask, names, beta = batch["mask"], self.config.objectives, self.config.beta
        chosen, rejected = batch.by_unit(ops.sequence_sum(out.logps, mask)).unbind(1)
        ref_chosen, ref_rejected = batch.by_unit(ops.sequence_sum(batch["reference.logps"], mask)).unbind(1)
        value = self._of_pair(chosen - ref_chosen, rejected - ref_rejected, batch)
        shared = batch[SHARE].to(value.dtype) * value
        terms = {name: Term(shared, over=of_objective(name)) for name in names}

        def measured(over: Tensor) -> Metrics:
            return pair_metrics(batch.with_columns({"unit": over}), chosen, rejected, ref_chosen, ref_rejected, beta)

        metrics = measured(batch["unit"])
        for name in names:
            over = batch[of_objective(name)]
            own = measured(over)
            metrics |= {
                f"mah_dpo/{name}/loss": Metric.mean(value, over),
                f"mah_dpo/{name}/accuracy": own["rewards/accuracies"],
                f"mah_dpo/{name}/margin": own["rewards/margins"],
                f"mah_dpo/{name}/count": Metric(over.sum(), 1.0, "sum"),
            }
            if asked_for(name) in batch:
                for i, head in enumerate(names):
                    found = measured(batch[asked_for(name)] & (head_of_unit(batch) == i))
                    metrics[f"mah_dpo/{head}/accuracy_on/{name}"] = found["rewards/accuracies"]
        return terms, metrics

    def _of_pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        """The loss [U] of log-ratios [U] in nats."""
        config = self.config
        if config.loss_type == "sigmoid":
            return ops.logistic_pair(config.beta * (chosen - rejected), config.label_smoothing)
        lengths = batch.by_unit(batch["mask"].sum(-1).clamp(min=1)).unbind(1)
        return ops.square_pair(chosen / lengths[0] - rejected / lengths[1], config.beta)

    def at_reference(self) -> Mapping[str, float]:
        if self.config.head_init_noise:
            return {}
        start = log(2) if self.config.loss_type == "sigmoid" else (2 * self.config.beta) ** -2
        return {"loss": start, "rewards/margins": 0.0}
