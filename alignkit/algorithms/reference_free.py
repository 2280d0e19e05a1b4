"""Losses of preference pairs without a reference model: SimPO, CPO, ORPO and SLiC.

SimPO  Meng et al. 2024, arXiv 2405.14734     −log σ(β·(m_w − m_l) − γ), m = log π(y) / tokens of y
CPO    Xu et al. 2024, arXiv 2401.08417       −log σ(β·(s_w − s_l)) + α·NLL(w), s = log π(y)
ORPO   Hong et al. 2024, arXiv 2403.07691     NLL(w) − β·log σ(o_w − o_l), o = m − log(1 − e^m)
SLiC   Zhao et al. 2023, arXiv 2305.10425     max(0, β − s_w + s_l) + λ·(−s_w)

NLL(w) is the token mean over all chosen answers of the optimizer batch. Deviations: ORPO's NLL is of the answer, its
authors' of the prompt too (`orpo_nll_on_prompt`); SLiC's regulariser is on the chosen answer, where the paper has other
targets too, and its defaults are those of the HALOs library, not verified against the paper [R]. SimPO's `cpo_alpha`
and `reward_alpha` are not of its paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

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
    Row,
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


class SimPOConfig(AlgorithmConfig):
    """SimPO's own keys."""

    beta: float = Field(2.0, gt=0, description="scale of the mean log-probability, which is the reward")
    simpo_gamma: float | None = Field(None, ge=0, description="γ, the margin asked for; null = half of beta")
    gamma_beta_ratio: float | None = Field(None, ge=0, description="γ / β, as SimPO's own configs have it")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels")
    reward_alpha: float = Field(0.0, description="AlphaPO: curvature of the reward, (1 − p^−α) / α; 0 = log p")
    cpo_alpha: float = Field(0.0, ge=0, description="weight of the chosen answers' token mean of −log p (CPO-SimPO)")

    @property
    def gamma(self) -> float:
        """The margin γ that is asked for."""
        if self.simpo_gamma is not None:
            return self.simpo_gamma
        return self.beta * (0.5 if self.gamma_beta_ratio is None else self.gamma_beta_ratio)

    @model_validator(mode="after")
    def _one_margin(self) -> Self:
        if self.simpo_gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("`simpo_gamma` is γ and `gamma_beta_ratio` is γ / β: give one of them")
        return self


class CPOConfig(AlgorithmConfig):
    """CPO's own keys."""

    beta: float = Field(0.1, gt=0, description="scale of the log-probability, which is the reward")
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="ipo takes means over tokens")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels; sigmoid only")
    cpo_alpha: float = Field(1.0, ge=0, description="weight of the chosen answers' token mean of −log p")

    @model_validator(mode="after")
    def _smoothing_is_read(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"`label_smoothing` does nothing to {self.loss_type}; remove it")
        return self


class ORPOConfig(AlgorithmConfig):
    """ORPO's own keys."""

    beta: float = Field(0.1, gt=0, description="weight of the odds ratio beside the likelihood (the paper's λ)")
    orpo_nll_on_prompt: bool = Field(False, description="likelihood of prompts too, as in the authors' code")


class SLiCConfig(AlgorithmConfig):
    """SLiC's own keys."""

    beta: float = Field(1.0, gt=0, description="margin asked for between the log-probabilities, in nats")
    nll_weight: float = Field(0.1, ge=0, description="λ, weight of −log p of the chosen answer, summed over it")


def simpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0, alpha: float = 0.0
) -> Tensor:
    """−log σ(β·(r_w − r_l) − γ), unreduced, with r = m, or (1 − e^−αm)/α where α ≠ 0.

    Args: [U] mean log-probabilities in nats; returns [U]. Source: arXiv 2405.14734, eq. 6; α: arXiv 2501.03884.
    """
    difference = alpha_reward(chosen, alpha) - alpha_reward(rejected, alpha)
    return ops.logistic_pair(beta * difference - gamma, label_smoothing)


def alpha_reward(mean_logps: Tensor, alpha: float) -> Tensor:
    """(1 − e^−αm)/α, elementwise; m itself at α = 0. Source: AlphaPO, arXiv 2501.03884."""
    return mean_logps if alpha == 0 else -(-alpha * mean_logps).expm1() / alpha


def cpo_loss(chosen: Tensor, rejected: Tensor, beta: float, loss_type: str, label_smoothing: float = 0.0) -> Tensor:
    """The preference term of CPO, unreduced; [U] log-probabilities in nats, means for ipo. Source: arXiv 2401.08417."""
    if loss_type == "hinge":
        return ops.hinge_pair(beta * (chosen - rejected))
    if loss_type == "ipo":
        return ops.square_pair(chosen - rejected, beta)
    return ops.logistic_pair(beta * (chosen - rejected), label_smoothing)


def slic_loss(chosen: Tensor, rejected: Tensor, margin: float) -> Tensor:
    """max(0, δ − s_w + s_l), unreduced; [U] summed log-probabilities in nats. Source: arXiv 2305.10425."""
    return (margin - chosen + rejected).clamp(min=0)


class _ReferenceFree:
    """What the four share: the best and the worst answer make a pair, and the tokens of the chosen one are marked."""

    needs = Needs(completions=2, preferences=True)

    def build(self, groups: list[Group]) -> list[Unit]:
        return [best_worst(group) for group in groups]

    def annotate(self, batch: Batch, world: World) -> Batch:
        """The tokens of chosen answers, for their likelihood to be counted over."""
        del world
        return batch.with_columns({"chosen": chosen_tokens(batch)})


def _terms(preference: Tensor, out: Forward, weight: float, preference_weight: float = 1.0) -> Terms:
    terms = {"preference": Term(preference, over="unit", weight=preference_weight)}
    return {**terms, "nll": Term(-out.logps, over="chosen", weight=weight)} if weight else terms


def _metrics(out: Forward, batch: Batch, answers: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> Metrics:
    """Those of every paired method. `chosen` and `rejected` [U] are rewards over β; `logps/…` stay sums."""
    sums = batch.by_unit(ops.sequence_sum(out.logps, answers)).unbind(1)
    nothing, lengths = torch.zeros_like(chosen), answers.sum(-1)
    return {
        **pair_metrics(batch, chosen, rejected, nothing, nothing, beta),
        "logps/chosen": Metric.mean(sums[0], batch["unit"]),
        "logps/rejected": Metric.mean(sums[1], batch["unit"]),
        "completions/mean_length": Metric.mean(lengths.to(chosen.dtype), batch["row"]),
        "nll_loss": Metric.mean(-out.logps, batch["chosen"]),
    }


@register.algorithm("simpo")
class SimPO(_ReferenceFree, Algorithm[SimPOConfig]):
    """Preference pairs, no reference: the mean log-probability is the reward, and a margin is asked for."""

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config, mask = self.config, batch["mask"]
        chosen, rejected = batch.by_unit(ops.sequence_mean(out.logps, mask)).unbind(1)
        value = simpo_loss(chosen, rejected, config.beta, config.gamma, config.label_smoothing, config.reward_alpha)
        reward_w, reward_l = alpha_reward(chosen, config.reward_alpha), alpha_reward(rejected, config.reward_alpha)
        return _terms(value, out, config.cpo_alpha), _metrics(out, batch, mask, reward_w, reward_l, config.beta)


@register.algorithm("cpo")
class CPO(_ReferenceFree, Algorithm[CPOConfig]):
    """Preference pairs, no reference: DPO against a uniform one, and the likelihood of chosen answers."""

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config, mask = self.config, batch["mask"]
        reduce = ops.sequence_mean if config.loss_type == "ipo" else ops.sequence_sum
        chosen, rejected = batch.by_unit(reduce(out.logps, mask)).unbind(1)
        value = cpo_loss(chosen, rejected, config.beta, config.loss_type, config.label_smoothing)
        return _terms(value, out, config.cpo_alpha), _metrics(out, batch, mask, chosen, rejected, config.beta)


@register.algorithm("orpo")
class ORPO(_ReferenceFree, Algorithm[ORPOConfig]):
    """Preference pairs, no reference: fine-tuning on chosen answers with a push on the odds ratio."""

    def build(self, groups: list[Group]) -> list[Unit]:
        units = super().build(groups)
        if not self.config.orpo_nll_on_prompt:
            return units
        sizes = [len(group.prompt) for group in groups]
        return [(_with_prompt(w, size), l) for (w, l), size in zip(units, sizes, strict=True)]  # noqa: E741

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        beta, answers, unit = self.config.beta, batch["mask"], batch["unit"]
        if "orpo/prompt" in batch:
            answers = answers & (batch["orpo/prompt"] == 0)
        chosen, rejected = batch.by_unit(ops.sequence_mean(out.logps, answers)).unbind(1)
        log_odds = ops.log_odds(chosen) - ops.log_odds(rejected)
        value = ops.logistic_pair(log_odds)
        metrics = {
            **_metrics(out, batch, answers, chosen, rejected, beta),
            "log_odds_ratio": Metric.mean(-value, unit),
            "log_odds_chosen": Metric.mean(log_odds, unit),
        }
        return _terms(value, out, 1.0, beta), metrics


def _with_prompt(row: Row, size: int) -> Row:
    """The row with its prompt of `size` tokens scored too, all but the first, which nothing predicts."""
    trained = [0 < i < size or was for i, was in enumerate(row.trained)]
    return replace(row, trained=trained, token={"orpo/prompt": [float(i < size) for i in range(len(trained))]})


@register.algorithm("slic")
class SLiC(_ReferenceFree, Algorithm[SLiCConfig]):
    """Preference pairs, no reference: a hinge on log-probabilities, and the likelihood of chosen answers."""

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config, mask = self.config, batch["mask"]
        chosen, rejected = batch.by_unit(ops.sequence_sum(out.logps, mask)).unbind(1)
        terms = {"preference": Term(slic_loss(chosen, rejected, config.beta), over="unit")}
        if config.nll_weight:
            terms["nll"] = Term(-chosen, over="unit", weight=config.nll_weight)
        return terms, _metrics(out, batch, mask, chosen, rejected, 1.0)
