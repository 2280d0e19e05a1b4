"""Layers as plain matrices, adapters worked in: for those who multiply by them many times between two updates."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


def read_affine(layer: Any) -> tuple[Tensor, Tensor | None]:
    """What a layer computes, as weights [out, in] and bias [out]; LoRA adapters that are on are added to the weights.

    Raises:
        ValueError: the layer is something else, or its adapter is, or the sum would round the adapter away.
    """
    if type(layer) is nn.Linear:
        return layer.weight, layer.bias
    if type(layer) is not LoraLinear:
        raise ValueError(f"{type(layer).__module__}.{type(layer).__qualname__} is not a plain linear layer")
    weight, bias = read_affine(layer.base_layer)
    active = [] if layer.disable_adapters or layer.merged else [x for x in layer.active_adapters if x in layer.lora_A]
    for name in active:
        if name in layer.lora_variant or layer.lora_B[name].bias is not None:
            raise ValueError(f"its adapter {name!r} is more than the product of two matrices")
        if weight.element_size() < layer.lora_A[name].weight.element_size():
            raise ValueError(f"{str(weight.dtype).removeprefix('torch.')} weights are too coarse to add its adapter to")
        weight = weight + layer.get_delta_weight(name)
    return weight, bias
