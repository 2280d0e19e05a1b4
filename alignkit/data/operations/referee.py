"""Preference rows as questions to a referee: which of these answers is better? 2025, arXiv 2507.17515.

The answers stand in an order drawn for the row, numbered from 1; their true scores go, in that order, into a column for
the reward `referee_rank`. Wording and scale are ours: the paper's are not published.
"""

from __future__ import annotations

from dataclasses import replace
from math import isnan

from pydantic import Field

from alignkit.core import templates
from alignkit.core.referee import RefereeForm, RefereeKeys
from alignkit.core.registry import register
from alignkit.core.rng import permutation
from alignkit.core.types import Message
from alignkit.data.operations import Item, Operation, OperationConfig
from alignkit.data.shapes import BadRow, Text

TASK = "preference"
"""The column `task` of what it makes."""


class RefereeConfig(RefereeKeys, OperationConfig):
    """Keys of `referee`."""

    max_candidates: int = Field(8, ge=2, description="answers in one question, at most; of more, so many are drawn")
    seed: int = Field(0, description="of the order; another one gives the same rows other orders")


@register.operation("referee")
class Referee(Operation[RefereeConfig]):
    """A question about the answers of a row in place of its prompt; the answers are not learned from."""

    config_type = RefereeConfig

    def __init__(self, config: RefereeConfig) -> None:
        super().__init__(config)
        self._form = RefereeForm(config)

    def apply(self, item: Item) -> list[Item]:
        """The row as a question, with the columns `task` and `referee_scores`. Raises BadRow where no scores differ."""
        example, rewards = item.example, item.example.rewards
        if len(rewards) < 2 or any(map(isnan, rewards)):
            raise BadRow("missing value", "referee asks about two or more answers with scores, or chosen and rejected")
        order = permutation(len(rewards), self.config.seed, "referee", item.id)
        if self._form.pairwise:
            order = [order[0], *(i for i in order if rewards[i] != rewards[order[0]])][:2]
        order = order[: self.config.max_candidates]
        scores = [rewards[i] for i in order]
        if len(set(scores)) < 2:
            raise BadRow("no score gap", f"scores {', '.join(f'{score:g}' for score in scores)}")
        text = self._form.question(_question(example.prompt), [_answer(example.completions[i]) for i in order])
        prompt: Text = text if isinstance(example.prompt, str) else [Message(role="user", content=text)]
        asked = replace(example, prompt=prompt, completions=[], rewards=[], scores=[], steps=[])
        return [Item(item.id, asked, {**item.fields, "task": TASK, "referee_scores": scores})]

    def note(self) -> str:
        """What it was asked."""
        return "It was trained to compare answers too, asked as in the rows of task `preference`."


def _question(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else templates.conversation(prompt)


def _answer(completion: Text) -> str:
    """What the assistant said last, without its thinking."""
    text = completion if isinstance(completion, str) else completion[-1].get("content") or ""
    return templates.strip_thinking(text)
