"""One entry of a `rewards` list. Torch-free."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from alignkit.core.config import Config


class RewardConfig(Config):
    """A reward source by name, and what it counts for."""

    name: str = Field(description="registered name or 'module:function'")
    weight: float = 1.0
    args: dict[str, Any] = Field({}, description="the source's own config")
