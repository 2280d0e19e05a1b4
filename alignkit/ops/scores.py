"""What is done with scores of reward models: errors, calibration, and several models' scores made one.

Shapes: any, elementwise unless said; M members stand in the last dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["mean", "median", "min", "mean_std", "uwo"]


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(r − a)², elementwise. Source: arXiv 2406.08673."""
    return (prediction - target).square()


def discounted(outcome: float, steps: int, gamma: float) -> list[float]:
    """γ^(T−t)·outcome for t = 1 … T: the last step is worth the outcome. Reconstructed from arXiv 2510.01167."""
    return [outcome * gamma ** (steps - 1 - step) for step in range(steps)]


def calibration_gaps(probability: Tensor, label: Tensor, bins: int) -> list[Tensor]:
    """Confidence minus hit where the confidence falls into a bin, 0 elsewhere; one tensor a bin.

    The confidence is max(p, 1 − p), in equal bins from ½ to 1, and the hit how true the likelier side is: which side of
    a pair stands first says nothing. The expected calibration error is Σ over bins |mean|.

    Args: probabilities, labels in [0, 1].
    """
    confidence = torch.maximum(probability, 1 - probability)
    hit = torch.where(probability >= 0.5, label, 1 - label).where(probability != 0.5, 0.5)
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [(confidence - hit).where(place == k, 0.0) for k in range(bins)]


def standardize(scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(s − mean) / std of each member on a fixed sample, [..., M], [M], [M] → [..., M]; a std of 0 divides nothing."""
    return (scores - mean) / std.where(std > 0, 1.0)


def aggregate_scores(scores: Tensor, how: Aggregate, coef: float = 0.5) -> Tensor:
    """[..., M] → [...]: one score of those of all members.

    mean; median, between the middle two of an even number; min; mean_std, the mean − coef·standard deviation; uwo, the
    mean − coef·variance, both with 1/M. Source: arXiv 2310.02743, arXiv 2312.09244.
    """
    match how:
        case "mean":
            return scores.mean(-1)
        case "median":
            return scores.quantile(0.5, dim=-1)
        case "min":
            return scores.amin(-1)
        case "mean_std":
            return scores.mean(-1) - coef * scores.std(-1, correction=0)
        case "uwo":
            return scores.mean(-1) - coef * scores.var(-1, correction=0)
