"""Regularized Preference Optimization: DPO with an imitation term. Liu et al. 2024, arXiv 2405.16436, the RPO objective
in its batch form (`sum`), and the two means of the authors' README and of TRL.

Deviations: the three imitation terms in use differ by orders of magnitude at one η, so a recipe that sets `eta` must
also name `sft_normalization`. Of the losses on the margin only the logistic one is here, with label smoothing.
`rpo/grad_share_sft` compares slopes on log-probabilities, in closed form, not norms of the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

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
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.lazy import torch
from alignkit.core.pairs import best_worst, chosen_tokens, pair_metrics
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor

_USUAL: dict[str, dict[str, float]] = {"sum": {"beta": 0.05, "eta": 0.005}}
"""Defaults that belong to a normalization, where they are not those of the fields."""


class RPOConfig(AlgorithmConfig):
    """RPO's own keys."""

    beta: float = Field(0.5, gt=0, description="tether to the reference; dimensionless; default 0.05 with `sum`")
    eta: float = Field(0.2, ge=0, description="weight of the imitation term; 0 = dpo; default 0.005 with `sum`")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels (conservative DPO)")
    sft_normalization: Literal["sum", "seq_mean", "token_mean"] = Field(
        "seq_mean",
        description="the imitation term: η·β·(−log π(chosen)), η·(its mean over a row's tokens), or η·(mean over all "
        "chosen tokens of the batch); to be named wherever `eta` is",
    )

    @model_validator(mode="before")
    @classmethod
    def _eta_names_its_scale(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if "eta" in values and "sft_normalization" not in values:
            raise ValueError(
                "`eta` has another scale under each `sft_normalization`: name it too (sum, seq_mean or token_mean)"
            )
        return {**_USUAL.get(str(values.get("sft_normalization")), {}), **values}


@register.algorithm("rpo")
class RPO(Algorithm[RPOConfig]):
    """Preference pairs against a frozen reference, and the chosen answers imitated."""

    needs = Needs(completions=2, columns=frozenset({"reference.logps"}), preferences=True)

    def build(self, groups: list[Group]) -> list[Unit]:
        return [best_worst(group) for group in groups]

    def annotate(self, batch: Batch, world: World) -> Batch:
        """The tokens of chosen answers, and for `token_mean` their mean number, which is the batch's."""
        chosen = chosen_tokens(batch)
        if self.config.sft_normalization != "token_mean":
            return batch.with_columns({"chosen": chosen})
        lengths = batch.by_unit(chosen.sum(-1)).sum(1).double()
        mean = world.mean(lengths, batch["unit"])
        return batch.with_columns({"chosen": chosen, "chosen_length": torch.full_like(lengths, float(mean))})

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        mask, beta = batch["mask"], self.config.beta
        chosen, rejected = batch.by_unit(ops.sequence_sum(out.logps, mask)).unbind(1)
        ref_chosen, ref_rejected = batch.by_unit(ops.sequence_sum(batch["reference.logps"], mask)).unbind(1)
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        terms = {"preference": Term(ops.logistic_pair(margin, self.config.label_smoothing), over="unit")}
        lengths = batch.by_unit(mask)[:, 0].sum(-1).clamp(min=1).to(chosen.dtype)
        imitation = self._imitation(out, batch, chosen, lengths)
        if imitation.weight > 0:  # not 0 · term: at η = 0 loss and gradient are DPO's to the last bit
            terms["sft"] = imitation
        metrics = pair_metrics(batch, chosen, rejected, ref_chosen, ref_rejected, beta)
        metrics["nll_loss"] = Metric.mean(-out.logps, batch["chosen"])
        metrics["rpo/sft_term"] = Metric.mean(imitation.weight * imitation.value, batch[imitation.over])
        metrics["rpo/grad_share_sft"] = self._sft_share(batch, margin.detach(), lengths)
        return terms, metrics

    def _imitation(self, out: Forward, batch: Batch, chosen: Tensor, lengths: Tensor) -> Term:
        match self.config.sft_normalization:
            case "sum":
                return Term(-chosen, over="unit", weight=self.config.eta * self.config.beta)
            case "seq_mean":
                return Term(-chosen / lengths, over="unit", weight=self.config.eta)
            case _:
                return Term(-out.logps, over="chosen", weight=self.config.eta)

    def _sft_share(self, batch: Batch, margin: Tensor, lengths: Tensor) -> Metric:
        """Σ |slope of the imitation term| / Σ (the same + |slope of the preference term|) over the chosen tokens."""
        preference = self.config.beta * (torch.sigmoid(-margin) - self.config.label_smoothing).abs()
        match self.config.sft_normalization:
            case "sum":
                sft = torch.full_like(margin, self.config.eta * self.config.beta)
            case "seq_mean":
                sft = self.config.eta / lengths
            case _:
                sft = self.config.eta / batch["chosen_length"].clamp(min=1).to(margin.dtype)
        unit = batch["unit"]
        return Metric(
            (lengths * sft).where(unit, 0.0).double().sum(),
            (lengths * (sft + preference)).where(unit, 0.0).double().sum(),
        )

    def at_reference(self) -> Mapping[str, float]:
        return {"loss/preference": log(2), "rewards/margins": 0.0}
