"""Adaptive Exploration Policy Optimization: the bundle under which several answers in one are paid for. 2025,
arXiv 2508.05731.

    A_i = r_i − mean of the others;   loss = the clipped surrogate, 1 − 0.2 to 1 + 0.4, over all tokens, without a KL

What it explores by is the reward, `aer` or `aer_point`, and prompts that ask for several answers, the data operation
`multi_answer_prompt`. Deviations: see those rewards.
"""

from __future__ import annotations

from alignkit.algorithms.grpo import GRPO
from alignkit.core import register

register.algorithm("aepo", advantage="rloo", aggregation="token_mean", epsilon_low=0.2, epsilon_high=0.4, beta=0.0)(
    GRPO
)
