"""What a model is while it writes, by name: the `guides` of a `sampling` block. Torch-free.

A guide is a class in a file of this folder (or an entry point of the group `alignkit.guides`, or `"module:Class"`),
with its keys beside its name:

    @register.guide("cautious")
    class Cautious(Guide[CautiousConfig]):
        config_type = CautiousConfig

        @contextmanager
        def over(self, model: Any) -> Iterator[None]: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.errors import RecipeError
from alignkit.core.registry import Entry, register


class GuideConfig(Config):
    """What every entry of `guides` may hold."""

    name: str = Field(description="registered name, entry point or 'module:Class'")


ConfigT = TypeVar("ConfigT", bound=GuideConfig)


class Guide(ABC, Generic[ConfigT]):
    """Changes a model for as long as it writes."""

    config_type: ClassVar[type[GuideConfig]] = GuideConfig

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def over(self, model: Any) -> AbstractContextManager[None]:
        """Inside, the model writes as guided; afterwards it is what it was. Raises RecipeError if it cannot be."""


def find_guide(name: str) -> Entry:
    """The registered guide of that name, entry point or 'module:Class'. Raises RecipeError."""
    entry = register.guide.get(name)
    if not (isinstance(entry.target, type) and issubclass(entry.target, Guide)):
        raise RecipeError(f"{name!r} is {entry.target!r}, expected a subclass of alignkit.rollout.guides.Guide")
    return entry


def build_guide(config: GuideConfig) -> Guide[Any]:
    """The guide that an entry describes."""
    built: Guide[Any] = find_guide(config.name).target(config)
    return built
