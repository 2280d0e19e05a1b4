"""How text is sampled. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from alignkit.core.config import Config
from alignkit.rollout.guides import GuideConfig, find_guide


class SamplingConfig(Config):
    """Knobs of one draw."""

    temperature: float = Field(1.0, ge=0, description="0 = the most likely token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = no limit")
    min_p: float = Field(
        0.0, ge=0, le=1, description="leave out tokens below this share of the likeliest one's probability; 0 = none"
    )
    max_completion_length: int = Field(128, ge=1, description="tokens")
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="texts that end a completion; they are left out of its text, and stay in its tokens"
    )
    guides: list[SerializeAsAny[GuideConfig]] = Field([], description="what the model is while it writes")

    @field_validator("guides", mode="before")
    @classmethod
    def _named_guides(cls, value: Any) -> Any:
        return [_as_config(item) for item in value] if isinstance(value, list) else value


class RolloutConfig(SamplingConfig):
    """Who writes the completions of a round, how many of each prompt, and how."""

    engine: Literal["native", "vllm"] = Field(
        "native", description="native = the policy itself, in this process; vllm = a vLLM server, over HTTP"
    )
    num_generations: int = Field(8, ge=1, description="completions of each prompt")
    url: str = Field("http://127.0.0.1:8000", pattern="^https?://[^/]+/?$", description="of the vLLM server")
    served_name: str | None = Field(
        None, description="what the vLLM server calls the model; null = model.name_or_path, as `rollout serve` does"
    )
    token_env: str | None = Field(None, description="environment variable that holds the vLLM server's API key")
    weights_folder: str | None = Field(
        None,
        description="where weights are put for the vLLM server, which must be able to read them; null = in output_dir",
    )
    max_requests: int = Field(64, ge=1, description="completions a process asks the vLLM server for at a time")
    deadline: float = Field(
        600.0, gt=0, description="seconds to wait for a vLLM server that is away, or for one completion of it"
    )
    logps: Literal["auto", "sampler", "policy"] = Field(
        "auto",
        description="whose log-probabilities the loss takes for the writer's: the sampler's own, or the policy's "
        "from one more pass; auto = the sampler's where it is the policy itself in float32 and leaves out no token",
    )
    importance_cap: float | None = Field(
        2.0, gt=0, description="with the policy's: a token counts π/π_sampler, at most so much; null = always once"
    )
    max_logp_difference: float | None = Field(
        None,
        gt=0,
        description="stop when sampler and policy are further apart, in nats a token on average; null = 0.01 where the "
        "sampler's log-probabilities are taken, 1 elsewhere",
    )

    @property
    def leaves_out_tokens(self) -> bool:
        """Whether some tokens cannot be drawn, so that log-probabilities are of what is left."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or bool(self.guides)

    def trusts_sampler(self, dtype: str) -> bool:
        """Whether the sampler's log-probabilities stand for those of a policy that computes in `dtype`."""
        exact = self.engine == "native" and dtype == "float32" and not self.leaves_out_tokens
        return exact if self.logps == "auto" else self.logps == "sampler"

    def allowed_difference(self, dtype: str) -> float | None:
        """Nats a token by which sampler and policy may differ on average; None where they are meant to."""
        if self.max_logp_difference is not None:
            return self.max_logp_difference
        if self.leaves_out_tokens:
            return None
        return 0.01 if self.trusts_sampler(dtype) and dtype == "float32" else 1.0

    @model_validator(mode="after")
    def _written_elsewhere(self) -> Self:
        if self.engine == "vllm" and self.guides:
            raise ValueError("a vLLM server knows no guides; leave `guides` out, or let `engine: native` write")
        return self


def _as_config(value: Any) -> Any:
    """The entry as its guide's own config, defaults of its name included."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return value
    entry = find_guide(value["name"])
    return entry.target.config_type.model_validate({**entry.preset, **value})
