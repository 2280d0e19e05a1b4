"""Losses of a policy on answers that an older one wrote, divergence from a reference, and the critic's loss.

Shapes: N rows, L tokens; log-probabilities in nats. Nothing is averaged over rows. Advantages, old log-probabilities
and those of the reference carry no gradient; advantages have the shape of the ratios they meet.
"""

from __future__ import annotations

from math import log
from typing import Literal

import torch
from torch import Tensor

from alignkit.ops.reduce import sequence_mean, sequence_sum

KLEstimator = Literal["k1", "abs", "k2", "k3"]

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are cut off here before they are exponentiated, and have no gradient beyond."""
LARGEST_K3 = 10.0
"""k3 grows like the ratio itself; what is above has no gradient."""
SMALLEST_LOG_WEIGHT = log(1e-8)
"""Of an answer's weight in VESPO."""


def log_ratios(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """ℓ − ℓ_old at each token, [N, L] each → [N, L], 0 outside the mask, not cut off."""
    return (logps - old_logps).where(mask, 0.0)


def token_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """π/π_old of each token, [N, L] each → [N, L], 1 outside the mask. Source: arXiv 1707.06347."""
    return _ratio(log_ratios(logps, old_logps, mask))


def sequence_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of an answer's token ratios, [N, L] each → [N]. Source: arXiv 2507.18071."""
    return _ratio(sequence_mean(logps - old_logps, mask))


def sum_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """π/π_old of a whole answer, the product over its tokens, [N, L] each → [N]. Source: arXiv 2402.14740."""
    return _ratio(sequence_sum(logps - old_logps, mask))


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    *,
    upper: float | None = None,
    dual: float | None = None,
) -> Tensor:
    """−min(ρA, clip(ρ, 1−low, 1+high)·A), elementwise.

    Args:
        ratio: ρ, of tokens [N, L] or rows [N].
        low, high: how far below and above 1 a ratio still counts.
        upper: bound of the unclipped ρ too, so that a negative advantage has no unbounded loss; None = no bound.
        dual: c > 1; for A < 0 the loss is at most −c·A; None = no bound.

    Source: arXiv 1707.06347, eq. 7; high apart from low: 2503.14476; upper: 2505.07291; dual: 1912.09729.
    """
    bounded = ratio if upper is None else ratio.clamp(max=upper)
    value = torch.maximum(-advantages * bounded, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual is None:
        return value
    return torch.where(advantages < 0, torch.minimum(value, -advantages * dual), value)


def clip_hits(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where the clip stops the gradient: below 1 − low with A < 0, above 1 + high with A > 0; booleans, elementwise."""
    return (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)


def cispo_surrogate(logps: Tensor, ratio: Tensor, advantages: Tensor, clip_max: float) -> Tensor:
    """−min(ρ, clip_max)·A·ℓ with no gradient through ρ, elementwise: a clipped token still teaches.

    Args: `clip_max` bounds the ratio itself, and there is no lower bound.

    Source: arXiv 2506.13585.
    """
    return -ratio.detach().clamp(max=clip_max) * advantages * logps


def sapo_surrogate(ratio: Tensor, advantages: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """−A·σ(τ(ρ − 1))·4/τ, elementwise: a soft clip whose slope at ρ = 1 is that of −A·ρ.

    Args: τ is `tau_positive` for A > 0, `tau_negative` otherwise.

    Source: arXiv 2511.20347.
    """
    tau = torch.where(advantages > 0, ratio.new_tensor(tau_positive), ratio.new_tensor(tau_negative))
    return -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def gmpo_surrogate(
    logps: Tensor, old_logps: Tensor, mask: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """−A·exp(mean of clipped log-ratios), [N, L] each and [N] → [N]: the geometric mean in place of the arithmetic one.

    Args:
        low, high: bounds of a token's log-ratio, −low and high in nats; as in the clip, only where it would gain.

    Source: arXiv 2507.20673.
    """
    ratio = log_ratios(logps, old_logps, mask)
    sign = advantages.sign()[:, None]
    clipped = sign * torch.minimum(sign * ratio, sign * ratio.clamp(-low, high))
    return -advantages * _ratio(sequence_mean(clipped, mask))


def vespo_weight(
    logps: Tensor,
    old_logps: Tensor,
    mask: Tensor,
    advantages: Tensor,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """φ(w) = e^(λ − λw)·w^k with w = π/π_old of a whole answer, [N, L] each → [N, L], without gradient; φ(1) = 1.

    Args: (k, λ) are `positive` for A ≥ 0, `negative` otherwise.

    Source: arXiv 2602.10693.
    """
    tokens = log_ratios(logps, old_logps, mask).detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    log_weight = tokens.sum(-1, keepdim=True).clamp(SMALLEST_LOG_WEIGHT, LARGEST_LOG_RATIO)
    power, decay = (
        torch.where(advantages >= 0, logps.new_tensor(up), logps.new_tensor(down))
        for up, down in zip(positive, negative, strict=True)
    )
    return (decay + power * log_weight - decay * log_weight.exp()).exp()


def vespo_surrogate(
    logps: Tensor,
    old_logps: Tensor,
    mask: Tensor,
    advantages: Tensor,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """−φ(w)·A·ℓ with the weight of `vespo_weight`, [N, L] each → [N, L]. Source: arXiv 2602.10693."""
    return -vespo_weight(logps, old_logps, mask, advantages, positive, negative) * advantages * logps


def luspo_surrogate(ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """The clipped surrogate of whole answers, each as often as it has tokens, [N], [N], [N, L] → [N].

    Args: the ratio is that of `sequence_ratio`.

    Source: arXiv 2602.05261.
    """
    return clipped_surrogate(ratio, advantages, low, high) * mask.sum(-1)


def kl_estimate(
    logps: Tensor, reference: Tensor, estimator: KLEstimator, *, largest: float | None = LARGEST_K3
) -> Tensor:
    """What a token says of KL(π ‖ π_ref), in nats, elementwise; d = ℓ_ref − ℓ.

    k1: −d. abs: |d|. k2: d²/2. k3: e^d − d − 1, with d cut off at ±20 and the value at `largest` (None = not at all).
    The gradient of k3 is not that of the KL: in a reward, use k1.

    Source: Schulman, "Approximating KL divergence", 2020; k3 in a loss: arXiv 2402.03300.
    """
    match estimator:
        case "k1":
            return logps - reference
        case "abs":
            return (logps - reference).abs()
        case "k2":
            return (logps - reference).square() / 2
        case "k3":
            away = (reference - logps).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
            value = away.expm1() - away  # e^d − d − 1 would cancel to nothing near 0
            return value if largest is None else value.clamp(max=largest)
    raise ValueError(f"unknown KL estimator {estimator!r}")


def adapted_coefficient(coefficient: float, kl: float, target: float, sequences: int, horizon: float) -> float:
    """κ·(1 + clip(KL/target − 1, ±0.2)·sequences/horizon): the KL coefficient after an update.

    Args:
        kl, target: mean over answers of the sum over tokens, in nats.
        sequences: answers in the update; `horizon` counts in the same.

    Source: arXiv 1909.08593.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * sequences / horizon)


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor, clip: float | None) -> Tensor:
    """½·max((v − G)², (clip(v, V ± ε) − G)²), elementwise; without ε (None) ½(v − G)².

    Args: v of the critic, V of the critic that valued the answers, G the returns; all in units of the reward.

    Source: arXiv 1707.06347 in the form of its authors' code.
    """
    square = (values - returns).square()
    if clip is None:
        return square / 2
    return torch.maximum(square, (_near(values, old_values, clip) - returns).square()) / 2


def value_hits(values: Tensor, returns: Tensor, old_values: Tensor, clip: float) -> Tensor:
    """Where the clip of `value_loss` makes the loss larger and stops its gradient; booleans, elementwise."""
    return (_near(values, old_values, clip) - returns).square() > (values - returns).square()


def _near(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    return values.clamp(old_values - clip, old_values + clip)
