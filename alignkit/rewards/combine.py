"""Several rewards made one. Pure functions of scores and what is valid [B, K], and of weights [K] or [B, K].

Each returns the reward [B] and where there is one [B]. A reward that is not valid, or weighs 0, takes no part: its
score is not even read, so that nan behind a weight of 0 changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import DataError

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


def along(scores: Tensor, valid: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w·r where all that weighs is valid: two sums of different rewards could not be compared."""
    counted = weights != 0
    known = (valid | ~counted).all(1) & counted.any(1)
    return (weights * scores).where(counted & known[:, None], 0.0).sum(1), known


def directed(weights: Tensor, directions: Sequence[Any], ids: Sequence[str]) -> Tensor:
    """[K] weights and B vectors, one entry for each weight but those of 0 → [B, K], the vectors at length 1.

    Source: arXiv 2402.18571. Raises DataError where a vector is none; `ids` [B] name its row.
    """
    used = weights != 0
    found = weights.repeat(len(directions), 1)
    for row, (value, name) in enumerate(zip(directions, ids, strict=True)):
        vector = weights.new_tensor(check_direction(value, int(used.sum()), name))
        found[row, used] *= vector / vector.norm()
    return found


def check_direction(value: Any, size: int, name: str) -> list[float]:
    """The column `direction` of the group `name`: so many numbers. Raises DataError."""
    numbers = isinstance(value, list) and all(isinstance(x, (int, float)) and math.isfinite(x) for x in value)
    if not numbers or len(value) != size or not any(value):
        raise DataError(
            f"combine.mode direction: group {name!r} has {str(value)[:60]} in the column 'direction', expected "
            f"{size} numbers, not all 0, one for each reward whose weight is not 0, in the recipe's order; "
            "the operation `direction` writes two"
        )
    return [float(x) for x in value]


MODES = {"sum": weighted_sum, "min": worst_case, "product": product, "direction": along}
"""`combine.mode` → function."""


def routed(values: list[object], when: str | None) -> list[bool]:
    """Which rows a reward scores, by the value of the routing column: all of them where it names none."""
    return [when is None or str(value) == when for value in values]
