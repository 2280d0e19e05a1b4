"""Kahneman-Tversky Optimization. Ethayarajh et al. 2024, arXiv 2402.01306; `apo_zero_unpaired`: arXiv 2408.06266.

Deviations from the paper: none in the loss. Its reference point z0 is estimated, as in the authors' code, from answers
moved on by one row; here over the whole optimizer batch in stream order, before it is cut, with one z0 for all of it.
An answer that meets a prompt it was given to in the same batch is left out of the mean. `humanline` (clamped token
log-ratios) is from the authors' code; the default of its two bounds is our choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignkit import ops
from alignkit.core import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    Forward,
    Group,
    Metric,
    Metrics,
    Needs,
    Row,
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.labels import contrast, is_desirable, label_metrics, labelled
from alignkit.core.lazy import torch
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor

SATURATED = 4.0
"""|β(Δ − z0)| from which a row has almost no gradient left: σ' is below 0.018."""
ADVISED = (1.0, 4 / 3)
"""λ_D·n_D / (λ_U·n_U) that the authors' code and TRL's ask for, n being the rows of a class."""


class KTOConfig(AlgorithmConfig):
    """KTO's own keys."""

    beta: float = Field(0.1, gt=0, description="tether to the reference; dimensionless")
    desirable_weight: float = Field(1.0, gt=0, description="λ_D: how much a good answer counts")
    undesirable_weight: float = Field(1.0, gt=0, description="λ_U: how much a bad answer counts")
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="apo_zero_unpaired: z0 = 0, no KL rows")
    humanline: bool = Field(False, description="clamp token log-ratios to [log_epsilon_p, log_epsilon_r]")
    log_epsilon_p: float = Field(-0.5, le=0, description="lower bound in nats; only with humanline")
    log_epsilon_r: float = Field(0.5, ge=0, description="upper bound in nats; only with humanline")


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """λ·(1 − σ(±β(Δ − z0))), + and λ_D for desirable answers, − and λ_U for the others; unreduced.

    Args: [N] log-ratios Δ and z0 in nats, [N] booleans; returns [N]. Source: arXiv 2402.01306, the loss of KTO.
    """
    distance = beta * (log_ratio - reference_point)
    loss = torch.sigmoid(torch.where(desirable, -distance, distance))
    return torch.where(desirable, desirable_weight * loss, undesirable_weight * loss)


def advise_weights(config: KTOConfig, good: int, bad: int) -> str | None:
    """What to set for so many rows of each class; None where the weights suit them, or there is one class alone."""
    if not good or not bad:
        return None
    low, high = ADVISED
    balance = config.desirable_weight * good / (config.undesirable_weight * bad)
    if 0.99 * low <= balance <= 1.01 * high:  # weights are written with two or three digits
        return None
    if balance < low:
        advised = f"desirable_weight to {config.desirable_weight * low / balance:.3g}"
        advised += f" … {config.desirable_weight * high / balance:.3g}"
    else:
        advised = f"undesirable_weight to {config.undesirable_weight * balance / high:.3g}"
        advised += f" … {config.undesirable_weight * balance / low:.3g}"
    return (
        f"{good} good and {bad} bad answers, weighted {config.desirable_weight:g} and {config.undesirable_weight:g}: "
        f"good ones count {balance:.2g} times as much as bad ones in total, 1 to 4/3 is advised. Set {advised}."
    )


@register.algorithm("kto")
class KTO(Algorithm[KTOConfig]):
    """Thumbs up or down on single answers, a frozen reference, a loss that saturates on both sides of a running KL."""

    needs = Needs(
        columns=frozenset({"reference.logps", "policy.logps"}),
        slots={"policy.logps": (1,)},
        fields=frozenset({"label"}),
        partners=True,
    )

    def prepare(self, groups: Sequence[Group]) -> None:
        """Say so when one class outweighs the other by more than is advised."""
        good = sum(map(is_desirable, groups))
        advice = advise_weights(self.config, good, len(groups) - good)
        if advice:
            warnings.warn(advice, stacklevel=2)

    def build(self, groups: list[Group]) -> list[Unit]:
        """An answer, and its prompt with the answer to another one: only scored, never trained."""
        return [(labelled(group), self._mismatched(group)) for group in groups]

    def annotate(self, batch: Batch, world: World) -> Batch:
        """z0 and the contrast of classes as columns; the mismatched rows have served and go."""
        ratio = self._log_ratio(batch["policy.logps"], batch["reference.logps"], batch["mask"])
        _, drift = batch.by_unit(ratio).unbind(1)
        _, scored = batch.by_unit(batch["mask"].any(-1) & batch["row"]).unbind(1)
        reference_point = world.mean(drift, scored).clamp(min=0.0)
        kept = batch.keep_rows(0)
        return kept.with_columns({"kl": reference_point.repeat(kept.num_rows), "contrast": contrast(kept, world)})

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config, mask, row = self.config, batch["mask"], batch["row"]
        ratio = self._log_ratio(out.logps, batch["reference.logps"], mask)
        weights = (config.desirable_weight, config.undesirable_weight)
        value = kto_loss(ratio, batch["label"] > 0, batch["kl"], config.beta, *weights)
        logps, reference = (ops.sequence_sum(x, mask) for x in (out.logps, batch["reference.logps"]))
        saturated = (config.beta * (ratio - batch["kl"])).abs() > SATURATED
        metrics = label_metrics(batch, logps, reference, config.beta)
        metrics["kl"] = Metric.mean(batch["kl"], row)
        metrics["saturated"] = Metric.mean(saturated.to(value.dtype), row)
        return {"policy": Term(value, over="row")}, metrics

    def at_reference(self) -> Mapping[str, float]:
        config = self.config
        equal = config.desirable_weight == config.undesirable_weight  # else the loss depends on who is in the batch
        return {"rewards/margins": 0.0, **({"loss": config.desirable_weight / 2} if equal else {})}

    def _mismatched(self, group: Group) -> Row:
        """Without a token to score where there is no such answer, or none is asked for."""
        if group.partner is None or self.config.loss_type != "kto":
            return Row(tokens=group.prompt, trained=[False] * len(group.prompt), group=group.id)
        return group.row(group.partner)

    def _log_ratio(self, logps: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """Δ, [N]."""
        ratio = logps - reference
        if self.config.humanline:
            ratio = ratio.clamp(self.config.log_epsilon_p, self.config.log_epsilon_r)
        return ops.sequence_sum(ratio, mask)
