"""How text is sampled. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from alignkit.core.config import Config
from alignkit.rollout.guides import GuideConfig, find_guide


class SamplingConfig(Config):
    """Knobs of one draw."""

    temperature: float = Field(1.0, ge=0, description="0 = the most likely token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = no limit")
    max_completion_length: int = Field(128, ge=1, description="tokens")
    guides: list[SerializeAsAny[GuideConfig]] = Field([], description="what the model is while it writes")

    @field_validator("guides", mode="before")
    @classmethod
    def _named_guides(cls, value: Any) -> Any:
        return [_as_config(item) for item in value] if isinstance(value, list) else value


def _as_config(value: Any) -> Any:
    """The entry as its guide's own config, defaults of its name included."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return value
    entry = find_guide(value["name"])
    return entry.target.config_type.model_validate({**entry.preset, **value})
