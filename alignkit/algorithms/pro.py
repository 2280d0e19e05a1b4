"""Preference Ranking Optimization. Song et al. 2023, arXiv 2306.17492, L_PRO and its temperatures; details as in the
authors' code.

Deviations: answers are sorted here, whatever their order in the data; one stop token ends every answer and is scored
(the authors' code scores one padding token instead, except in the longest row); in a batch of lists of several lengths,
n is that of each list. `rank_eps` is the authors' constant inside the logarithm; 0 is the loss of the paper.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, Literal

from pydantic import Field

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
    Row,
    Terms,
    Unit,
    register,
)
from alignkit.core.lazy import torch
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor


class PROConfig(AlgorithmConfig):
    """PRO's own keys."""

    sft_weight: float = Field(0.05, ge=0, description="w: the imitation term counts w·(n − 1)² for a list of n answers")
    sft_normalization: Literal["sum", "mean"] = Field("sum", description="log-probability of the imitated answer")
    rank_eps: float = Field(1e-10, ge=0, description="constant inside the logarithm; 0 = the loss of the paper")
    list_length: int = Field(
        5, ge=2, description="n, rows of a unit; longer lists are thinned evenly, best and worst stay"
    )
    score_scale: float = Field(1.0, gt=0, description="scores are multiplied by it first")
    score_clip: float | None = Field(None, gt=0, description="then limited to ± this; null = no limit")


def score_gaps(scores: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """How much better than each later answer an answer is, and which of those pairs exist, [U, K, K] each.

    Args: [U, K] scores, best first, and which answers exist.
    """
    behind = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool, device=scores.device).triu(1)
    behind = behind & present[:, :, None] & present[:, None, :]
    return (scores[:, :, None] - scores[:, None, :]).where(behind, 0.0), behind


def rank_losses(means: Tensor, scores: Tensor, present: Tensor, rank_eps: float) -> tuple[Tensor, Tensor]:
    """−log( e^(T_k·p_k) / (ε + e^(T_k·p_k) + Σ_{i>k} e^(T_i·p_i)) ) of every head k, and which heads exist.

    T_i is the gap r_k − r_i of the scores and T_k the largest of them.

    Args: [U, K] mean log-probabilities in nats, scores best first, and which answers exist. Returns [U, K − 1] each;
    0 where there is no head. Source: arXiv 2306.17492, one summand of L_PRO; ε: the authors' code.
    """
    gaps, behind = score_gaps(scores, present)
    own = gaps.amax(-1)
    candidates = behind | torch.eye(means.shape[1], dtype=torch.bool, device=means.device)
    temperatures = gaps + torch.diag_embed(own)
    exponents = (temperatures * means[:, None, :]).where(candidates, float("-inf"))
    if rank_eps:
        constant = exponents.new_full((*exponents.shape[:2], 1), log(rank_eps))
        exponents = torch.cat([exponents, constant], -1)
    heads = behind.any(-1)
    value = (exponents.logsumexp(-1) - own * means).where(heads, 0.0)
    return value[:, :-1], heads[:, :-1]


@register.algorithm("pro")
class PRO(Algorithm[PROConfig]):
    """Ranked lists: each answer is preferred to all after it, by likelihoods per token; no reference."""

    needs = Needs(completions=2, preferences=True)

    @classmethod
    def rows_per_unit(cls, config: PROConfig) -> int:
        return config.list_length

    def build(self, groups: list[Group]) -> list[Unit]:
        return [self._ranked(group) for group in groups]

    def _ranked(self, group: Group) -> Unit:
        """The answers best first, equal ones in the order of the data, and empty rows up to `list_length`."""
        n = self.config.list_length
        answers = sorted(group.completions, key=lambda completion: -completion.reward)
        if len(answers) > n:
            answers = [answers[round(i * (len(answers) - 1) / (n - 1))] for i in range(n)]
        imitated = group.fields.get("sft_index") or 0
        if not isinstance(imitated, int) or not 0 <= imitated < len(answers):
            raise DataError(
                f"row {group.id!r}: `sft_index` is {imitated!r}, expected a rank from 0, the best, to "
                f"{len(answers) - 1}: the list has {len(answers)} answers after `list_length` {n}"
            )
        rows = [
            group.row(answer, score=self._score(answer.reward), imitated=float(rank == imitated))
            for rank, answer in enumerate(answers)
        ]
        return (*rows, *(Row(tokens=[], trained=[], group=group.id) for _ in range(n - len(rows))))

    def _score(self, reward: float) -> float:
        score, clip = self.config.score_scale * reward, self.config.score_clip
        return score if clip is None else max(-clip, min(clip, score))

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        mask = batch["mask"]
        sums = batch.by_unit(ops.sequence_sum(out.logps, mask))
        means = batch.by_unit(ops.sequence_mean(out.logps, mask))
        present = batch.by_unit(mask.any(-1))
        scores = batch.by_unit(batch["score"]).to(sums.dtype)
        ranked, heads = rank_losses(means, scores, present, self.config.rank_eps)
        imitated = sums if self.config.sft_normalization == "sum" else means
        imitated = (imitated * batch.by_unit(batch["imitated"]).to(sums.dtype)).sum(1)
        rivals = (present.sum(1) - 1).to(sums.dtype)
        terms = {
            "rank": Term(ranked.sum(1), over="unit"),
            "sft": Term(-imitated * rivals.square(), over="unit", weight=self.config.sft_weight),
        }
        nll = Metric.mean(-out.logps, mask & (batch["imitated"] > 0)[:, None])
        metrics = {"nll_loss": nll, "logps/chosen": Metric.mean(sums[:, 0], batch["unit"])}
        metrics["completions/mean_length"] = Metric.mean(mask.sum(-1).to(sums.dtype), mask.any(-1))
        return terms, {**metrics, **_ranking_metrics(batch, ranked, heads, means.detach(), scores, present)}


def _ranking_metrics(
    batch: Batch, ranked: Tensor, heads: Tensor, means: Tensor, scores: Tensor, present: Tensor
) -> Metrics:
    """How the likelihoods order the answers; of answers with equal scores neither order is wrong.

    Lists whose answers are all scored alike have no order, and count in neither Kendall's τ nor accuracy.
    """
    unit = batch["unit"]
    gaps, behind = score_gaps(scores, present)
    decided = behind & (gaps > 0)
    order = (means[:, :, None] - means[:, None, :]).sign().where(decided, 0.0)
    comparable = decided.any(2).any(1)
    tau = order.sum((1, 2)) / decided.sum((1, 2)).clamp(min=1)
    best = present & (scores == scores[:, :1])
    top, rest = (means.where(some, float("-inf")).amax(1) for some in (best, present & ~best))
    flat = heads & unit[:, None]
    metrics = {
        "pro/kendall_tau": Metric.mean(tau, unit & comparable),
        "rewards/accuracies": Metric.mean((top > rest).to(means.dtype), unit & comparable),
        "pro/zero_gap_heads": Metric.mean((gaps.amax(-1)[:, :-1] == 0).to(means.dtype), flat),
    }
    for k in range(ranked.shape[1]):
        metrics[f"pro/rank_loss_{k}"] = Metric.mean(ranked[:, k], flat[:, k])
    return metrics
