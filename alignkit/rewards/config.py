"""One entry of a `rewards` list, and how several become one number. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from alignkit.core.config import Config
from alignkit.core.errors import RecipeError
from alignkit.core.registry import Entry
from alignkit.rewards.transforms import TransformConfig, find_transform

NO_ARGS = "a plain function takes none; make it a class with a `config_type` to give it settings"


class RewardConfig(Config):
    """A reward source by name, what it counts for, and what happens when it fails."""

    name: str = Field(description="registered name or 'module:function'")
    label: str | None = Field(
        None,
        pattern=r"^[^/]+$",
        description="what its scores are kept and logged under, where one source is used twice; null = its name",
    )
    weight: float = 1.0
    args: dict[str, Any] = Field({}, description="the source's own config")
    transforms: list[SerializeAsAny[TransformConfig]] = Field(
        [], description="what is done to its scores before they are weighed, one after the other"
    )
    when: str | None = Field(
        None, description="score only rows whose column `combine.route` has this value; null = all rows"
    )
    timeout: float | None = Field(None, gt=0, description="seconds a call may take; null = as long as it takes")
    retries: int = Field(0, ge=0, description="how often a failed call is made again, after 1, 2, 4, … s")
    on_error: Literal["fail", "drop_group", "value"] = Field(
        "fail", description="after the last attempt: stop the run, leave the group out, or give `error_value`"
    )
    error_value: float = Field(0.0, allow_inf_nan=False, description="the score of rows that failed; with value only")

    @field_validator("transforms", mode="before")
    @classmethod
    def _named_transforms(cls, value: Any) -> Any:
        return [_as_config(item) for item in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _compares_raw_scores(self) -> RewardConfig:
        for place, transform in enumerate(self.transforms):
            if place and find_transform(transform.name).target.reads_raw_scores:
                raise ValueError(
                    f"{transform.name!r} compares scores with reference rewards as the source gives them, so it must "
                    f"come first; {self.transforms[0].name!r} stands before it"
                )
        return self


def args_type(entry: Entry) -> type[Config] | None:
    """The config that a reward source takes as `args`; None for a plain function.

    Raises RecipeError: it is neither a function nor a class with a config.
    """
    target = entry.target
    if isinstance(target, type):
        if not hasattr(target, "config_type"):
            raise RecipeError(
                f"reward {entry.name!r}: the class {target.__qualname__} has no `config_type`; a reward class names "
                "the pydantic config (alignkit.core.Config) its constructor takes, or use a plain function"
            )
        found: type[Config] = target.config_type
        return found
    if not callable(target):
        raise RecipeError(
            f"reward {entry.name!r} is a {type(target).__name__}; expected a function "
            "reward(prompts, completions, completion_ids, **columns) or a RewardSource class"
        )
    return None


def _as_config(value: Any) -> Any:
    """The entry as its transform's own config, defaults of its name included."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return value
    entry = find_transform(value["name"])
    return entry.target.config_type.model_validate({**entry.preset, **value})
