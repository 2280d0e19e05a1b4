"""The pydantic base of every config, and the config every algorithm shares."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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


class OnlineConfig(AlgorithmConfig):
    """What every `algorithm` block of a method may hold whose completions the run writes itself."""

    rounds: int | None = Field(
        None, ge=1, description="how often prompts are answered and learned from; null = train.num_epochs decides"
    )
    prompts_per_round: int | None = Field(
        None,
        ge=1,
        description="prompts answered at once, over all ranks; null = as many as give one optimizer step: "
        "train.batch_size / rollout.num_generations, or train.batch_size where a prompt gives one unit",
    )


class IterativeConfig(OnlineConfig):
    """What every `algorithm` block of a method may hold that answers a large part of its prompts before it learns."""

    rounds: int | None = Field(3, ge=1, description="how often prompts are answered and learned from")
    prompts_per_round: int | None = Field(
        None, ge=1, description="prompts answered at once, over all ranks; null = the data in as many parts as rounds"
    )

    @model_validator(mode="after")
    def _ends(self) -> IterativeConfig:
        if self.rounds is None and self.prompts_per_round is None:
            raise ValueError("rounds: null leaves open how many prompts a round has; give prompts_per_round")
        return self


class CombineConfig(Config):
    """How the rewards of a completion become its reward."""

    level: Literal["reward", "advantage"] = Field(
        "reward", description="reward: one number a completion; advantage: the method gets each reward apart"
    )
    mode: Literal["sum", "product", "min", "direction", "pama"] = Field(
        "sum",
        description="of the weighted rewards; min = the worst case; direction = along the vector in a row's column "
        "`direction`; pama = how far the advantages of all rewards agree, with level: advantage",
    )
    route: str | None = Field(None, description="data column that says which rewards score a row, by their `when`")
    solver: Literal["projection", "diagonal", "min_norm"] = Field(
        "projection", description="pama: the advantage nearest 0, or one weight a reward over the whole round"
    )
    noon: bool = Field(True, description="pama: negative advantages count 0 (reconstructed: false keeps them)")
    granularity: Literal["token", "sequence", "batch"] = Field(
        "token", description="pama, projection: where rewards are compared (token is reconstructed)"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> CombineConfig:
        if self.level == "advantage" and self.mode in ("product", "min", "direction"):
            raise ValueError(f"with level: advantage rewards stay apart, so mode: {self.mode} has nothing to combine")
        if self.level == "reward" and self.mode == "pama":
            raise ValueError("mode: pama merges advantages, not rewards; set level: advantage")
        return self
