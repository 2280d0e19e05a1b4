"""What may stand on a backbone besides its own output layer: several output layers, score layers, several models.

Modules that transformers' classes do not know are attached to the model under `EXTRA` and saved in `HEADS_FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignkit.core.contracts import Heads
from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.rng import key

EXTRA = "alignkit_heads"
HEADS_FILE = "heads.safetensors"
MEMBER = "member-{}"


class Members(nn.Module):
    """Whole models side by side. What the first one's config says holds for all."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    @property
    def config(self) -> Any:
        """The first model's config."""
        return self.models[0].config


class LanguageHeads(nn.Module):
    """Copies of an output layer's weights, one a name, [V, hidden] each."""

    def __init__(self, weight: Tensor, spec: Heads, seed: int) -> None:
        super().__init__()
        self.names = spec.names
        copies = []
        for i in range(len(spec.names)):
            draw = torch.Generator().manual_seed(key(seed, "head", i))
            noise = torch.randn(weight.shape, generator=draw) * spec.noise if spec.noise else 0.0
            copies.append(nn.Parameter(weight.detach().float().clone() + noise))
        self.weights = nn.ParameterList(copies)

    def mixture(self, weights: Sequence[float]) -> Tensor:
        """Σ w·W over the heads, w divided by their sum: the logits of this layer are the mean of all heads' logits.

        Source: arXiv 2510.01167. Raises: ValueError for another number of weights, a negative one, or none above 0.
        """
        if len(weights) != len(self.weights) or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(
                f"head weights {list(weights)}: expected {len(self.weights)} numbers, one each for "
                f"{', '.join(self.names)}, none negative and one above 0"
            )
        total = sum(weights)
        mixed = torch.zeros_like(self.weights[0].detach())
        for share, weight in zip(weights, self.weights, strict=True):
            mixed.add_(weight.detach(), alpha=share / total)
        return mixed


class HiddenScore(nn.Module):
    """hidden → ReLU → one number a name."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, count)

    def forward(self, states: Tensor) -> Tensor:
        """[..., hidden] → [..., count]."""
        scores: Tensor = self.outer(torch.relu(self.inner(states)))
        return scores


def members(bare: Any) -> list[Any]:
    """The models of a policy: one, or those that stand side by side."""
    return list(bare.models) if isinstance(bare, Members) else [bare]


def extra(model: Any) -> Any:
    """The module attached under `EXTRA`, or None."""
    return model._modules.get(EXTRA)


def attach(model: Any, spec: Heads, seed: int) -> None:
    """Put on a model what `spec` asks for beyond transformers' own classes, and choose what trains.

    Raises:
        RecipeError: a frozen backbone with adapters.
    """
    is_peft = hasattr(model, "peft_config")
    if spec.frozen:
        if is_peft:
            raise RecipeError("model.lora: the backbone is frozen (algorithm), so adapters would not train; remove it")
        model.requires_grad_(False)
    if spec.is_language and spec.names:
        layer = model.get_output_embeddings()
        if type(layer) is not nn.Linear:
            raise RecipeError(f"model.name_or_path: several heads need a plain linear output layer, not {type(layer)}")
        if not is_peft:
            untie(model)
        model.add_module(EXTRA, LanguageHeads(layer.weight, spec, seed))
    elif spec.hidden:
        with torch.random.fork_rng():
            torch.manual_seed(key(seed, "score"))
            model.add_module(EXTRA, HiddenScore(model.config.get_text_config().hidden_size, len(spec.names)))
    elif spec.frozen:
        model.score.requires_grad_(True)


def untie(model: Any) -> None:
    """Give the output layer weights of its own, which do not train: what is trained are copies of it."""
    layer = model.get_output_embeddings()
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    model.config.tie_word_embeddings = False


def fresh_score(model: Any, seed: int) -> None:
    """Draw a classifier's score layer anew: N(0, 1/(hidden + 1)), no offset, whatever the library draws."""
    layer: nn.Linear = model.score
    draw = torch.Generator().manual_seed(key(seed, "score"))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw) * (layer.in_features + 1) ** -0.5)
        if layer.bias is not None:
            layer.bias.zero_()


def score_layer(model: Any) -> Any:
    """The module that turns states into scores, in float32."""
    found = extra(model)
    return found if found is not None else model.score


@contextmanager
def output_layer(model: Any, weight: Tensor) -> Iterator[None]:
    """The model with these weights [V, hidden] in its output layer, for a while."""
    layer = model.get_output_embeddings()
    before = layer.weight
    layer.weight = nn.Parameter(weight.to(before.device, before.dtype), requires_grad=False)
    try:
        yield
    finally:
        layer.weight = before


@contextmanager
def mixed(model: Any, weights: Sequence[float] | None = None) -> Iterator[None]:
    """The model as it writes with its heads mixed, evenly when `weights` is None; as it is when it has no heads."""
    heads = extra(model)
    if not isinstance(heads, LanguageHeads):
        yield
        return
    with output_layer(model, heads.mixture(weights if weights is not None else [1.0] * len(heads.names))):
        yield


@contextmanager
def detached(model: Any) -> Iterator[None]:
    """The model without what is attached to it, as transformers knows it."""
    found = model._modules.pop(EXTRA, None)
    try:
        yield
    finally:
        if found is not None:
            model.add_module(EXTRA, found)


def save_heads(model: Any, folder: Path) -> None:
    """Write what is attached to a model, if anything is, into `HEADS_FILE`."""
    found = extra(model)
    if found is None:
        return
    weights = {name: p.detach().cpu().contiguous() for name, p in found.state_dict().items()}
    names = json.dumps(list(getattr(found, "names", ())))
    save_file(weights, folder / HEADS_FILE, metadata={"names": names})


@torch.no_grad()
def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Make weights equal in place: a module that is gathered from several processes cannot be loaded by torch.

    Raises:
        RunFailed: they are not of one model.
    """
    if strangers := sorted(set(source) ^ set(target)):
        raise RunFailed(f"the saved weights are of another model: {strangers[0]!r} is in only one of the two")
    for name, tensor in target.items():
        tensor.copy_(source[name])


def load_heads(model: Any, folder: Path) -> None:
    """Weights from a folder `save_heads` wrote into."""
    found = extra(model)
    if found is not None:
        copy_weights(load_file(folder / HEADS_FILE), found.state_dict())


def head_names(folder: Path) -> list[str]:
    """The names of the language heads saved in a folder, in order; empty when it has none."""
    if not (folder / HEADS_FILE).is_file():
        return []
    with safe_open(folder / HEADS_FILE, framework="pt") as file:
        names: list[str] = json.loads((file.metadata() or {}).get("names", "[]"))
    return names
