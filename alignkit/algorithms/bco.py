"""Binary Classifier Optimization. Jung et al. 2024, arXiv 2404.04656.

Deviations from the paper: its shift δ is the midpoint of both classes' mean rewards (`delta_mode: class_balanced`; the
decay of these means is our choice); the default `running` is the mean of all rewards so far, as in TRL's trainer. Both
move once per optimizer step, before its loss, by the rewards of all ranks. Prompts are encoded for
`match_underlying_distribution` by counting tokens unless `encoder` names something better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, sqrt
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    DataError,
    Forward,
    Group,
    Metric,
    Metrics,
    Needs,
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.labels import contrast, is_desirable, label_metrics, labelled
from alignkit.core.lazy import F, torch
from alignkit.core.registry import load_object
from alignkit.core.rng import permutation
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor


class BCOConfig(AlgorithmConfig):
    """BCO's own keys."""

    beta: float = Field(0.1, gt=0, description="tether to the reference; dimensionless")
    delta_mode: Literal["running", "class_balanced"] = Field("running", description="what the shift δ is the mean of")
    delta_ema: float | None = Field(
        None, ge=0, lt=1, description="decay of these means a step; null = 0.9 if class_balanced, else none: all count"
    )
    match_underlying_distribution: bool = Field(
        False, description="weight bad answers by how like good prompts theirs are"
    )
    encoder: str | None = Field(
        None, description="'module:function', list of prompts → [n, d]; null = counts of tokens"
    )
    prompt_sample_size: int = Field(1024, ge=1, description="prompts of each class the density ratio is fitted on")
    min_density_ratio: float = Field(0.5, ge=0, description="lower bound of a weight")
    max_density_ratio: float = Field(10.0, gt=0, description="upper bound of a weight")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.encoder is not None and not self.match_underlying_distribution:
            raise ValueError("`encoder` is read by `match_underlying_distribution: true` alone; set that, or remove it")
        if self.min_density_ratio > self.max_density_ratio:
            raise ValueError(
                f"`min_density_ratio` {self.min_density_ratio:g} is above `max_density_ratio` "
                f"{self.max_density_ratio:g}"
            )
        return self


def bco_loss(log_ratio: Tensor, desirable: Tensor, delta: Tensor, beta: float) -> Tensor:
    """−log σ(±(βΔ − δ)), + for desirable answers, unreduced.

    Args: [N] log-ratios Δ in nats, [N] booleans, δ in units of β·nats; returns [N]. Source: arXiv 2404.04656.
    """
    distance = beta * log_ratio - delta
    return -F.logsigmoid(torch.where(desirable, distance, -distance))


@register.algorithm("bco")
class BCO(Algorithm[BCOConfig]):
    """Thumbs up or down on single answers, as the training of a classifier whose logit is the implicit reward − δ."""

    needs = Needs(columns=frozenset({"reference.logps", "policy.logps"}), fields=frozenset({"label"}))

    def __init__(self, config: BCOConfig) -> None:
        super().__init__(config)
        self._count, self._mean, self._deviations = 0.0, 0.0, 0.0
        self._decayed: dict[str, float] = {}
        self._classifier: Tensor | None = None
        self._encoder = load_object(config.encoder) if config.encoder is not None else None

    def prepare(self, groups: Sequence[Group]) -> None:
        """Fit which prompts are likelier among good answers, on equally many of both classes."""
        if not self.config.match_underlying_distribution:
            return
        classes = [[group for group in groups if is_desirable(group) is label] for label in (True, False)]
        size = min(self.config.prompt_sample_size, *map(len, classes))
        if not size:
            raise DataError("match_underlying_distribution compares prompts of both classes; all labels are the same")
        sample = [
            members[i]
            for label, members in enumerate(classes)
            for i in permutation(len(members), 0, "density ratio", label)[:size]
        ]
        self._classifier = ops.fit_classifier(self._encode(sample), torch.arange(2 * size) < size)

    def build(self, groups: list[Group]) -> list[Unit]:
        rows = [labelled(group) for group in groups]
        if self._classifier is not None and groups:
            for row, ratio in zip(rows, self.density_ratios(groups), strict=True):
                row.scalar["density_ratio"] = ratio
        return [(row,) for row in rows]

    def density_ratios(self, groups: Sequence[Group]) -> list[float]:
        """p/(1 − p) of each prompt, within its bounds; p is the classifier's probability of a good answer."""
        assert self._classifier is not None
        ratios = ops.odds(self._encode(groups), self._classifier)
        found: list[float] = ratios.clamp(self.config.min_density_ratio, self.config.max_density_ratio).tolist()
        return found

    def annotate(self, batch: Batch, world: World) -> Batch:
        """δ moves by the rewards of this step, then stands for it."""
        reward = self.config.beta * ops.sequence_sum(batch["policy.logps"] - batch["reference.logps"], batch["mask"])
        reward, row, label = reward.double(), batch["row"], batch["label"] > 0
        means, counts = {}, {}
        for name, members in (("all", row), ("desirable", row & label), ("undesirable", row & ~label)):
            means[name] = float(world.mean(reward, members))
            counts[name] = float(world.sum(members.sum()))
        spread = float(world.sum((reward - means["all"]).square().where(row, 0.0).sum()))
        self._learn(means, counts, spread)
        return self.annotate_held_out(batch, world)

    def annotate_held_out(self, batch: Batch, world: World) -> Batch:
        """δ as training left it."""
        reference = ops.sequence_sum(batch["reference.logps"], batch["mask"]).abs()
        size = reference + world.mean(reference, batch["row"])
        std = sqrt(self._deviations / (self._count - 1)) if self._count > 1 else 0.0
        return batch.with_columns(
            {
                "delta": torch.full_like(reference, self._delta()),
                "reward_std": torch.full_like(reference, std),
                "rounding": 4 * torch.finfo(reference.dtype).eps * self.config.beta * size,
                "contrast": contrast(batch, world),
            }
        )

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        beta, mask, row, label = self.config.beta, batch["mask"], batch["row"], batch["label"] > 0
        logps, reference = (ops.sequence_sum(x, mask) for x in (out.logps, batch["reference.logps"]))
        value = bco_loss(logps - reference, label, batch["delta"], beta)
        distance = beta * (logps - reference) - batch["delta"]
        # before the first step all rewards are rounding, which must not count as right or wrong
        right = torch.where(label, distance, -distance) > batch["rounding"]
        metrics = label_metrics(batch, logps, reference, beta)
        metrics["rewards/accuracies"] = Metric.mean(right.to(value.dtype), row)
        metrics["rewards/mean"] = Metric.mean(beta * (logps - reference), row)
        metrics["delta"] = Metric.mean(batch["delta"], row)
        metrics["reward_std"] = Metric.mean(batch["reward_std"], row)
        if "density_ratio" in batch:
            ratio, undesirable = batch["density_ratio"], row & ~label
            value = torch.where(label, value, ratio * value)
            metrics["density_ratio/mean"] = Metric.mean(ratio, undesirable)
            metrics["density_ratio/min"] = Metric.extreme(ratio, undesirable, "min")
            metrics["density_ratio/max"] = Metric.extreme(ratio, undesirable, "max")
        return {"policy": Term(value, over="row")}, metrics

    def at_reference(self) -> Mapping[str, float]:
        weighted = self.config.match_underlying_distribution  # then the loss depends on who is in the batch
        return {"rewards/margins": 0.0, **({} if weighted else {"loss": log(2)})}

    def state_dict(self) -> dict[str, Any]:
        return {
            "moments": [self._count, self._mean, self._deviations],
            "decayed": self._decayed,
            "classifier": self._classifier,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count, self._mean, self._deviations = state["moments"]
        self._decayed, self._classifier = dict(state["decayed"]), state["classifier"]

    def _learn(self, means: Mapping[str, float], counts: Mapping[str, float], spread: float) -> None:
        """Merge the statistics of one step into those so far; `spread` sums squared deviations from its mean."""
        new, total = counts["all"], self._count + counts["all"]
        if not new:
            return
        apart = means["all"] - self._mean
        self._deviations += spread + apart**2 * self._count * new / total
        self._mean, self._count = self._mean + apart * new / total, total
        decay = 0.9 if self.config.delta_ema is None else self.config.delta_ema
        for name in (name for name, count in counts.items() if count):
            before = self._decayed.get(name, means[name])
            self._decayed[name] = decay * before + (1 - decay) * means[name]

    def _delta(self) -> float:
        """0 before anything was seen; of one class alone its mean."""
        if self.config.delta_mode == "class_balanced":
            seen = [self._decayed[name] for name in ("desirable", "undesirable") if name in self._decayed]
            return sum(seen) / len(seen) if seen else 0.0
        return self._mean if self.config.delta_ema is None else self._decayed.get("all", 0.0)

    def _encode(self, groups: Sequence[Group]) -> Tensor:
        """[n, d] features of the prompts."""
        if self._encoder is None:
            return ops.count_tokens([group.prompt for group in groups])
        texts = ["\n".join(message.get("content") or "" for message in group.messages) for group in groups]
        features = torch.as_tensor(self._encoder(texts)).cpu()
        if features.ndim != 2 or len(features) != len(texts):
            raise DataError(
                f"algorithm.encoder {self.config.encoder!r} answers {len(texts)} prompts with the shape "
                f"{tuple(features.shape)}; expected ({len(texts)}, d), a row of features each"
            )
        return features
