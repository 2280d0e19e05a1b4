"""The `track` block. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignkit.core.config import Config


class WandbConfig(Config):
    """Weights & Biases; without a key it logs offline, and no network ever stops a run."""

    project: str = "alignkit"
    name: str | None = Field(None, description="null = the run folder's name")
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = Field(None, description="null = online if there is a key")
    tags: list[str] = []


class TensorboardConfig(Config):
    """TensorBoard event files under the run folder's runs/."""


class TrackConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig | None = None
    tensorboard: TensorboardConfig | None = None
