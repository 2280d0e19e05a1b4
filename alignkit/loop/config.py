"""The `train`, `eval` and `drift` blocks of a recipe. Torch-free."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from alignkit.core.config import Config
from alignkit.data.config import DataConfig
from alignkit.rewards.config import RewardConfig
from alignkit.rollout.config import SamplingConfig

LOSS_WORDS = frozenset({"loss", "nll", "kl", "perplexity", "error", "ece"})
"""Words in the name of a metric that is better when it is smaller."""
SCORED = frozenset({"reward", "win_rate", "win_rate/standard_error"})
"""Metrics of an evaluation, without their prefix, that only `eval.rewards` gives."""


class TrainConfig(Config):
    """How long, how large, how fast."""

    num_epochs: float = Field(1.0, gt=0, description="passes over the data; max_steps wins when given")
    max_steps: int | None = Field(None, ge=0, description="optimizer steps; null = num_epochs decides")
    batch_size: int = Field(
        32, ge=1, description="units of one optimizer step over all ranks: pairs in DPO, completions online"
    )
    micro_batch_tokens: int = Field(
        16384, ge=1, description="tokens of one forward as they are laid out; memory only, never results"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="at most so many units in one forward; null = no limit"
    )
    epochs_per_round: int = Field(1, ge=1, description="passes over one round of groups")
    learning_rate: float = Field(1e-6, gt=0)
    critic_learning_rate: float | None = Field(
        None, gt=0, description="of the model that expects rewards, in ppo; null = ten times learning_rate"
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field("linear", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up; also with lr_scheduler constant")
    optim: Literal["adamw"] = Field("adamw")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="not applied to biases and norms")
    max_grad_norm: float = Field(1.0, ge=0, description="0 = no clipping")
    max_length: int = Field(1024, ge=2, description="tokens of prompt + completion")
    save_steps: int = Field(500, ge=0, description="0 = only at the end and when interrupted")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept, newest first")
    logging_steps: int = Field(1, ge=1)
    step0_checks: bool = Field(True, description="closed forms, and a few rows rescored by plain transformers")

    @property
    def critic_rate(self) -> float:
        """The critic's learning rate."""
        return self.learning_rate * 10 if self.critic_learning_rate is None else self.critic_learning_rate


class EvalConfig(Config):
    """Held-out measurement: the loss's own metrics, and samples scored by rewards."""

    data: list[DataConfig] = Field([], description="held-out rows, read as `data`")
    every_steps: int = Field(0, ge=0, description="0 = only before the first and after the last step")
    each_round: bool = Field(False, description="measure also when a round is spent; offline a round is one step")
    num_samples: int = Field(0, ge=0, description="held-out prompts to sample from, before and after; 0 = none")
    sampling: SamplingConfig = SamplingConfig()
    rewards: list[RewardConfig] = Field([], description="score the samples; gives eval_win_rate against `opponent`")
    opponent: Literal["start", "chosen"] = Field(
        "start", description="whose answers eval_win_rate compares with: the start model's, or the data's chosen ones"
    )
    best_metric: str | None = Field(
        None, description="an `eval_` metric: its best checkpoint is kept, and exported as best/; null = none"
    )
    best_mode: Literal["max", "min"] | None = Field(
        None, description="which end of best_metric is better; null = min if its name is of a loss, else max"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a gain in best_metric; null = never"
    )
    min_delta: float = Field(0.0, ge=0, description="a gain counts for patience once it is larger than this")

    @model_validator(mode="after")
    def _asks_for_what_it_can_do(self) -> EvalConfig:
        if self.num_samples and not self.data:
            raise ValueError("num_samples draws from held-out prompts: give `data`, or leave it at 0")
        if self.rewards and not self.num_samples:
            raise ValueError("`rewards` score samples, and num_samples is 0: say how many prompts to sample from")
        if self.opponent != "start" and not self.rewards:
            raise ValueError("`opponent` is whom scored samples are compared with, and nothing scores them: `rewards`")
        return self

    @model_validator(mode="after")
    def _can_tell_the_best(self) -> EvalConfig:
        metric = self.best_metric
        if metric is None:
            for key, asked in (("best_mode", self.best_mode is not None), ("patience", self.patience is not None)):
                if asked:
                    raise ValueError(f"{key} says how to use best_metric: name one too, such as eval_loss")
        elif not self.data:
            raise ValueError("best_metric is measured on held-out rows: give `data`")
        elif not metric.startswith("eval_"):
            raise ValueError(f"best_metric is the name of an evaluation metric: did you mean 'eval_{metric}'?")
        elif metric.startswith("eval_samples/") and not self.num_samples:
            raise ValueError(f"best_metric {metric} is about samples, and num_samples is 0")
        elif metric.removeprefix("eval_") in SCORED and not self.rewards:
            raise ValueError(f"best_metric {metric} is about scored samples, and nothing scores them: give `rewards`")
        if self.patience is None and self.min_delta:
            raise ValueError("min_delta is a gain that patience waits for: give `patience` too")
        if self.patience is not None and self.every_steps == 0 and not self.each_round:
            raise ValueError("patience counts evaluations during training, and every_steps is 0: say how often")
        return self

    @property
    def smaller_is_better(self) -> bool:
        """Whether the best value of `best_metric` is its smallest."""
        by_name = "min" if LOSS_WORDS & set(re.split(r"[_/]", self.best_metric or "")) else "max"
        return (self.best_mode or by_name) == "min"


BOUNDS = ("below", "above", "falls_by", "rises_by")
LABELLED = frozenset({"drift/judge_accuracy", "drift/chosen_logps", "drift/chosen_logps_change"})
"""Numbers of a round that only `drift.labels` give."""


class DriftRule(Config):
    """What a run does once a number of a round is out of its one bound."""

    metric: str = Field(description="as it is logged: drift/agreement, reward, …")
    below: float | None = Field(None, description="least value that is well")
    above: float | None = Field(None, description="greatest value that is well")
    falls_by: float | None = Field(None, gt=0, description="how far it may fall under the greatest of earlier rounds")
    rises_by: float | None = Field(None, gt=0, description="how far it may rise over the least of earlier rounds")
    action: Literal["damp", "stop", "rollback"] = Field(
        description="damp: a lower learning rate from here on; stop: the run ends before it learns from the round; "
        "rollback: it ends with the weights that the round before this one began with"
    )
    factor: float = Field(0.5, gt=0, lt=1, description="damp: what the learning rate is multiplied by")

    @model_validator(mode="after")
    def _has_one_bound(self) -> DriftRule:
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a rule has one bound of {', '.join(BOUNDS)}; it has {' and '.join(given) or 'none'}")
        if self.action != "damp" and self.factor != 0.5:
            raise ValueError(f"`factor` is of action: damp, and this rule has action: {self.action}")
        return self

    @property
    def bound(self) -> tuple[str, float]:
        """The one bound: its key and its value."""
        return next((name, value) for name in BOUNDS if (value := getattr(self, name)) is not None)


class DriftConfig(Config):
    """How the rounds of an iterative method are watched, and what is done when they drift."""

    labels: list[DataConfig] = Field([], description="held-out preferences, read as `data`, that the judge is held to")
    num_labels: int = Field(256, ge=1, description="use only so many of their first rows")
    rules: list[DriftRule] = Field([], description="looked at after a round is scored, before it is learned from")

    @model_validator(mode="after")
    def _has_its_labels(self) -> DriftConfig:
        for rule in self.rules:
            if rule.metric in LABELLED and not self.labels:
                raise ValueError(f"a rule is about {rule.metric}, which is measured on held-out pairs: give `labels`")
        return self
