"""Pareto Multi-Objective Alignment: what all rewards agree on is reinforced. 2025, arXiv 2508.07768.

    a_k = max(A_k, 0),  A_k the advantage of reward k in its group        ("Noon", no negative ones)
    A   = the point nearest 0 between min_k a_k and max_k a_k = min_k a_k
    loss = grpo's of A, with β·KL beside it

The recipe's `combine` says how advantages are merged. Deviations: the clip is against the policy that wrote the
answers, where the paper's text has the reference; each reward is standardised in its group first, since a minimum
depends on scales. Where rewards are compared, at each token or answer or in one mean of the batch, is reconstructed.
"""

from __future__ import annotations

from dataclasses import replace

from alignkit.algorithms.grpo import GRPO
from alignkit.core import register


@register.algorithm("pama")
class Pama(GRPO):
    """grpo on the advantage that all rewards agree on."""

    needs = replace(GRPO.needs, combine={"level": "advantage", "mode": "pama"})
