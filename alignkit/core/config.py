"""The pydantic base of every config, and the config every algorithm shares."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Frozen, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class AlgorithmConfig(Config):
    """What every `algorithm` block may hold."""

    name: str = Field(description="registered name, entry point or 'module:attribute'")
    loss: str | None = Field(
        None,
        description="swap only the mathematics: 'module:function' called as function(out, batch, config), "
        "returning (terms, metrics) as Algorithm.loss does",
    )
