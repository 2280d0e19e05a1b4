"""Pairwise preferences."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def logistic_pair(margin: Tensor, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """−(1−ε)·log σ(m) − ε·log σ(−m), elementwise.

    Args:
        margin: [U] scaled difference between chosen and rejected (dimensionless).
        label_smoothing: ε in [0, ½], the believed share of turned labels; a scalar or [U].

    Source: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; ε: Mitchell's conservative DPO note, 2023.
    """
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
