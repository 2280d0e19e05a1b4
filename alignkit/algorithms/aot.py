"""Alignment via Optimal Transport: better answers as a crowd, not pair by pair. Melnyk et al. 2024, arXiv 2406.05882.

Values of a batch are sorted, and the k-th of one side meets the k-th of the other:

    aot            u_k = sort(log π(w) − log π(l))_k − sort(log π_ref(w) − log π_ref(l))_k
    aot_unpaired   u_k = sort(Δ(w))_k − sort(Δ(l))_k,   Δ = log π − log π_ref
    loss           mean over k of −(1−ε)·log σ(β·u_k) − ε·log σ(−β·u_k)

Deviations: none from the equations. The sort is over the optimizer batch of all processes, by the policy as it was when
the batch was taken up; the authors' code and TRL sort what one forward holds. So in `train.epochs_per_round` > 1 later
passes keep the order and the partners' values of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING

from pydantic import Field

from alignkit import ops
from alignkit.core import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    Forward,
    Group,
    Metrics,
    Needs,
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.lazy import torch
from alignkit.core.pairs import best_worst, chosen_tokens, pair_metrics
from alignkit.core.types import Metric, Term

if TYPE_CHECKING:
    from torch import Tensor


class AOTConfig(AlgorithmConfig):
    """AOT's own keys."""

    beta: float = Field(0.1, gt=0, description="tether to the reference; dimensionless")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels")
    paired: bool = Field(True, description="sort differences of pairs; false = chosen and rejected each for themselves")


def partners(mine: Tensor, others: Tensor, unit: Tensor, world: World) -> Tensor:
    """For every local unit the value of `others` that has its rank in `mine`, over all processes.

    Args: [U] each, `unit` boolean, False on padding; returns [U], 0 on padding.
    """
    everyone = world.gather((mine[unit].tolist(), others[unit].tolist()))
    ours, theirs = (
        torch.tensor([value for part in everyone for value in part[side]], dtype=mine.dtype) for side in (0, 1)
    )
    start = sum(len(part[0]) for part in everyone[: world.rank])
    found = ops.same_rank(ours, theirs)[start : start + int(unit.sum())]
    return torch.zeros_like(mine).masked_scatter(unit, found.to(mine.device))


@register.algorithm("aot_unpaired", paired=False)
@register.algorithm("aot")  # the first to run: a recipe that says `module:AOT` takes its defaults
class AOT(Algorithm[AOTConfig]):
    """Preference pairs, a frozen reference, a logistic loss on sorted values of the whole batch."""

    needs = Needs(completions=2, columns=frozenset({"reference.logps", "policy.logps"}), preferences=True)

    def build(self, groups: list[Group]) -> list[Unit]:
        return [best_worst(group) for group in groups]

    def annotate(self, batch: Batch, world: World) -> Batch:
        """Every unit learns what it is compared with: `aot/partner` of its first value, `aot/second` of its second."""
        unit = batch["unit"]
        first, second = _values(batch["policy.logps"], batch, paired=self.config.paired)
        columns = {"aot/partner": partners(first, second, unit, world)}
        if not self.config.paired:
            columns["aot/second"] = partners(second, first, unit, world)
        return batch.with_columns(columns)

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        beta, smoothing, mask = self.config.beta, self.config.label_smoothing, batch["mask"]
        first, second = _values(out.logps, batch, paired=self.config.paired)
        value = ops.logistic_pair(beta * (first - batch["aot/partner"]), smoothing)
        if not self.config.paired:
            # Every u_k is seen by two units, each of which owns one side of it: both gradients, but its value once.
            other = ops.logistic_pair(beta * (batch["aot/second"] - second), smoothing)
            value = value + other - (value + other).detach() / 2
        chosen, rejected = batch.by_unit(ops.sequence_sum(out.logps, mask)).unbind(1)
        ref_chosen, ref_rejected = batch.by_unit(ops.sequence_sum(batch["reference.logps"], mask)).unbind(1)
        metrics = pair_metrics(batch, chosen, rejected, ref_chosen, ref_rejected, beta)
        metrics["nll_loss"] = Metric.mean(-out.logps, chosen_tokens(batch))
        return {"policy": Term(value, over="unit")}, metrics

    def at_reference(self) -> Mapping[str, float]:
        return {"loss": log(2), "rewards/margins": 0.0}


def _values(logps: Tensor, batch: Batch, *, paired: bool) -> tuple[Tensor, Tensor]:
    """What is sorted, [U] each: the policy's and the reference's differences, or log-ratios of chosen and rejected."""
    mask = batch["mask"]
    chosen, rejected = batch.by_unit(ops.sequence_sum(logps, mask)).unbind(1)
    ref_chosen, ref_rejected = batch.by_unit(ops.sequence_sum(batch["reference.logps"], mask)).unbind(1)
    if paired:
        return chosen - rejected, ref_chosen - ref_rejected
    return chosen - ref_chosen, rejected - ref_rejected
