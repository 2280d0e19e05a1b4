"""Reward-augmented pairs: every pair twice, each time under the score that its preferred answer should have. 2024,
arXiv 2410.08067, data relabelling.

    under the goal score(w): w is preferred to l        under the goal score(l): l is preferred to w

With R(y, g) = −(g − score(y))² the answer whose score is nearest to the goal g wins [reconstructed: equals the authors'
relabelling of two answers]. Of several answers every two with different scores are such a pair.

Deviations from the authors' code: answers are exchanged in both placements, where theirs exchanges user turns in one of
them and so leaves the preference as it was; pairs with equal goals are left out; the text is ours; one score, not
several, makes the goal.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from math import floor
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignkit.core.registry import register
from alignkit.data.operations import Item, Operation, OperationConfig, conditioned
from alignkit.data.shapes import BadRow, Example, Text

TEXT = (
    "Write an answer whose quality, on a scale from {lowest} (worst) to {highest} (best), is the target below.\n"
    "Target score: {goal}"
)
OF_THE_LIST = ("scores", "ranks", "margin", "ls_factor")
"""Columns that speak of the answers as they came, and would be wrong of a pair that was turned round."""


class RewardAugmentConfig(OperationConfig):
    """Keys of `reward_augment`."""

    placement: Literal["system", "user_prefix"] = Field(
        "system", description="where the goal stands: a system turn, or before the first user turn"
    )
    text: str = Field(TEXT, description="the goal in words; {goal}, {lowest} and {highest} are filled in")
    separator: str = Field("\n\n", description="between the goal and what follows it in the same turn")
    lowest: float = Field(1.0, description="worst score of the scale")
    highest: float = Field(10.0, description="best score of the scale")
    round_to: float = Field(0.5, gt=0, description="goals are multiples of it")
    min_gap: float = Field(0.0, ge=0, description="answers whose scores differ by no more make no pair")
    objective: str = Field("score", description="which score: `score`, or an objective of the rows")
    goal: float | None = Field(
        None, description="ask every prompt for this score and make no pairs, for held-out prompts; null = make pairs"
    )

    @model_validator(mode="after")
    def _has_a_goal(self) -> Self:
        if self.text.count("{goal}") != 1:
            raise ValueError("`text` needs one {goal}, which the score takes the place of")
        if self.lowest >= self.highest:
            raise ValueError("`lowest` must be below `highest`")
        if self.goal is not None and not self.lowest <= self.goal <= self.highest:
            raise ValueError(f"`goal` is {self.goal:g}, outside the scale from {self.lowest:g} to {self.highest:g}")
        return self


@register.operation("reward_augment")
class RewardAugment(Operation[RewardAugmentConfig]):
    """Two pairs in the place of one: an answer is right where its own score is asked for."""

    config_type = RewardAugmentConfig

    def apply(self, item: Item) -> list[Item]:
        """Both sides of every two answers that can be told apart; under a fixed goal the row as it is."""
        goal, example = self.config.goal, item.example
        if goal is not None:
            fields = {**item.fields, "goal": goal}
            return [Item(item.id, replace(example, prompt=self.conditioned(example.prompt, goal)), fields)]
        pairs = combinations(self._ranking(item), 2)
        return [side for better, worse in pairs for side in self._pair(item, better, worse)]

    def note(self) -> str:
        """How to ask for the best answers."""
        best, where = self.config.highest if self.config.goal is None else self.config.goal, self.config.placement
        place = "as system turn" if where == "system" else "before the first user turn, or the text"
        return (
            "It was trained with a target score in its prompts and answers as well as it is asked to. Ask for the best "
            f"answers with this text {place}:\n\n```text\n{self.goal_text(best)}\n```"
        )

    def goal_text(self, goal: float) -> str:
        """The goal in words; a pure function of it."""
        numbers = {"goal": goal, "lowest": self.config.lowest, "highest": self.config.highest}
        return _fill(self.config.text, {name: f"{number:g}" for name, number in numbers.items()})

    def goal_of(self, prompt: Text) -> float | None:
        """The goal that a conditioned prompt asks for; None where it begins with no such text."""
        text = prompt if isinstance(prompt, str) else prompt[0].get("content") or ""
        scale = {"lowest": re.escape(f"{self.config.lowest:g}"), "highest": re.escape(f"{self.config.highest:g}")}
        pattern = _fill(self.config.text, {**scale, "goal": r"(-?\d+(?:\.\d+)?)"}, re.escape)
        found = re.match(pattern, text)
        return float(found[1]) if found else None

    def conditioned(self, prompt: Text, goal: float) -> Text:
        """The prompt with the goal at its beginning. Raises DataError where it has no such place."""
        config = self.config
        return conditioned(prompt, self.goal_text(goal), config.placement, config.separator, config.name)

    def _ranking(self, item: Item) -> list[tuple[float, int]]:
        """(score, index) of every answer, best first. Raises BadRow where scores are missing or contradict the pair."""
        example, name = item.example, self.config.objective
        if len(example.completions) < 2:
            raise BadRow("missing value", "reward_augment makes pairs of two or more scored answers")
        for number, scores in enumerate(example.scores):
            if name not in scores:
                raise BadRow("missing value", f"completion {number + 1} has no score {name!r}")
            if not self.config.lowest <= scores[name] <= self.config.highest:
                scale = f"{self.config.lowest:g} to {self.config.highest:g}"
                raise BadRow("malformed", f"the score {scores[name]:g} is outside the scale {scale}")
        values = [scores[name] for scores in example.scores]
        best = max(range(len(values)), key=lambda i: example.rewards[i])
        if len(values) == 2 and values[best] < values[1 - best]:
            raise BadRow("no score gap", "the rejected answer has the higher score")
        ranking = sorted(((value, i) for i, value in enumerate(values)), key=lambda one: -one[0])
        if not any(self._differs(example, a, b) for a, b in combinations(ranking, 2)):
            raise BadRow("no score gap", f"scores {', '.join(f'{value:g}' for value in values)}")
        return ranking

    def _differs(self, example: Example, first: tuple[float, int], second: tuple[float, int]) -> bool:
        """Whether these answers, the better one first, can tell what each goal asks for."""
        apart = first[0] - second[0] > self.config.min_gap and self._goal(first[0]) != self._goal(second[0])
        return apart and example.completions[first[1]] != example.completions[second[1]]

    def _goal(self, score: float) -> float:
        return floor(score / self.config.round_to + 0.5) * self.config.round_to

    def _pair(self, item: Item, first: tuple[float, int], second: tuple[float, int]) -> list[Item]:
        if not self._differs(item.example, first, second):
            return []
        pair = item.id if len(item.example.completions) == 2 else f"{item.id}/{first[1] + 1}-{second[1] + 1}"
        sides = (("pos", first, second), ("neg", second, first))
        return [self._side(item, pair, side, chosen, rejected) for side, chosen, rejected in sides]

    def _side(self, item: Item, pair: str, side: str, chosen: tuple[float, int], rejected: tuple[float, int]) -> Item:
        example, goal, indices = item.example, self._goal(chosen[0]), (chosen[1], rejected[1])
        fields: dict[str, Any] = {name: value for name, value in item.fields.items() if name not in OF_THE_LIST}
        fields |= {"score_chosen": chosen[0], "score_rejected": rejected[0]}
        fields |= {"goal": goal, "aug_side": side, "pair_id": pair}
        made = replace(
            example,
            prompt=self.conditioned(example.prompt, goal),
            completions=[example.completions[i] for i in indices],
            rewards=[1.0, 0.0],
            scores=[dict(example.scores[i]) for i in indices],
        )
        return Item(f"{pair}/{side}", made, fields)


def _fill(text: str, values: dict[str, str], escape: Any = str) -> str:
    """`text` with {name} replaced; what stands between goes through `escape`."""
    parts = re.split(r"\{(goal|lowest|highest)\}", text)
    return "".join(values[part] if i % 2 else escape(part) for i, part in enumerate(parts))
