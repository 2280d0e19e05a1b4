"""What methods on preference pairs share: how a group becomes a pair, and what is logged of one."""

from __future__ import annotations

from dataclasses import replace
from math import isnan
from typing import TYPE_CHECKING

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Metrics
from alignkit.core.types import Batch, Completion, Group, Metric, Row, Unit

if TYPE_CHECKING:
    from torch import Tensor


def best_worst(group: Group) -> Unit:
    """The completions with the highest and the lowest reward, in this order; ties fall to the earlier one."""
    best = max(group.completions, key=lambda c: c.reward)
    worst = min(reversed(group.completions), key=lambda c: c.reward)
    return (group.row(best), group.row(worst))


ROUND_MODELS = {"reference": "round", "previous": "round", "base": "never"}
"""Models of a run that learns from its own judgement, and when they move: the reference is where a round began,
`previous` where the one before it did, `base` what came before the start."""
ROUND_STARTS = {"previous": "base"}
"""Before the first round there was the base."""


class OwnPairsConfig(Config):
    """Which answers of a policy to one prompt are a pair."""

    missing_eos_penalty: float = Field(
        0.0, ge=0, description="taken off the score of an answer that the limit of length cut off"
    )
    min_gap: float = Field(
        0.0, ge=0, description="a pair whose scores are no further apart is left out; 0 = only one of equal scores"
    )
    max_length_ratio: float | None = Field(
        None,
        gt=0,
        description="a pair whose chosen answer has more than so many times the rejected one's tokens is "
        "left out; null = none is",
    )


def own_pair(group: Group, config: OwnPairsConfig) -> Unit | None:
    """A policy's best and worst answer to a prompt by their rewards; of equal ones the earlier.

    None where fewer than two were scored, or where there is nothing to choose between.
    """
    told = [
        (answer.reward - config.missing_eos_penalty * (answer.ended is False), answer)
        for answer in group.completions
        if not isnan(answer.reward)
    ]
    if len(told) < 2:
        return None
    best, worst = max(told, key=lambda pair: pair[0]), min(told, key=lambda pair: pair[0])
    if best[0] - worst[0] <= config.min_gap:
        return None
    chosen, rejected = best[1], worst[1]
    longest = config.max_length_ratio
    if longest is not None and len(chosen.tokens) > longest * max(1, len(rejected.tokens)):
        return None
    return (answer_row(group, chosen), answer_row(group, rejected))


def answer_row(group: Group, answer: Completion) -> Row:
    """Prompt and answer, without what the writer said of its tokens: a likelihood does not ask who wrote them."""
    return group.row(replace(answer, logps=None))


def chosen_tokens(batch: Batch) -> Tensor:
    """[N, L] bool: the trained tokens of chosen answers, which come first in every pair."""
    is_chosen = batch["row"].new_zeros(batch.num_units, batch.k)
    is_chosen[:, 0] = True
    return batch["mask"] & is_chosen.reshape(-1, 1)


def in_order(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float | Tensor
) -> Tensor:
    """[U] bool: whether the implicit reward β·(policy − reference) of the chosen answer is the larger one.

    A tie is a miss, and so is a difference that is only rounding of the sums: before the first step all pairs are tied,
    however the reference's forward was batched. Args: as `pair_metrics`.
    """
    rounding = 4 * _EPSILON[chosen.element_size()] * beta * (ref_chosen.abs() + ref_rejected.abs())
    return beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected) > rounding


def pair_metrics(
    batch: Batch, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float | Tensor
) -> Metrics:
    """The metrics every paired method logs; the implicit reward of a completion is β·(policy − reference).

    Args: [U] summed log-probabilities in nats each, zeros for the reference where there is none.
    """
    unit = batch["unit"]
    lengths = batch["mask"].sum(-1)
    reward_w, reward_l = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    right = in_order(chosen, rejected, ref_chosen, ref_rejected, beta)
    return {
        "rewards/chosen": Metric.mean(reward_w, unit),
        "rewards/rejected": Metric.mean(reward_l, unit),
        "rewards/margins": Metric.mean(reward_w - reward_l, unit),
        "rewards/accuracies": Metric.mean(right.to(reward_w.dtype), unit),
        "logps/chosen": Metric.mean(chosen, unit),
        "logps/rejected": Metric.mean(rejected, unit),
        "completions/mean_length": Metric.mean(lengths.to(chosen.dtype), batch["row"]),
    }


_EPSILON = {4: 2.0**-23, 8: 2.0**-52}
"""Bytes of a float → its spacing at 1; log-probabilities are never kept in less than float32."""
