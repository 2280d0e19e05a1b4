"""The gated feed-forward of Llama's block, keeping less for backward, in place of a model's own while a call lasts.

    y = W_down (silu(g) ⊙ u) + b        g = W_gate x, u = W_up x

Autograd keeps g, u, silu(g) and silu(g) ⊙ u. Here g and u are kept, and backward computes the other two again: two
cheap passes between large matrix products. A `down_proj` that is more than weights and a bias (an adapter, quantized
weights) is called as it is, and keeps its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu
from transformers.activations import SiLUActivation

from alignkit.models.attention import autocast

NAMES = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
"""transformers' modules that compute this formula."""


@contextmanager
def light_feed_forwards(model: Any) -> Iterator[None]:
    """Within, gated feed-forwards of a transformers model keep less for backward; other modules do as ever.

    Where layers run again in backward nothing changes: they would have to be found there as they were.
    """
    name = "is_activation_checkpointing"  # its name before transformers 5.20 warns in later ones
    again = getattr(model, name if hasattr(type(model), name) else "is_gradient_checkpointing") and model.training
    found = [] if again else [module for module in model.modules() if _is_gated(module)]
    for module in found:
        module.forward = partial(_feed_forward, module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _is_gated(module: Any) -> bool:
    kind = type(module)
    if kind.__name__ not in NAMES or not kind.__module__.startswith("transformers.models."):
        return False
    return type(module.act_fn) in (SiLUActivation, nn.SiLU) and "forward" not in vars(module)


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    """[…, hidden] → […, hidden]."""
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    if type(down) is not nn.Linear:
        product: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
        return down(product)  # type: ignore[no-any-return]
    bias = () if down.bias is None else (down.bias,)
    out: Tensor = _GatedLinear.apply(*autocast(gate, up, down.weight, *bias))  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    """gate and up [*, F] → silu(gate) ⊙ up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


class _GatedLinear(torch.autograd.Function):
    """gate and up [*, F], weight [H, F], bias [H] → weight (silu(gate) ⊙ up) + bias, [*, H]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate).mul_(up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        _, _, trains, *bias_trains = ctx.needs_input_grad
        activated, rows = silu(gate), grad.flatten(0, -2)
        weight_grad = rows.t() @ (activated * up).flatten(0, -2) if trains else None
        bias_grad = [rows.sum(0) if wanted else None for wanted in bias_trains]
        product_grad = grad @ weight
        up_grad = activated.mul_(product_grad)
        gate_grad = torch.ops.aten.silu_backward(product_grad.mul_(up), gate)
        return gate_grad, up_grad, weight_grad, *bias_grad
