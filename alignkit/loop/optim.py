"""Optimizer and learning-rate schedule of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from alignkit.loop.config import TrainConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig, critic: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW; weight decay spares biases and one-dimensional weights (norms). `critic` has a rate of its own."""
    own = list(critic)
    others = {id(p) for p in own}
    policy = [p for p in parameters if id(p) not in others]
    groups = [
        {"params": [p for p in trained if (p.ndim >= 2) == decays], "weight_decay": decay, "lr": rate}
        for trained, rate in ((policy, config.learning_rate), (own, config.critic_rate))
        for decays, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate_factor(step: int, config: TrainConfig, total_steps: int) -> float:
    """What step `step` (from 0) multiplies the learning rate by: linear warm-up, then the named curve down to 0."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.lr_scheduler == "linear":
        return max(0.0, 1.0 - done)
    if config.lr_scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """The schedule of the run. `constant` warms up too when the recipe asks: elsewhere that is silently ignored."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, config, total_steps))
