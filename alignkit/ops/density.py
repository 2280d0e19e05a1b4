"""Which of two sets a text comes from: features and a classifier, both deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

BUCKETS = 512
"""Features of a text: token ids modulo this."""
NEWTON_STEPS, CONVERGED = 50, 1e-9
"""At most so many, until no weight moves further; a dozen do, also for large features of sets that do not overlap."""


def count_tokens(texts: Sequence[Sequence[int]]) -> Tensor:
    """[n, BUCKETS] unit vectors: how often each token id occurs in a text."""
    counts = [torch.bincount(torch.tensor(text) % BUCKETS, minlength=BUCKETS) for text in texts]
    return normalize(torch.stack(counts).double(), dim=1)


def fit_classifier(features: Tensor, positive: Tensor) -> Tensor:
    """Ridge logistic regression by Newton's method, float64.

    Args: [n, d] features, [n] booleans; returns [d + 1] weights, the intercept last.
    """
    x = _with_intercept(features)
    ridge = torch.ones(x.shape[1], dtype=torch.float64)
    weights = torch.zeros_like(ridge)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - positive.double()) + ridge * weights
        move = torch.linalg.solve((x.T * (p * (1 - p))) @ x + torch.diag(ridge), gradient)
        weights = weights - move
        if move.abs().max() < CONVERGED:
            break
    return weights


def odds(features: Tensor, weights: Tensor) -> Tensor:
    """p/(1 − p) of the positive set, [n]: the ratio of both densities where the classifier saw equally many of each."""
    return (_with_intercept(features) @ weights).exp()


def _with_intercept(features: Tensor) -> Tensor:
    return torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
