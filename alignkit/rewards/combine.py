"""Several rewards made one. Pure functions of scores and what is valid [B, K], and of weights [K].

Each returns the reward [B] and where there is one [B]. A reward that is not valid, or weighs 0, takes no part: its
score is not even read, so that nan behind a weight of 0 changes nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(scores: Tensor, valid: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w·r over what is valid. Source: arXiv 2503.21819, reward level."""
    counted = valid & (weights != 0)
    return (weights * scores).where(counted, 0.0).sum(1), counted.any(1)


def worst_case(scores: Tensor, valid: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """min w·r over what is valid: no reward is bought with another."""
    counted = valid & (weights != 0)
    lowest = (weights * scores).where(counted, math.inf).amin(1)
    return lowest.where(counted.any(1), 0.0), counted.any(1)


def product(scores: Tensor, valid: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Π w·r over what is valid: any factor of 0 kills the reward."""
    counted = valid & (weights != 0)
    return (weights * scores).where(counted, 1.0).prod(1).where(counted.any(1), 0.0), counted.any(1)


MODES = {"sum": weighted_sum, "min": worst_case, "product": product}
"""`combine.mode` → function."""


def routed(values: list[object], when: str | None) -> list[bool]:
    """Which rows a reward scores, by the value of the routing column: all of them where it names none."""
    return [when is None or str(value) == when for value in values]
