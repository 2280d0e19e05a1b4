"""The `model` and `models` blocks of a recipe. Torch-free, so that a bad recipe is refused at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from alignkit.core.config import Config


class LoraConfig(Config):
    """Low-rank adapters through peft; the reference is then the same weights with the adapter off."""

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scale is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter input; > 0 makes the policy noisy")
    target_modules: str | list[str] = Field("all-linear", description="module names, or 'all-linear'")


class ModelConfig(Config):
    """The policy: what is trained."""

    name_or_path: str = Field(description="hub id, folder of a transformers model, or folder of a peft adapter")
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="of the computation and of the finished model. bfloat16: autocast over float32 weights (frozen "
        "weights under LoRA are bf16)",
    )
    lora: LoraConfig | None = Field(None, description="null = train all weights")
    quantization: Literal["nf4", "int8"] | None = Field(
        None,
        description="keep the frozen weights under `lora` in 4 bits (NF4, with quantized constants: QLoRA) or in 8; "
        "needs bitsandbytes",
    )
    chat_template: str | None = Field(None, description="a jinja file that replaces the tokenizer's template")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    attn_implementation: str | None = Field(None, description="as in transformers: sdpa, eager, flash_attention_2, …")
    trust_remote_code: bool = Field(False, description="run code that a hub repository ships")
    layout: Literal["auto", "padded", "packed", "prefix_shared"] = Field(
        "auto",
        description="how rows are laid out for the model; speed and memory only, never results. auto = the best way it "
        "can take; padded = plain rows and whole logits",
    )
    activation_offload: bool = Field(
        False, description="keep what the forward pass saves for backward in the host's memory; GPUs only"
    )

    @model_validator(mode="after")
    def _quantizes_what_is_frozen(self) -> ModelConfig:
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"quantization: {self.quantization} is of frozen weights; train an adapter on them: `lora`"
            )
        return self


class RosterModelConfig(Config):
    """Another model of the run, by name under `models`."""

    source: str = Field(
        "policy", alias="from", description="'policy' = the weights the run starts from, or a model path"
    )
    refresh: Literal["never", "round"] | None = Field(
        None,
        description="when it moves: round = it becomes the policy in every round, after scoring and before the first "
        "update; null = as the method has it",
    )
    precompute: bool = Field(
        True, description="score the whole data set once, keep the numbers on disk, free the model"
    )
    endpoint: str | None = Field(
        None,
        pattern="^https?://",
        description="a server that speaks OpenAI's protocol, up to and with /v1: it judges in place of local weights",
    )
    served_name: str | None = Field(None, description="what that server calls the model; null = the name it has here")
    token_env: str | None = Field(None, description="environment variable that holds that server's API key")
    timeout: float = Field(60.0, gt=0, description="seconds that server may take for one answer")
    max_requests: int = Field(16, ge=1, description="answers asked of that server at a time")
    retries: int = Field(4, ge=0, description="how often a request is sent again that server did not answer")

    @model_validator(mode="after")
    def _is_one_thing(self) -> RosterModelConfig:
        if self.endpoint is not None and (self.source != "policy" or self.refresh == "round"):
            raise ValueError("a model behind an endpoint has no weights here; leave `from` and `refresh` out")
        return self
