"""Writing with a weighted mixture of a model's output layers. Shen et al. 2025, arXiv 2510.01167, as the authors' code.

    logits = Σ_h w_h · logits_h / Σ_h w_h

Logits are mixed, not probabilities. Heads are linear, so it is one output layer, Σ_h w_h · W_h / Σ_h w_h: mixing costs
nothing a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, Self

from pydantic import Field, model_validator

from alignkit.core.errors import RecipeError
from alignkit.core.registry import register
from alignkit.rollout.guides import Guide, GuideConfig

Weights = Mapping[str, float] | Sequence[float]
"""By the names of heads, those left out being 0; or one each, in their order."""


class HeadWeightedConfig(GuideConfig):
    """Keys of `head_weighted`."""

    head_weights: dict[str, float] | list[float] | None = Field(
        None, description="what each head counts, by name (others 0) or in their order; null = all the same"
    )
    head_index: int | None = Field(None, ge=0, description="the number of the one head to write with")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.head_weights is not None and self.head_index is not None:
            raise ValueError("`head_weights` and `head_index` both say which heads write; give one of them")
        if self.head_weights is not None and (mistake := weights_mistake(self.head_weights)):
            raise ValueError(f"`head_weights` {mistake}")
        return self


@register.guide("head_weighted")
class HeadWeighted(Guide[HeadWeightedConfig]):
    """Every token from the weighted mean of all heads' logits."""

    config_type = HeadWeightedConfig

    @contextmanager
    def over(self, model: Any) -> Iterator[None]:
        """The model with its mixture for an output layer. Raises RecipeError where its heads are others."""
        from alignkit.models.heads import LanguageHeads, extra, mixed

        heads = extra(model)
        if not isinstance(heads, LanguageHeads):
            raise RecipeError("the guide head_weighted mixes output layers, and this model has but its own; remove it")
        with mixed(model, self._in_order(heads.names)):
            yield

    def _in_order(self, names: Sequence[str]) -> list[float]:
        index = self.config.head_index
        if index is None:
            return in_order(self.config.head_weights, names)
        if index >= len(names):
            raise RecipeError(f"the guide head_weighted: head_index is {index}, the heads are 0 to {len(names) - 1}")
        return [float(i == index) for i in range(len(names))]


def weights_mistake(weights: Weights) -> str | None:
    """What is wrong with weights, whatever the heads; None when nothing is."""
    numbers = list(weights.values()) if isinstance(weights, Mapping) else list(weights)
    if all(isfinite(number) and number >= 0 for number in numbers) and sum(numbers) > 0:
        return None
    shown = ", ".join(f"{number:g}" for number in numbers) or "none"
    return f"are {shown}: none may be negative, and one must be above 0"


def in_order(weights: Weights | None, names: Sequence[str]) -> list[float]:
    """A weight for each of these heads, as given. Raises RecipeError where they are weights of other heads."""
    if weights is None:
        return [1.0] * len(names)
    if mistake := weights_mistake(weights):
        raise RecipeError(f"head weights {mistake}")
    if isinstance(weights, Mapping):
        if unknown := [name for name in weights if name not in names]:
            raise RecipeError(f"there is no head {unknown[0]!r} to weigh; the heads are {', '.join(names)}")
        return [float(weights.get(name, 0.0)) for name in names]
    if len(weights) != len(names):
        raise RecipeError(f"{len(weights)} head weights for {len(names)} heads: {', '.join(names)}")
    return [float(weight) for weight in weights]
