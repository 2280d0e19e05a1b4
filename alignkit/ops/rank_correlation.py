"""How far two rankings of the same items agree. Shapes: scores [..., N], one number for each of N items → [...]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Ties = Literal["zero", "ordinal"]


def kendall_tau(a: Tensor, b: Tensor, ties: Ties = "zero") -> Tensor:
    """τ_a = (concordant − discordant) / all pairs, in −1 … 1; 0 where there is no pair. Source: arXiv 2410.12735.

    A pair that is tied in either counts 0; with ties ordinal, of equal scores the earlier stands higher.
    """
    if ties == "ordinal":
        a, b = _ordinal(a), _ordinal(b)
    agree = torch.sign(a[..., :, None] - a[..., None, :]) * torch.sign(b[..., :, None] - b[..., None, :])
    size = a.shape[-1]
    return agree.sum((-2, -1)) / max(1, size * (size - 1))


def spearman_rho(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the ranks, −1 … 1, equal scores sharing their mean rank; 0 where one is constant."""
    x, y = (ranks - ranks.mean(-1, keepdim=True) for ranks in (average_ranks(a), average_ranks(b)))
    scale = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return (x * y).sum(-1) / scale.where(scale > 0, 1.0)


def same_extremes(a: Tensor, b: Tensor, *, positional: bool = False) -> Tensor:
    """Boolean: whether both find the same items best, and the same ones worst. Source: arXiv 2410.12735, TopOrder.

    `positional` compares, as the authors' code does, the ranks of the first-listed and of the last-listed item.
    """
    if positional:
        return (_ordinal(a) == _ordinal(b))[..., [0, -1]].all(-1)
    best = (a == a.amax(-1, keepdim=True)) == (b == b.amax(-1, keepdim=True))
    worst = (a == a.amin(-1, keepdim=True)) == (b == b.amin(-1, keepdim=True))
    return best.all(-1) & worst.all(-1)


def average_ranks(scores: Tensor) -> Tensor:
    """[..., N] → [..., N]: 1 for the lowest, equal scores sharing the mean of their ranks."""
    lower = (scores[..., :, None] > scores[..., None, :]).sum(-1)
    equal = (scores[..., :, None] == scores[..., None, :]).sum(-1)
    return lower + (equal.to(scores.dtype) + 1) / 2


def _ordinal(scores: Tensor) -> Tensor:
    """0 for the highest falling by one, so that more is better; of equal scores the earlier stands higher."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return -order.argsort(dim=-1).to(scores.dtype)
