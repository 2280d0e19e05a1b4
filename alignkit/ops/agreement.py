"""How far several models of preference agree on pairs of answers: M models, U pairs, logits z = logit p, dimensionless.

Everything is computed from log-sigmoids, so that nothing is lost where a probability is near 0 or 1.
"""

from __future__ import annotations

from itertools import combinations
from math import inf, log1p

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """H(σ(z)) in nats, elementwise: 0 to log 2, the latter at z = 0."""
    yes, no = logsigmoid(logits), logsigmoid(-logits)
    return -yes.exp() * yes - no.exp() * no


def bernoulli_symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """½·[KL(p‖q) + KL(q‖p)] with p = σ(first), q = σ(second), in nats, elementwise.

    The sum of both is (p − q)·(first − second): 0 to the last bit, with its gradient, where the logits are equal.
    """
    return (logsigmoid(first).exp() - logsigmoid(second).exp()) * (first - second) / 2


def inconsistency(logits: Tensor, entropy_weight: float) -> Tensor:
    """[M, U] → [U]: mean symmetric KL of all pairs of models, and `entropy_weight` times their mean entropy, in nats.

    Source: reconstructed after arXiv 2502.08922.
    """
    entropy = bernoulli_entropy(logits).mean(0)
    couples = list(combinations(logits, 2))
    apart = sum((bernoulli_symmetric_kl(*couple) for couple in couples), torch.zeros_like(entropy))
    return apart / max(1, len(couples)) + entropy_weight * entropy


def consensus(logits: Tensor, confidence: float) -> tuple[Tensor, Tensor, Tensor]:
    """[M, U] → three of [U]: the sign of the mean logit (−1, 0 or 1); whether all models say the same, and neither 0;
    and whether moreover each has |2p − 1| of `confidence` and more, which nothing has at 1.

    Source: reconstructed after arXiv 2502.08922.
    """
    signs = logits.sign()
    same = (signs == signs[0]).all(0) & (signs[0] != 0)
    # on logits: in float32 p is 1 from a logit of 17 on
    least = inf if confidence >= 1 else log1p(confidence) - log1p(-confidence)
    return logits.mean(0).sign(), same, same & (logits.abs() >= least).all(0)
