"""One entry of a `rewards` list, and how several become one number. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from alignkit.core.config import Config
from alignkit.rewards.transforms import TransformConfig, find_transform


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


def _as_config(value: Any) -> Any:
    """The entry as its transform's own config, defaults of its name included."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return value
    entry = find_transform(value["name"])
    return entry.target.config_type.model_validate({**entry.preset, **value})
