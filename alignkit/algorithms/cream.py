"""CREAM: consistency regularized self-rewarding. Wang et al. 2024, arXiv 2410.12735.

Self-rewarding whose labels are as sure as two judges of its answers agree: the policy of this round and that of the
round before.

    loss = −C·log σ(βh) − (1 − C)·log σ(−βh),  h = Δ(w) − Δ(l),  Δ(y) = log π(y) − log π_t(y)

with π_t the policy at the beginning of the round, w and l the best and worst of a prompt's N answers by this round's
judge, and C in [0, 1] how alike both judges rank all N:

    kendall    (τ + 1)/2 with τ = 2/(N(N − 1))·Σ_{i<k} sign((R_i − R_k)·(R'_i − R'_k))
    spearman   (ρ + 1)/2 of average ranks
    top_order  1 where both find the same answer best and the same one worst, else 0

averaged over the pairs of the round (`method: avg`), or each prompt's own (`dynamic`). The judge is `implicit` where
the recipe has no rewards; any other must say what the round before found, as the part `previous`.

Deviations: tied answers add 0 to τ (`ties: ordinal` ranks them by their order, as the authors' code does). The
authors' top order compares the answers listed first and last (`toporder_compat`). The mean of C is over prompts that
have a pair.
"""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignkit import ops
from alignkit.core import (
    Algorithm,
    Batch,
    Completion,
    DataError,
    Forward,
    Group,
    Metric,
    Metrics,
    Needs,
    RecipeError,
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.config import IterativeConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.lazy import torch
from alignkit.core.pairs import ROUND_MODELS, ROUND_STARTS, OwnPairsConfig, own_pair, pair_metrics
from alignkit.core.types import NAN, Term

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

PREVIOUS = "/previous"
"""Ends the name of the score that the judge of the round before gave."""


class CREAMConfig(IterativeConfig, OwnPairsConfig):
    """The keys of cream."""

    beta: float = Field(0.1, gt=0, description="tether to the round's beginning; dimensionless")
    consistency: Literal["kendall", "spearman", "top_order"] = Field(
        "kendall", description="how the agreement of two rankings is measured"
    )
    method: Literal["avg", "dynamic"] = Field("avg", description="one C for all pairs of a round, or each its own")
    ties: Literal["zero", "ordinal"] = Field("zero", description="equal scores say nothing, or rank as they are listed")
    toporder_compat: bool = Field(
        False, description="top_order compares the answers listed first and last, as the authors' code does"
    )
    missing: Literal["mean", "drop"] = Field(
        "mean", description="a pair whose answers the round before did not score: the mean C of the others, or left out"
    )
    floor_c: float = Field(0.0, ge=0, le=1, description="C is at least this; below ½ a pair is learned the other way")
    fixed_consistency: float | None = Field(
        None, ge=0, le=1, description="this C for every pair, whatever the judges say; 1 = plain self-rewarding"
    )


@register.algorithm("cream")
class CREAM(Algorithm[CREAMConfig]):
    """The best and the worst of a policy's own answers, as sure as its judgement is steady → soft DPO."""

    needs = Needs(
        completions=2,
        columns=frozenset({"reference.logps"}),
        rewards=True,
        models=ROUND_MODELS,
        starts=ROUND_STARTS,
        sources=("implicit",),
    )

    def __init__(self, config: CREAMConfig) -> None:
        super().__init__(config)
        self._judges: list[str] = []

    def take_facts(self, facts: RolloutFacts) -> None:
        """The names of the rewards, one of which tells what the round before found."""
        self._judges = [name for name, weight in facts.weights.items() if weight]
        if len(self._judges) != 1:
            raise RecipeError(
                f"rewards: cream compares one judge with that of the round before; {len(self._judges)} rewards have a "
                "weight. Give one, or weigh the others 0"
            )

    def build(self, groups: list[Group]) -> list[Unit]:
        """A unit is a prompt's pair, with `consistency`: nan where it is not known."""
        units: list[Unit] = []
        for group in groups:
            pair = own_pair(group, self.config)
            if pair is None:
                continue
            c = self._consistency(group)
            if isnan(c) and self.config.missing == "drop":
                continue
            for row in pair:
                row.scalar["consistency"] = c
            units.append(pair)
        return units

    def _consistency(self, group: Group) -> float:
        """C of all answers that both judges scored; nan where those are fewer than two."""
        config = self.config
        if config.fixed_consistency is not None:
            return config.fixed_consistency
        scores = [self._both(group, answer) for answer in group.completions]
        now, before = (torch.tensor(x, dtype=torch.float64) for x in zip(*scores, strict=True))
        known = ~(now.isnan() | before.isnan())
        if int(known.sum()) < 2:
            return NAN
        return consistency(now[known], before[known], config)

    def _both(self, group: Group, answer: Completion) -> tuple[float, float]:
        name = self._judges[0] if self._judges else ""
        if name + PREVIOUS not in answer.scores:
            raise DataError(
                f"cream needs to know what the judge of the round before says, and the reward {name!r} does not tell "
                f"(group {group.id!r}). `implicit` does, and `judge` with `previous: previous` among its args; or set "
                "algorithm.fixed_consistency"
            )
        now, before = answer.scores[name], answer.scores[name + PREVIOUS]
        return (now.value if now.valid else NAN, before.value if before.valid else NAN)

    def annotate(self, batch: Batch, world: World) -> Batch:
        """`agreed` [U]: C of every pair."""
        own = batch.by_unit(batch["consistency"])[:, 0]
        known = batch["unit"] & ~own.isnan()
        mean = world.mean(own.where(known, 0.0), known)
        agreed = mean.expand_as(own) if self.config.method == "avg" else own.where(known, mean)
        told = {"agreed": agreed.clamp(min=self.config.floor_c).to(own.dtype), "known": known}
        return batch.with_columns({**told, "consistency": batch["consistency"].nan_to_num(0.0)})

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        """The soft label's cross-entropy."""
        mask, agreed = batch["mask"], batch["agreed"]
        chosen, rejected = batch.by_unit(ops.sequence_sum(out.logps, mask)).unbind(1)
        ref_chosen, ref_rejected = batch.by_unit(ops.sequence_sum(batch["reference.logps"], mask)).unbind(1)
        value = cream_loss(chosen, rejected, ref_chosen, ref_rejected, agreed, self.config.beta)
        own = batch.by_unit(batch["consistency"])[:, 0]
        metrics = pair_metrics(batch, chosen, rejected, ref_chosen, ref_rejected, self.config.beta)
        metrics |= {
            "cream/consistency": Metric.mean(own, batch["known"]),
            "cream/below_half": Metric.mean((own < 0.5).float(), batch["known"]),
            "cream/label": Metric.mean(agreed, batch["unit"]),
        }
        return {"policy": Term(value, over="unit")}, metrics

    def at_reference(self) -> Mapping[str, float]:
        """log 2, whatever C is."""
        return {"loss": float(torch.tensor(2.0).log()), "rewards/margins": 0.0}


def consistency(now: Tensor, before: Tensor, config: CREAMConfig) -> float:
    """[N], [N] → C in [0, 1]: how alike two judges rank N answers, N ≥ 2. Source: arXiv 2410.12735, eq. 9 ff."""
    match config.consistency:
        case "kendall":
            return (float(ops.kendall_tau(now, before, config.ties)) + 1) / 2
        case "spearman":
            return (float(ops.spearman_rho(now, before)) + 1) / 2
        case "top_order":
            return float(ops.same_extremes(now, before, positional=config.toporder_compat))


def cream_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, agreed: Tensor, beta: float
) -> Tensor:
    """[U] nats each and C [U] → [U]. Source: arXiv 2410.12735, eq. 8."""
    # In the order in which dpo subtracts: with C = 1 it is dpo to the last bit.
    return ops.logistic_pair(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)), 1 - agreed)
