"""Directions of Directional Preference Alignment: a prompt says how much each of two rewards counts. 2024, arXiv
2402.18571.

    v = (cos t, sin t)        the prompt names round(100·v)        reward of an answer = ⟨v, r⟩

The last is `combine: {mode: direction}`, which reads the column `direction` written here. The angle t is drawn for each
row, by its id, from the range that somebody will ask for.

Deviations: the text is ours, but for the form of its weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import atan2, cos, degrees, isfinite, radians, sin
from typing import Literal, Self

from pydantic import Field, model_validator

from alignkit.core.registry import register
from alignkit.core.rng import generator
from alignkit.data.operations import Item, Operation, OperationConfig, conditioned

TEXT = "You are a helpful assistant. Give the answer that has the highest weighted rating = {weights}"


class DirectionConfig(OperationConfig):
    """Keys of `direction`."""

    objectives: list[str] = Field(
        ["helpfulness", "verbosity"],
        min_length=2,
        max_length=2,
        description="what the text calls the two rewards, in the order in which the recipe lists them",
    )
    lowest: float = Field(-45.0, ge=-180, le=180, description="smallest angle in degrees; 0 = the first reward alone")
    highest: float = Field(45.0, ge=-180, le=180, description="largest angle in degrees; 90 = the second reward alone")
    direction: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="ask every prompt for this one, of any length, for held-out prompts; null = draw one for each row",
    )
    placement: Literal["system", "user_prefix"] = Field(
        "system", description="where the text stands: a system turn, or before the first user turn"
    )
    text: str = Field(TEXT, description="the direction in words; {weights} is filled in")
    separator: str = Field("\n\n", description="between the text and what follows it in the same turn")
    seed: int = Field(0, description="of the draw; another one gives the same rows other directions")

    @model_validator(mode="after")
    def _points_somewhere(self) -> Self:
        if self.text.count("{weights}") != 1:
            raise ValueError("`text` needs one {weights}, which the weights take the place of")
        if not all(self.objectives) or self.objectives[0] == self.objectives[1]:
            raise ValueError(f"`objectives` needs two names that differ, got {self.objectives}")
        if self.lowest >= self.highest:
            raise ValueError("`lowest` must be below `highest`")
        if self.direction is not None and not (any(self.direction) and all(map(isfinite, self.direction))):
            raise ValueError(f"`direction` {self.direction} points nowhere")
        return self


def weights_text(direction: Sequence[float], objectives: Sequence[str]) -> str:
    """A unit vector as `helpfulness*97 + verbosity*-26`: the one place where it is rounded, to whole hundredths."""
    return " + ".join(f"{name}*{round(100 * x)}" for name, x in zip(objectives, direction, strict=True))


def parse_weights(text: str, objectives: Sequence[str]) -> list[int] | None:
    """The hundredths that a text written with `weights_text` names; None where it has none."""
    found = re.search(r" \+ ".join(rf"{re.escape(name)}\*(-?\d+)" for name in objectives), text)
    return None if found is None else [int(number) for number in found.groups()]


def clamped(angle: float, lowest: float, highest: float) -> float:
    """The angle of a range nearest to this one, the short way round the circle, in degrees."""
    middle, half = (lowest + highest) / 2, (highest - lowest) / 2
    return middle + min(max((angle - middle + 180) % 360 - 180, -half), half)


@register.operation("direction")
class Direction(Operation[DirectionConfig]):
    """A trade-off before every prompt, and in the row's columns for the reward."""

    config_type = DirectionConfig

    def __init__(self, config: DirectionConfig) -> None:
        super().__init__(config)
        self._asked = None if config.direction is None else self._supported(config.direction)

    def apply(self, item: Item) -> list[Item]:
        """The row under its direction, with the columns `direction` and `weights_text`."""
        config = self.config
        angle = self._asked
        if angle is None:
            angle = generator(config.seed, "direction", item.id).uniform(config.lowest, config.highest)
        direction = [cos(radians(angle)), sin(radians(angle))]
        weights = weights_text(direction, config.objectives)
        prompt = conditioned(item.example.prompt, self._text(weights), config.placement, config.separator, config.name)
        fields = {**item.fields, "direction": direction, "weights_text": weights}
        return [Item(item.id, replace(item.example, prompt=prompt), fields)]

    def note(self) -> str:
        """How to ask for a trade-off."""
        config = self.config
        first, second = config.objectives
        place = "as system turn" if config.placement == "system" else "before the first user turn, or the text"
        written = self._text(
            " + ".join(f"{name}*{letter}" for name, letter in zip(config.objectives, "AB", strict=True))
        )
        return (
            f"It weighs {first} against {second} as its prompt says. Ask with this text {place}, A and B being "
            f"100·cos t and 100·sin t as whole numbers, t from {config.lowest:g} to {config.highest:g} degrees; of "
            f"other angles it was taught nothing:\n\n```text\n{written}\n```"
        )

    def _text(self, weights: str) -> str:
        return self.config.text.replace("{weights}", weights)

    def _supported(self, direction: Sequence[float]) -> float:
        """Its angle in degrees, within the range."""
        config = self.config
        angle = degrees(atan2(direction[1], direction[0]))
        nearest = clamped(angle, config.lowest, config.highest)
        if abs((angle - nearest + 180) % 360 - 180) > 1e-6:
            warnings.warn(
                f"direction {list(direction)} stands at {angle:.4g} degrees, outside {config.lowest:g} to "
                f"{config.highest:g}, where a model was taught nothing; asking for {nearest:.4g} degrees instead",
                stacklevel=2,
            )
        return nearest
