"""The `dist` block of a recipe. Torch-free, so that a bad recipe is refused at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from alignkit.core.config import Config

ZERO = frozenset({"zero1", "zero2", "zero3"})
"""Backends that DeepSpeed runs."""
WHOLE_SHARDED = frozenset({"zero3", "fsdp2"})
"""Backends under which a process holds only its part of the weights."""


class DistConfig(Config):
    """How the processes of a run share its work and its memory. Speed and memory only, never results."""

    backend: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "auto",
        description="what is spread over the processes: ddp = the rows; zero1 = the optimizer's state too; zero2 = the "
        "gradients too; zero3 and fsdp2 = the weights too; auto = what `accelerate launch` was configured for, or "
        "else ddp",
    )
    world_size: int | None = Field(
        None, ge=1, description="processes the run must have; null = as many as are launched"
    )
    offload_optimizer: bool = Field(
        False, description="keep the optimizer's state in the host's memory; every backend but ddp"
    )
    offload_weights: bool = Field(
        False, description="keep this process's part of the weights in the host's memory; zero3 and fsdp2"
    )

    @model_validator(mode="after")
    def _can_offload(self) -> DistConfig:
        if self.offload_optimizer and self.backend not in {"zero1", "zero2", "zero3", "fsdp2"}:
            raise ValueError(
                f"offload_optimizer needs a backend that spreads the optimizer's state: zero1, zero2, zero3 or fsdp2; "
                f"it is {self.backend}"
            )
        if self.offload_weights and self.backend not in WHOLE_SHARDED:
            raise ValueError(
                f"offload_weights needs a backend that spreads the weights: zero3 or fsdp2; it is {self.backend}"
            )
        if self.backend == "fsdp2" and self.offload_optimizer != self.offload_weights:
            raise ValueError(
                "fsdp2 keeps weights, gradients and optimizer state in one place: set offload_optimizer and "
                "offload_weights both, or neither"
            )
        return self
