"""How text is sampled. Torch-free."""

from __future__ import annotations

from pydantic import Field

from alignkit.core.config import Config


class SamplingConfig(Config):
    """Knobs of one draw."""

    temperature: float = Field(1.0, ge=0, description="0 = the most likely token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = no limit")
    max_completion_length: int = Field(128, ge=1, description="tokens")
