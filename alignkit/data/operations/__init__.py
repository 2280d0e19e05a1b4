"""What may be done to rows between reading and rendering, by name: the `operations` of a data entry. Torch-free.

An operation is a class in a file of this folder (or an entry point of the group `alignkit.operations`, or
`"module:Class"`), with its keys beside its name:

    @register.operation("shout")
    class Shout(Operation[ShoutConfig]):
        config_type = ShoutConfig

        def apply(self, item: Item) -> list[Item]: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.errors import DataError, RecipeError
from alignkit.core.registry import Entry, register
from alignkit.core.types import Message
from alignkit.data.shapes import BadRow, Example, Text


class OperationConfig(Config):
    """What every entry of `operations` may hold."""

    name: str = Field(description="registered name, entry point or 'module:Class'")


ConfigT = TypeVar("ConfigT", bound=OperationConfig)


@dataclass(frozen=True, slots=True)
class Item:
    """A row on its way to a group: the group's id, what is rendered, and the columns that travel along."""

    id: str
    example: Example
    fields: dict[str, Any]


class Operation(ABC, Generic[ConfigT]):
    """Rows in, rows out. Pure: what it is given stays as it is."""

    config_type: ClassVar[type[OperationConfig]] = OperationConfig

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def apply(self, item: Item) -> list[Item]:
        """The rows that take the place of one. Raises BadRow where it cannot be used, and is counted in the report."""

    def note(self) -> str:
        """What the model card says of rows that went through it; empty = nothing."""
        return ""


def find_operation(name: str) -> Entry:
    """The registered operation of that name, entry point or 'module:Class'. Raises RecipeError."""
    entry = register.operation.get(name)
    if not (isinstance(entry.target, type) and issubclass(entry.target, Operation)):
        raise RecipeError(f"{name!r} is {entry.target!r}, expected a subclass of alignkit.data.operations.Operation")
    return entry


def build_operation(config: OperationConfig) -> Operation[Any]:
    """The operation that an entry describes."""
    built: Operation[Any] = find_operation(config.name).target(config)
    return built


def conditioned(
    prompt: Text, text: str, placement: Literal["system", "user_prefix"], separator: str, operation: str
) -> Text:
    """The prompt with a text at its beginning. Raises DataError or BadRow where it has no such place."""
    if isinstance(prompt, str):
        if placement == "system":
            raise DataError(
                f"{operation}: plain-text prompts have no system turn; set `placement: user_prefix`, or give "
                "prompts as messages"
            )
        return text + separator + prompt
    role = "system" if placement == "system" else "user"
    place = next((i for i, turn in enumerate(prompt) if turn["role"] == role), None)
    if place is None and placement == "system":
        return [Message(role="system", content=text), *prompt]
    if place is None:
        raise BadRow("malformed", f"the prompt has no user turn to put the text of {operation} before")
    turn = prompt[place].copy()
    turn["content"] = text + separator + (turn.get("content") or "")
    return [*prompt[:place], turn, *prompt[place + 1 :]]
