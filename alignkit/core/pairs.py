"""What methods on preference pairs share: how a group becomes a pair, and what is logged of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.core.contracts import Metrics
from alignkit.core.types import Batch, Group, Metric, Unit

if TYPE_CHECKING:
    from torch import Tensor


def best_worst(group: Group) -> Unit:
    """The completions with the highest and the lowest reward, in this order; ties fall to the earlier one."""
    best = max(group.completions, key=lambda c: c.reward)
    worst = min(reversed(group.completions), key=lambda c: c.reward)
    return (group.row(best), group.row(worst))


def pair_metrics(batch: Batch, chosen: Tensor, rejected: Tensor, reward_w: Tensor, reward_l: Tensor) -> Metrics:
    """The metrics every paired method logs.

    Args: `chosen`, `rejected` [U] summed log-probabilities in nats; `reward_w`, `reward_l` [U] implicit rewards, β·Δ.
    A tie counts as a miss in `rewards/accuracies`.
    """
    unit = batch["unit"]
    lengths = batch["mask"].sum(-1)
    return {
        "rewards/chosen": Metric.mean(reward_w, unit),
        "rewards/rejected": Metric.mean(reward_l, unit),
        "rewards/margins": Metric.mean(reward_w - reward_l, unit),
        "rewards/accuracies": Metric.mean((reward_w > reward_l).to(reward_w.dtype), unit),
        "logps/chosen": Metric.mean(chosen, unit),
        "logps/rejected": Metric.mean(rejected, unit),
        "completions/mean_length": Metric.mean(lengths.to(chosen.dtype), batch["row"]),
    }
