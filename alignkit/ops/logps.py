"""Logits → log-probabilities. The one place where position t of the logits meets token t + 1."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted(logits: Tensor) -> Tensor:
    """[N, L, V] → [N, L, V] with `shifted(logits)[n, t]` predicting tokens[n, t]; row 0 predicts nothing and is 0."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], dim=1)


def token_logps(
    logits: Tensor, tokens: Tensor, mask: Tensor, *, entropy: bool = False, correct: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probability of each masked token, and on demand entropy and top-1 hits, all [N, L].

    Args:
        logits: [N, L, V]; position t predicts token t + 1. Upcast to float32 (float64 stays).
        tokens: [N, L] ids.
        mask: [N, L] bool, True where the *token* is wanted; column 0 has no prediction and must be False.

    Returns:
        logps in nats with `logps[n, t] = log p(tokens[t] | tokens[<t])`, 0 outside the mask; entropy in nats; correct
        (1.0 where the most likely token was the right one).

    Raises:
        ValueError: the mask asks for the first token, which nothing predicts.

    Only masked positions are expanded to the vocabulary in float32, so prompts and padding cost nothing here.
    """
    if mask.shape[1] == 0 or bool(mask[:, 0].any()):
        raise ValueError("the first token of a row has no prediction: its mask must be False")
    wanted = mask[:, 1:]
    picked = logits[:, :-1][wanted]  # [S, V]
    picked = picked if picked.dtype == torch.float64 else picked.float()
    targets = tokens[:, 1:][wanted]  # [S]
    normaliser = picked.logsumexp(-1)
    values = picked.gather(-1, targets[:, None]).squeeze(-1) - normaliser

    def scatter(x: Tensor) -> Tensor:
        full = x.new_zeros(mask.shape)
        return full.masked_scatter(mask, x)

    ent = None
    if entropy:
        with torch.no_grad():
            logp = picked - normaliser[:, None]
            ent = scatter(-(logp.exp() * logp.where(logp > -1e30, 0.0)).sum(-1))
    hits = scatter((picked.detach().argmax(-1) == targets).to(values.dtype)) if correct else None
    return scatter(values), ent, hits
