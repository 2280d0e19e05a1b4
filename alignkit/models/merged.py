"""A model written as others load it while it goes on training: adapters worked in, heads mixed, nothing of it moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor

from alignkit.core.errors import RecipeError
from alignkit.models.heads import detached, mixed


def save_merged(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """A folder that plain transformers and vLLM load, its weights in `dtype`; sums are made in float32.

    Raises:
        RecipeError: an adapter is more than the product of two matrices.
    """
    with mixed(model), detached(model):
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        weights = {name: _as(tensor, dtype) for name, tensor in _merged(plain).items()}
        plain.save_pretrained(folder, state_dict=weights)


def _merged(model: Any) -> dict[str, Tensor]:
    """Every weight under the name it has without adapters, with the active ones added."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in layers)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    whole = [name for name, layer in model.named_modules() if isinstance(layer, AuxiliaryTrainingWrapper)]
    for name, layer in layers.items():
        weights |= {f"{name}.{part}": tensor for part, tensor in layer.get_base_layer().state_dict().items()}
        if not isinstance(layer, LoraLayer) or layer.lora_variant or any(layer.lora_bias.values()):
            whole.append(name)
        else:
            for adapter in set(layer.active_adapters) & {*layer.lora_A, *layer.lora_embedding_A}:
                weights[f"{name}.weight"] = weights[f"{name}.weight"].float() + layer.get_delta_weight(adapter).float()
    if whole:
        raise RecipeError(
            f"model.name_or_path: the adapter of {whole[0]} is more than LoRA's two matrices, which only the model "
            "itself can write with: rollout.engine: native, or export the adapter merged and train from that"
        )
    return weights


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
