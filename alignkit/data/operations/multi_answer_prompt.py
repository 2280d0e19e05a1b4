"""Prompts that ask for several answers at once, for rewards that pay an efficient search. 2025, arXiv 2508.05731."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from pydantic import Field, model_validator

from alignkit.core.registry import register
from alignkit.core.types import Message
from alignkit.data.operations import Item, Operation, OperationConfig
from alignkit.data.shapes import BadRow, Text

TEXT = (
    "If you are not sure, propose up to {max_answers} different answers, the likeliest first. Give them as a JSON list "
    "and nothing else."
)


class MultiAnswerPromptConfig(OperationConfig):
    """Keys of `multi_answer_prompt`."""

    text: str = Field(TEXT, description="what is asked; {max_answers} is filled in where it stands")
    max_answers: int = Field(8, ge=1, description="how many answers are asked for at most")
    separator: str = Field("\n\n", description="between the prompt and the request")

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if not self.text:
            raise ValueError("`text` is empty; remove the operation, or say what is asked")
        return self


@register.operation("multi_answer_prompt")
class MultiAnswerPrompt(Operation[MultiAnswerPromptConfig]):
    """The request behind a plain-text prompt, or behind the last user turn."""

    config_type = MultiAnswerPromptConfig

    def apply(self, item: Item) -> list[Item]:
        """The row with its prompt asking for more. Raises BadRow where there is no user turn."""
        return [Item(item.id, replace(item.example, prompt=self._asking(item.example.prompt)), item.fields)]

    def note(self) -> str:
        """How the model is asked."""
        return f"Its prompts asked for several answers at once:\n\n```text\n{self._request()}\n```"

    def _request(self) -> str:
        return self.config.text.replace("{max_answers}", str(self.config.max_answers))

    def _asking(self, prompt: Text) -> Text:
        added = self.config.separator + self._request()
        if isinstance(prompt, str):
            return prompt + added
        place = next((i for i in reversed(range(len(prompt))) if prompt[i]["role"] == "user"), None)
        if place is None:
            raise BadRow("malformed", "the prompt has no user turn to ask for several answers in")
        turn: Message = prompt[place].copy()
        turn["content"] = (turn.get("content") or "") + added
        return [*prompt[:place], turn, *prompt[place + 1 :]]
