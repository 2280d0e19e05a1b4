"""Pairwise preferences: losses of margins and of log-ratios, and what may be done to those before.

Shapes: U pairs, N = 2U rows, chosen and rejected side by side, L tokens. Log-probabilities are in nats.
"""

from __future__ import annotations

from math import log, log1p

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST_EXPONENT = 80.0
"""e^80 is still a float32; log-ratios beyond it have no gradient."""
LARGEST_MEAN = -1e-6
"""A mean log-probability of 0 would have infinite odds."""


def logistic_pair(margin: Tensor, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """−(1−ε)·log σ(m) − ε·log σ(−m), elementwise.

    Args:
        margin: [U] scaled difference between chosen and rejected (dimensionless).
        label_smoothing: ε in [0, ½], the believed share of turned labels; a scalar or [U].

    Source: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; ε: Mitchell's conservative DPO note, 2023.
    """
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def robust_pair(margin: Tensor, label_smoothing: float) -> Tensor:
    """[−(1−ε)·log σ(m) + ε·log σ(−m)] / (1−2ε), elementwise; may be negative. Source: arXiv 2403.00409."""
    right, wrong = -logsigmoid(margin), -logsigmoid(-margin)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge_pair(margin: Tensor) -> Tensor:
    """max(0, 1 − m), elementwise. Source: arXiv 2309.06657."""
    return (1 - margin).clamp(min=0)


def square_pair(difference: Tensor, beta: float) -> Tensor:
    """(h − 1/(2β))², elementwise, of a difference of log-ratios in nats. Source: arXiv 2310.12036, eq. 17."""
    return (difference - 1 / (2 * beta)).square()


def exo_pair(margin: Tensor, label_smoothing: float) -> Tensor:
    """KL(q ‖ 1−ε) of two outcomes with q = σ(m), elementwise; 0 < ε < 1. Source: arXiv 2402.00856, eq. 16."""
    right, wrong = logsigmoid(margin), logsigmoid(-margin)
    return right.exp() * (right - log1p(-label_smoothing)) + wrong.exp() * (wrong - log(label_smoothing))


def discopop_pair(margin: Tensor, tau: float) -> Tensor:
    """(1−g)·(−log σ(m)) + g·e^−m with g = σ(m/τ), elementwise. Source: arXiv 2406.08414, eq. 5."""
    gate = logsigmoid(margin / tau)
    # e^−m alone overflows where its share g has long vanished
    return -torch.sigmoid(-margin / tau) * logsigmoid(margin) + torch.exp(gate - margin)


def nca_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r_w) − ½·log σ(−r_w) − ½·log σ(−r_l) of implicit rewards [U]. Source: arXiv 2402.05369."""
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def bco_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r_w) − log σ(−r_l) of implicit rewards [U]: no shift between the two. Source: arXiv 2404.04656."""
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_pair(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))² of log-ratios [U]. Source: arXiv 2405.00675, eq. 4.7 with P = 1 and 0."""
    return (chosen - 1 / (2 * beta)).square() + (rejected + 1 / (2 * beta)).square()


def apo_zero_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 − σ(r_w) + σ(r_l) of implicit rewards [U]. Source: arXiv 2408.06266, eq. 7."""
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """σ(r_w) + 1 − σ(r_w − r_l) of implicit rewards [U]. Source: arXiv 2408.06266, eq. 8."""
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def divergence_score(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f′(e^Δ) up to a constant: what stands for a log-ratio Δ under another divergence, elementwise.

    Args:
        log_ratio: Δ in nats.
        divergence: reverse_kl (Δ itself), forward_kl, js or alpha.
        alpha: the order of the α-divergence; near 1 it is reverse_kl.

    Source: arXiv 2309.16240.
    """
    match divergence:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return 1 - (-log_ratio).clamp(max=LARGEST_EXPONENT).exp()
        case "js":
            return log(2) + logsigmoid(log_ratio)
        case "alpha" if abs(alpha - 1) < 1e-6:
            return log_ratio
        case "alpha":
            return ((alpha - 1) * log_ratio).clamp(max=LARGEST_EXPONENT).expm1() / (alpha - 1)
    raise ValueError(f"unknown divergence {divergence!r}")


def tail_weights(mask: Tensor, alpha: float) -> Tensor:
    """[N, L] → [N, L]: 1 on as many tokens as the shorter answer of a pair has, `alpha` on those beyond.

    Source: arXiv 2409.06411.
    """
    shared = mask.sum(-1).reshape(-1, 2).amin(1).repeat_interleave(2)
    return torch.where(mask.cumsum(-1) > shared[:, None], alpha, 1.0)


def log_sum_squares(logits: Tensor) -> Tensor:
    """[..., V] → [...]: log Σ_v π(v)², how likely two draws agree, without gradient and in float32 at least."""
    scores = logits.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return (2 * scores).logsumexp(-1) - 2 * scores.logsumexp(-1)


def wpo_weights(logps: Tensor, log_sum_squares: Tensor, mask: Tensor) -> Tensor:
    """[N, L] each → [N]: exp of the mean over the answer of log π(token) − log Σ_v π(v)², without gradient.

    Source: arXiv 2406.11827, eq. 2: how much a row looks like a sample of the policy.
    """
    aligned = (logps - log_sum_squares).detach().where(mask, 0.0)
    return (aligned.sum(-1) / mask.sum(-1).clamp(min=1)).exp()


def same_rank(mine: Tensor, others: Tensor) -> Tensor:
    """[U], [U] → [U]: for each of `mine` the one of `others` that stands at the same place when both are sorted."""
    return others.sort().values[mine.argsort(stable=True).argsort()]


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 − p)) with p = e^m, elementwise, of mean log-probabilities in nats. Source: arXiv 2403.07691."""
    m = mean_logps.clamp(max=LARGEST_MEAN)
    # each branch where it keeps its digits; both are finite everywhere
    rest = torch.where(m > -log(2), (-m.expm1()).log(), (-m.exp()).log1p())
    return m - rest


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """−(1−ε)·log σ(d) − ε·log σ(−d) with d = r_w − r_l − m, elementwise, of scores.

    Args:
        chosen, rejected: scores of the better and the worse answer.
        margin: m, how much better the one is asked to be; None = 0.
        label_smoothing: ε in [0, ½].

    Source: Bradley and Terry 1952; m: Touvron et al. 2023 (arXiv 2307.09288), eq. 2.
    """
    difference = chosen - rejected
    return logistic_pair(difference if margin is None else difference - margin, label_smoothing)


def peer_select(margins: Tensor, keep: int) -> Tensor:
    """[B] → [keep]: the places of the largest margins, in ascending order; of equal ones the earlier.

    Source: arXiv 2505.10597, in the form of co-teaching.
    """
    return margins.argsort(descending=True, stable=True)[:keep].sort().values
