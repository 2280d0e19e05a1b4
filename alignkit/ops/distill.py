"""Learning from whole distributions over the next token: teachers made of logits, and how far a student is from them.

Shapes: logits [..., V] of V tokens, in float32 at least; whatever is computed of them [...], in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def same_vocabulary(*logits: Tensor) -> tuple[Tensor, ...]:
    """[..., V] each, of sizes V that may differ → the tokens all of them have, in float32 at least.

    Checkpoints of one family pad their vocabulary differently, and logits that are extrapolated overflow bfloat16.
    """
    size = min(x.shape[-1] for x in logits)
    return tuple((x if x.dtype == torch.float64 else x.float())[..., :size] for x in logits)


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Σ_v |p(v) − q(v)| of two models' logits, [..., V] each → [...] from 0 to 2. Source: arXiv 2503.02832."""
    return (first.softmax(-1) - second.softmax(-1)).abs().sum(-1)


def extrapolated(anchor: Tensor, toward: Tensor, away: Tensor, weight: Tensor) -> Tensor:
    """z + w·(z_toward − z_away), logits [..., V] and weights [...] → logits. Source: arXiv 2503.02832."""
    return anchor + weight[..., None] * (toward - away)


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student ‖ teacher) over the whole vocabulary, logits [..., V] each → [...], with gradient through both."""
    log_p = student.log_softmax(-1)
    return (log_p.exp() * (log_p - teacher.log_softmax(-1))).sum(-1)


def expected_log_ratio(model: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Σ_v p(v)·log(p_first(v) / p_second(v)) of the next token a model writes, logits [..., V] each → [...]."""
    return (model.softmax(-1) * (first.log_softmax(-1) - second.log_softmax(-1))).sum(-1)
