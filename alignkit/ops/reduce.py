"""Masked sums and means. None divides by a batch: that is the trainer's business."""

from __future__ import annotations

from torch import Tensor


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """[N, L] → [N]: the sum where `mask` is True, 0 for an empty row. Safe when `x` holds inf or nan outside it."""
    return x.where(mask, 0.0).sum(-1)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[N, L] → [N]: the mean where `mask` is True, 0 for an empty row."""
    return sequence_sum(x, mask) / mask.sum(-1).clamp(min=1)
