"""Which token comes next: the distribution that is drawn from, and the draw. Pure functions of logits."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignkit.rollout.config import SamplingConfig

NUCLEUS = 256
"""So many of the likeliest tokens are looked at first for those that reach `top_p`; most often they do."""
STRIDE = 256
"""Tokens whose probabilities are added up before a draw looks at each."""
BELOW_ONE = 1.0 - 2.0**-52  # keeps `uniform × total` below `total` after rounding


def support_logps(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The distribution that is drawn from: [N, V] logits → [N, V] float64 log-probabilities in nats, -inf off it.

    Temperature, then the `top_k` likeliest, then of those the smallest set whose probability reaches `top_p`, then of
    those what is at least `min_p` times as likely as the likeliest.
    """
    values, tokens = _support(logits, sampling)
    logps = values.double().log_softmax(-1)
    if tokens is None:
        return logps
    return torch.full(logits.shape, -torch.inf, dtype=logps.dtype, device=logps.device).scatter(-1, tokens, logps)


def draw(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF, in the order of token ids: first which stretch of them, then which one of it.

    Args: `logits` [N, V]; `uniforms` [N] float64 in [0, 1). Returns: tokens [N] and their log-probabilities [N] in
    nats on the support that was drawn from.
    """
    values, tokens = _support(logits, sampling)
    peak = values.amax(-1, keepdim=True)
    weights, short = (values - peak).exp_(), -values.shape[-1] % STRIDE
    weights = (pad(weights, (0, short)) if short else weights).view(len(values), -1, STRIDE)
    sums = weights.sum(-1).double()
    reached = sums.cumsum(-1)
    threshold = uniforms.clamp(max=BELOW_ONE)[:, None] * reached[:, -1:]
    # right=True: the first whose cumulative weight *exceeds* the threshold, so never one of probability 0
    stretch = torch.searchsorted(reached, threshold, right=True)
    total = sums.gather(-1, stretch)
    share = (threshold - (reached.gather(-1, stretch) - total)) / total
    inside = weights.gather(1, stretch[..., None].expand(-1, -1, STRIDE)).squeeze(1).double().cumsum(-1)
    place = torch.searchsorted(inside, share.clamp(0.0, BELOW_ONE) * inside[:, -1:], right=True)
    drawn = stretch * STRIDE + place
    logps = values.gather(-1, drawn).double() - peak.double() - reached[:, -1:].log()
    return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1), logps.squeeze(-1)


def _support(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """What may be drawn: [N, V] logits → [N, C] log-probabilities up to a constant, -inf for what may not, and the ids
    [N, C] of their tokens, ascending; None = all tokens."""
    values = logits if logits.dtype == torch.float64 else logits.float()
    tokens = None
    if sampling.temperature == 0:
        tokens = values.argmax(-1, keepdim=True)
        return torch.zeros_like(tokens, dtype=values.dtype), tokens
    if sampling.temperature != 1:
        values = values / sampling.temperature
    if 0 < sampling.top_k < values.shape[-1]:
        values, tokens = values.topk(sampling.top_k)
    if sampling.top_p < 1:
        values, likeliest = _nucleus(values, sampling.top_p)
        tokens = likeliest if tokens is None else tokens.gather(-1, likeliest)
    if sampling.min_p > 0:
        values = values.masked_fill(values < values.amax(-1, keepdim=True) + log(sampling.min_p), -torch.inf)
    if tokens is not None:
        # In the order of ids: tokens almost equally likely must not change places with the last bit of their logits.
        tokens, order = tokens.sort(-1)
        values = values.gather(-1, order)
    return values, tokens


def _nucleus(values: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest of [N, C] values, [N, D] and where they stood, -inf behind those that reach `top_p` together."""
    total = values.logsumexp(-1, keepdim=True)
    count, most = min(NUCLEUS, values.shape[-1]), values.shape[-1]
    while True:
        likeliest, places = values.topk(count)
        shares = (likeliest - total).double().exp()
        reached = shares.cumsum(-1)
        if count == most or bool((reached[:, -1] >= top_p).all()):
            return likeliest.masked_fill(reached - shares >= top_p, -torch.inf), places
        count = most
