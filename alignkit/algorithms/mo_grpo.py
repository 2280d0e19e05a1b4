"""Multi-objective GRPO with the attributes of a regression reward model. 2025, arXiv 2503.21819.

    A = (Σ_k w_k·A_k) / its standard deviation over the batch,   A_k = (r_k − mean of the prompt) / std of the prompt

Deviation: the paper adds up rewards before they are compared, so that the attribute of the largest scale decides; here
each is compared first, and does not. The paper's form is `grpo` on one reward model with `goal` weights.
"""

from __future__ import annotations

from dataclasses import replace

from alignkit.algorithms.grpo import GRPO
from alignkit.core import register


@register.algorithm("mo_grpo", min_std=1e-6)
class MoGRPO(GRPO):
    """grpo on several rewards, each compared in its group before they are added up."""

    needs = replace(GRPO.needs, combine={"level": "advantage", "mode": "sum"})
