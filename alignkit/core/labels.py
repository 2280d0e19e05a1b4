"""What methods on labelled answers share: how a group becomes a row, and what is logged of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.core.contracts import Metrics, World
from alignkit.core.errors import DataError
from alignkit.core.lazy import torch
from alignkit.core.types import Batch, Group, Metric, Row

if TYPE_CHECKING:
    from torch import Tensor


def is_desirable(group: Group) -> bool:
    """The label of the group's one answer. Raises DataError where the row says something else."""
    label = group.fields["label"]
    if len(group.completions) != 1:
        raise DataError(
            f"row {group.id!r} has {len(group.completions)} completions and one label; expected rows with prompt, "
            "completion and label, or with chosen and rejected"
        )
    if label not in (True, False):
        raise DataError(f"row {group.id!r}: label is {label!r}, expected true or false")
    return bool(label)


def labelled(group: Group) -> Row:
    """The group's answer, with its label as the fact `label`: 1 desirable, 0 undesirable."""
    return group.row(group.completions[0], label=float(is_desirable(group)))


def contrast(batch: Batch, world: World) -> Tensor:
    """[N] weights whose mean product with x is the mean of x over desirable minus that over undesirable rows.

    All 0 while a class has no row; counts are those of the whole round.
    """
    label, row = batch["label"] > 0, batch["row"]
    counts = world.sum(torch.stack([(label & row).sum(), (~label & row).sum()]).double())
    if not counts.all():
        return torch.zeros_like(batch["label"])
    desirable, undesirable = counts.sum() / counts
    return torch.where(label, desirable, -undesirable).where(row, 0.0).to(batch["label"].dtype)


def label_metrics(batch: Batch, logps: Tensor, reference: Tensor, beta: float) -> Metrics:
    """The metrics every method on labelled answers logs; the implicit reward of one is β·(policy − reference).

    Args: [N] summed log-probabilities in nats each. `batch` holds the columns `label` and `contrast`.
    """
    row, label = batch["row"], batch["label"] > 0
    desirable, undesirable = row & label, row & ~label
    reward = beta * (logps - reference)
    return {
        "rewards/chosen": Metric.mean(reward, desirable),
        "rewards/rejected": Metric.mean(reward, undesirable),
        "rewards/margins": Metric.mean(batch["contrast"] * reward, row & (batch["contrast"] != 0)),
        "logps/chosen": Metric.mean(logps, desirable),
        "logps/rejected": Metric.mean(logps, undesirable),
        "completions/mean_length": Metric.mean(batch["mask"].sum(-1).to(logps.dtype), row),
    }
