"""MM-DPO: DPO whose β grows with the gap of a reward model's scores. Zhang et al. 2025, arXiv 2502.10391, "dynamic
reward scaling"; the imitation term and `implicit_batch` as in the authors' code.

    f    = 1 − exp(−k·max(0, δ)),  δ = score(chosen) − score(rejected)
    loss = −dpo_alpha · log σ(β·(1 + w·f)·h) − gamma · log π(chosen) per token

k and w [reconstructed]: read off a second-hand transcription of the paper; the authors' script has w = 0.1 and
gamma = 0.25. `gamma` is 0 here, so that the default is the paper's loss.

Deviations from the authors' code: `margin` is the default, where theirs takes one β for the whole batch
(`implicit_batch`); a pair without scores has f = 0, not 1; δ below 0, where the scores disagree with the label, counts
as 0; `label_smoothing` has its usual meaning, where 0 turns theirs round. `implicit_batch` keeps the 80 % of the batch
that lie nearest to its mean, where theirs draws them at random with Gaussian weights. A ranked row gives every pair of
answers of different rank. Pictures are not read: a row is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from math import ceil, exp, fsum, isfinite, log
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alignkit import ops
from alignkit.core import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    Completion,
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
from alignkit.core.lazy import torch
from alignkit.core.pairs import chosen_tokens, in_order, pair_metrics
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor

LEAST_BETA = 1e-3
SATURATED = 0.95
"""A factor beyond which a larger gap of scores hardly changes anything; with k = 0.5 that of δ = 6."""
BUCKETS = {"small": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "large": (2 / 3, float("inf"))}
"""Thirds of the factor, by which pairs are told apart in the metrics; a factor below 0 is small."""
KEPT_SHARE, FEWEST_PAIRS = 0.8, 5
"""Of a batch in `implicit_batch`: what lies nearest to its mean; with fewer pairs nothing can be left out."""


class MMDPOConfig(AlgorithmConfig):
    """Keys of MM-DPO."""

    mode: Literal["margin", "implicit_batch"] = Field(
        "margin", description="what moves β: the gap of each pair's scores, or how a batch's log-ratios are spread"
    )
    beta: float = Field(0.1, gt=0, description="β without a gap of scores; dimensionless")
    w: float = Field(0.5, ge=0, description="the largest β is 1 + w times the smallest; 0 = dpo")
    k: float = Field(0.5, gt=0, description="how fast β grows, per unit of the scores")
    dpo_alpha: float = Field(1.0, ge=0, description="weight of the preference loss")
    gamma: float = Field(0.0, ge=0, description="weight of −log π per token, a mean over all chosen tokens")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels (conservative DPO)")
    as_weight: bool = Field(False, description="multiply the loss of a pair by 1 + w·f in place of its β")


def scaling_factor(delta: float, k: float) -> float:
    """f = 1 − exp(−k·max(0, δ)) in [0, 1), of a gap of scores δ. Source: arXiv 2502.10391, dynamic reward scaling."""
    return 1 - exp(-k * max(0.0, delta))


def scaled_beta(factor: Tensor, beta: float, w: float) -> Tensor:
    """β·(1 + w·f), at least `LEAST_BETA`, elementwise. Source: arXiv 2502.10391 and the authors' code."""
    return (beta * (1 + w * factor)).clamp(min=LEAST_BETA)


def spread_factor(log_ratios: list[float]) -> float:
    """Mean of the 80 % nearest to the mean of a batch's log-ratio differences (nats), minus that mean, whatever their
    order; 0 of fewer than five. Source: the authors' code, with a fixed choice in place of a random one."""
    if len(log_ratios) < FEWEST_PAIRS:
        return 0.0
    mean = fsum(log_ratios) / len(log_ratios)
    nearest = sorted(log_ratios, key=lambda x: (abs(x - mean), x))[: int(KEPT_SHARE * len(log_ratios))]
    return fsum(nearest) / len(nearest) - mean


@register.algorithm("mm_dpo")
class MMDPO(Algorithm[MMDPOConfig]):
    """Preference pairs against a frozen reference; the more a reward model is sure of a pair, the more it counts."""

    needs = Needs(completions=2, columns=frozenset({"reference.logps"}), preferences=True)

    def __init__(self, config: MMDPOConfig) -> None:
        super().__init__(config)
        if config.mode == "implicit_batch":
            self.needs = replace(self.needs, columns=self.needs.columns | {"policy.logps"})

    def count_units(self, group: Group) -> int:
        return len(ordered_pairs(group))

    def build(self, groups: list[Group]) -> list[Unit]:
        """Every pair of answers of different rank, the better one first."""
        return [
            (group.row(better, factor=self._factor(group, better, worse)), group.row(worse))
            for group in groups
            for better, worse in ordered_pairs(group)
        ]

    def _factor(self, group: Group, better: Completion, worse: Completion) -> float:
        """f of a pair: the column `ls_factor`, or by the gap in `margin` or of the scores; 0 where there is none."""
        ready, given = _number(group, "ls_factor"), _number(group, "margin")
        if ready is not None:
            return ready
        scores = [answer.scores.get("score") for answer in (better, worse)]
        if given is None and scores[0] is not None and scores[1] is not None:
            given = scores[0].value - scores[1].value
        return 0.0 if given is None else scaling_factor(given, self.config.k)

    def annotate(self, batch: Batch, world: World) -> Batch:
        """Tokens of chosen answers, f as it moves β, and the 95th percentile of β, which is the round's."""
        unit, factor = batch["unit"], batch.by_unit(batch["factor"])[:, 0]
        moving = factor
        if self.config.mode == "implicit_batch":
            ratios = ops.sequence_sum(batch["policy.logps"] - batch["reference.logps"], batch["mask"])
            chosen, rejected = batch.by_unit(ratios.double()).unbind(1)
            mine: list[float] = (chosen - rejected)[unit].tolist()
            moving = torch.full_like(factor, spread_factor([x for part in world.gather(mine) for x in part]))
        mine = moving[unit].double().tolist()
        ordered = sorted(x for part in world.gather(mine) for x in part)
        high = ordered[ceil(0.95 * len(ordered)) - 1] if ordered else 0.0
        columns = {"moving": moving, "high": torch.full_like(factor, high), "chosen": chosen_tokens(batch)}
        return batch.with_columns(columns)

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config, mask, unit = self.config, batch["mask"], batch["unit"]
        chosen, rejected = batch.by_unit(ops.sequence_sum(out.logps, mask)).unbind(1)
        ref_chosen, ref_rejected = batch.by_unit(ops.sequence_sum(batch["reference.logps"], mask)).unbind(1)
        difference = (chosen - ref_chosen) - (rejected - ref_rejected)
        beta = scaled_beta(batch["moving"].to(chosen.dtype), config.beta, config.w)
        inside = torch.full_like(beta, config.beta) if config.as_weight else beta
        value = ops.logistic_pair(inside * difference, config.label_smoothing)
        if config.as_weight:
            value = value * (beta / config.beta)
        terms = {"preference": Term(value, over="unit", weight=config.dpo_alpha)}
        if config.gamma > 0:  # not 0 · term: without it and with w = 0 loss and gradient are DPO's to the last bit
            terms["sft"] = Term(-out.logps, over="chosen", weight=config.gamma)
        metrics = pair_metrics(batch, chosen, rejected, ref_chosen, ref_rejected, inside)
        high = scaled_beta(batch["high"].to(chosen.dtype), config.beta, config.w)
        metrics["mm_dpo/beta_mean"] = Metric.mean(beta, unit)
        metrics["mm_dpo/beta_p95"] = Metric.mean(high, unit)
        metrics["nll_loss"] = Metric.mean(-out.logps, batch["chosen"])
        factor = batch.by_unit(batch["factor"])[:, 0]
        right = in_order(chosen, rejected, ref_chosen, ref_rejected, inside)
        return terms, {**metrics, **_bucket_metrics(factor, (inside * difference).detach(), right, unit)}

    def at_reference(self) -> Mapping[str, float]:
        if self.config.as_weight:  # the loss depends on who is in the batch
            return {"rewards/margins": 0.0}
        return {"loss/preference": log(2), "rewards/margins": 0.0}


def ordered_pairs(group: Group) -> list[tuple[Completion, Completion]]:
    """Every pair of completions of different rank, the better one first: by the column `ranks`, else by reward.

    Raises: DataError where `ranks` does not say where each completion stands, or one `margin` is given for many pairs.
    """
    answers = group.completions
    ranks = group.fields.get("ranks")
    if ranks is None:
        ranks = [-answer.reward for answer in answers]
    elif not isinstance(ranks, list) or len(ranks) != len(answers) or not all(map(_is_number, ranks)):
        raise DataError(
            f"row {group.id!r}: `ranks` is {ranks!r}, expected {len(answers)} numbers, one a completion, 1 = best"
        )
    order = sorted(range(len(answers)), key=lambda i: ranks[i])
    pairs = [(answers[i], answers[j]) for i, j in combinations(order, 2) if ranks[i] < ranks[j]]
    for column in ("margin", "ls_factor"):
        if len(answers) > 2 and group.fields.get(column) is not None:
            raise DataError(
                f"row {group.id!r} has one `{column}` for {len(answers)} completions, which are several pairs; give "
                "`scores`, and `ranks` where another order counts"
            )
    return pairs


def _number(group: Group, column: str) -> float | None:
    found = group.fields.get(column)
    if found is None:
        return None
    try:
        number = float(found)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        raise DataError(f"row {group.id!r}: `{column}` is {found!r}, expected a number")
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _bucket_metrics(factor: Tensor, margin: Tensor, right: Tensor, unit: Tensor) -> Metrics:
    """Pairs by the third their factor is in: how many, how many are in the right order, and their margin β·h."""
    dtype = margin.dtype
    metrics = {"mm_dpo/saturated": Metric.mean((factor > SATURATED).to(dtype), unit)}
    for name, (low, high) in BUCKETS.items():
        inside = (factor < high) & ((factor >= low) if low else torch.ones_like(unit))
        metrics[f"mm_dpo/share_{name}"] = Metric.mean(inside.to(dtype), unit)
        metrics[f"mm_dpo/accuracy_{name}"] = Metric.mean(right.to(dtype), unit & inside)
        metrics[f"mm_dpo/margin_{name}"] = Metric.mean(margin, unit & inside)
    return metrics
