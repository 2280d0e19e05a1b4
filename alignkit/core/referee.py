"""A model as referee: what it is asked of several answers to a question, and what its verdict says. Torch-free.

Rows that teach it (`data/operations/referee.py`), the reward of these (`referee_rank`) and its own judgement
(`self_referee`) must agree on all of this, so it stands here once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from alignkit.core import templates
from alignkit.core.config import Config

PAIR, LIST = ("prompt", "first", "second"), ("prompt", "answers")
"""Slots of a template that compares two answers, and of one that scores a list."""


class RefereeKeys(Config):
    """How a referee is asked, in everything that asks one."""

    template: str = Field(
        "listwise_v1",
        description="a shipped template, or the path of a .txt file; one with {first} and {second} asks for a verdict "
        "on two answers, one with {answers} for `scores: s1, …, sN`",
    )
    scale: list[int] = Field(
        [1, 10], min_length=2, max_length=2, description="worst and best score of an answer in a list"
    )
    labels: list[str] = Field(
        ["1", "2"], min_length=2, max_length=2, description="verdicts on two: the first, the second is the better"
    )

    @model_validator(mode="after")
    def _can_tell(self) -> Self:
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale: expected [worst, best], got {self.scale}")
        if not all(map(str.strip, self.labels)) or self.labels[0].lower() == self.labels[1].lower():
            raise ValueError(f"labels: expected two texts that differ, got {self.labels}")
        return self


class RefereeForm:
    """Questions to a referee, and its answers read. Raises RecipeError for a template that is none."""

    def __init__(self, keys: RefereeKeys) -> None:
        optional = (*PAIR, *LIST, "first_label", "second_label", "count", "low", "high", "principles")
        self.pairwise = "first" in templates.read_template(keys.template, ("prompt",), optional).slots
        if self.pairwise:
            self._template = templates.read_template(keys.template, PAIR, ("first_label", "second_label", "principles"))
        else:
            self._template = templates.read_template(keys.template, LIST, ("count", "low", "high", "principles"))
        self._labels = keys.labels
        self.low, self.high = (0, 1) if self.pairwise else keys.scale

    def question(self, prompt: str, answers: Sequence[str]) -> str:
        """What the referee is asked of `answers`, in this order: two, or any number in a list."""
        quoted = [templates.quotable(answer) for answer in answers]
        slots = {"prompt": templates.quotable(prompt), "principles": ""}
        if self.pairwise:
            slots |= dict(
                zip(("first", "second", "first_label", "second_label"), (*quoted, *self._labels), strict=True)
            )
        else:
            numbers = {"count": len(answers), "low": self.low, "high": self.high}
            slots |= {"answers": templates.listed(quoted), **{name: str(number) for name, number in numbers.items()}}
        return self._template.fill(slots)

    def scores(self, text: str, count: int) -> list[float] | None:
        """A score of each of `count` answers, the better the higher; None where there is none to read.

        Only the last line behind the thinking and behind the last mark of a quotation counts: what an answer says of
        its own scores is quoted before it.
        """
        spoken = templates.FENCE.split(templates.strip_thinking(text))[-1].strip()
        line = spoken.rpartition("\n")[2]
        if not self.pairwise:
            return templates.scores_line(line, count, self.low, self.high)
        chosen = templates.verdict(line, self._labels)
        return None if chosen is None else [float(place == chosen) for place in range(2)]
