"""Which way a model takes from rows to log-probabilities, and why: by what its config says, then by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from alignkit.core.errors import RecipeError
from alignkit.models.attention import NAMES, UnsupportedAttention, install
from alignkit.models.layout import LayoutName
from alignkit.models.trim import install_trim
from alignkit.ops.logps import Head

LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Path:
    """How rows are laid out, and whether the head is ours (`chunked`) or the model's own (`full` logits).

    `scores`: the model scores text and has no such head.
    """

    layout: LayoutName
    head: Head | None
    why: tuple[str, ...] = ()
    scores: bool = False

    def __str__(self) -> str:
        rows = {
            "padded": "padded rows",
            "packed": "rows packed without padding",
            "prefix_shared": "rows packed without padding, shared prompts once",
        }[self.layout]
        head = "; log-probabilities in chunks" if self.head is not None else "; whole logits"
        return (
            rows + ("" if self.scores else head) + (f" (fallback, because {'; '.join(self.why)})" if self.why else "")
        )


def causal_model(bare: Any) -> Any:
    """The transformers model inside, adapters or not."""
    return bare.get_base_model() if hasattr(bare, "peft_config") else bare


def choose_path(bare: Any, layout: str, attn_implementation: str | None, *, scores: bool = False) -> Path:
    """The best way the model's config allows; a model that can read streams is taught to.

    Args:
        bare: one model, adapters or not.
        scores: it scores text, and has no output layer over a vocabulary.
        layout: the recipe's `model.layout`. `padded` means without any of it: padded rows, whole logits.
        attn_implementation: what the recipe asks for, None = the model's own choice.

    Raises:
        RecipeError: a layout was asked for by name that the model cannot take.
    """
    if layout == "padded":
        return Path("padded", None, scores=scores)
    model = causal_model(bare)
    head, why_not_head = (None, "") if scores else read_head(model)
    why = () if scores or head is not None else (why_not_head,)
    reason = _no_stream(model, attn_implementation)
    if reason is None:
        install(model)
        install_trim(model.base_model)
        return Path("packed" if layout == "packed" else "prefix_shared", head, why, scores)
    refuse_if_asked(layout, reason)
    return Path("padded", head, (*why, reason), scores)


def refuse_if_asked(layout: str, reason: str) -> None:
    """Only `auto` may become something else.

    Raises: RecipeError.
    """
    if layout != "auto":
        raise RecipeError(
            f"model.layout: {layout} is not possible with this model: {reason}. `auto` takes the best way that is, "
            "`padded` the plain one."
        )


def padded(path: Path, reason: str) -> Path:
    """The same with padded rows."""
    return replace(path, layout="padded", why=tuple(dict.fromkeys((*path.why, reason))))


def whole_logits(path: Path, reason: str) -> Path:
    """The same with the model's own head."""
    return replace(path, head=None, why=tuple(dict.fromkeys((*path.why, reason))))


def _no_stream(model: Any, attn_implementation: str | None) -> str | None:
    """Why the model cannot read a stream of rows; None = it may."""
    config = model.config.get_text_config()
    if attn_implementation not in (None, "sdpa"):
        return f"model.attn_implementation: {attn_implementation} works on rows"
    if model.config._attn_implementation not in (*NAMES, *NAMES.values()):
        return f"its attention is {model.config._attn_implementation}"
    if getattr(model, "_is_stateful", False):
        return f"{config.model_type} carries a state from token to token"
    foreign = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if foreign:
        return f"{config.model_type} has layers of {', '.join(sorted(foreign))}"
    if not model._supports_attention_backend:
        return f"{config.model_type} does not use transformers' attention interface"
    if getattr(config, "output_router_logits", False):
        return "its router's loss counts tokens, and a shared prompt would count once"
    return None


def read_head(model: Any) -> tuple[Head | None, str]:
    """The output layer as weights, or why it cannot be read as such."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None, f"its output layer is {type(layer).__module__}.{type(layer).__qualname__}, not a plain linear one"
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, None if softcap is None else float(softcap)), ""


def first_failure(try_it: Callable[[], str | None]) -> str | None:
    """What `try_it` finds wrong, or why it cannot even run; None = it works."""
    try:
        return try_it()
    except UnsupportedAttention as error:
        return str(error)
    except torch.OutOfMemoryError:  # no other way takes less
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # a model that takes other arguments, a kernel that does not
        return f"a first use failed: {str(error).splitlines()[0]}"
