"""Group Relative Policy Optimization and its relatives. Shao et al. 2024, arXiv 2402.03300.

A prompt's completions are compared with each other, so that no critic is needed. What the relatives change is one of
four things: how an advantage is made of rewards, how a ratio of tokens or whole answers, what is taken of both, and
what a mean is over. Presets: dr_grpo (arXiv 2503.20783), dapo (2503.14476), gspo (2507.18071), rloo (2402.14740),
reinforce_pp and reinforce_pp_baseline (2501.03262), cispo (2506.13585), bnpo (as TRL names it), sapo (2511.20347),
luspo (2602.05261), opo (2505.23585), gmpo (2507.20673), vespo (2602.10693).

Deviations: a group of one has advantage 0. An empty completion counts as a row, and so does one that the overlong
filter leaves without a token. In reinforce_pp the return passes through tokens that are not trained. k3 ends at 10.
`delta` is from INTELLECT-2 (2505.07291), the dual clip from 1912.09729.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isnan
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import Algorithm, Batch, Forward, Group, Metric, Metrics, Needs, Terms, Unit, World, register
from alignkit.core.answers import answer_units
from alignkit.core.config import CombineConfig, OnlineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.errors import RecipeError
from alignkit.core.lazy import torch
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.ops.credit import GroupForm

OLD, REFERENCE, WEIGHT = "policy.logps", "reference.logps", "behaviour.weight"
FORMS = ("group_std", "group", "batch_std", "rloo")
"""Advantages that several rewards can be given apart."""


class GRPOConfig(OnlineConfig):
    """The keys of grpo and its relatives; a registered name sets its own."""

    advantage: Literal["group_std", "group", "batch_std", "rloo", "opo", "reinforce_pp", "reinforce_pp_baseline"] = (
        Field("group_std", description="how a reward becomes an advantage")
    )
    ratio: Literal["token", "sequence", "sum"] = Field(
        "token", description="π/π_old of each token, their geometric mean over an answer, or their product"
    )
    surrogate: Literal["clip", "cispo", "sapo", "gmpo", "vespo"] = Field("clip", description="what is maximised")
    aggregation: Literal["seq_mean", "token_mean", "fixed", "seq_sum"] = Field(
        "seq_mean",
        description="the mean over answers of their token means, over all tokens, over answers × the longest possible "
        "length, or over answers of their sums",
    )
    beta: float = Field(0.04, ge=0, description="of the k3 divergence from the reference, in the loss; 0 = none")
    kl_is_correction: bool = Field(False, description="multiply that divergence by the token ratio")
    kl_coef: float = Field(0.0, ge=0, description="κ of the k1 divergence from the reference, in the reward; 0 = none")
    epsilon_low: float = Field(0.2, ge=0, description="a ratio below 1 − this no longer counts")
    epsilon_high: float = Field(0.2, ge=0, description="a ratio above 1 + this no longer counts")
    delta: float | None = Field(None, gt=1, description="upper bound of the unclipped ratio; null = none")
    dual_clip: float | None = Field(None, gt=1, description="of a negative advantage at most so often; null = no bound")
    clip_max: float = Field(5.0, gt=0, description="cispo: upper bound of the ratio itself")
    tau_positive: float = Field(1.0, gt=0, description="sapo: temperature of the soft clip, advantages above 0")
    tau_negative: float = Field(1.05, gt=0, description="sapo: temperature of the soft clip, others")
    gamma: float = Field(1.0, gt=0, le=1, description="reinforce_pp: discount a token")
    advantage_eps: float = Field(1e-4, ge=0, description="added to a standard deviation before dividing by it")
    min_std: float = Field(0.0, ge=0, description="a group whose rewards spread less has advantage 0")
    dynamic_sampling: bool = Field(False, description="replace groups all of whose rewards are equal by other prompts")
    max_refills: int = Field(4, ge=1, description="how often a round draws prompts anew for dynamic_sampling")
    overlong_filter: bool = Field(False, description="completions cut off at the limit of length are not learned from")
    overlong_cache: float = Field(
        0.0,
        ge=0,
        description="tokens before that limit in which the reward falls by up to 1; below 1 a share of the limit; 0 = "
        "none",
    )

    @model_validator(mode="after")
    def _fits(self) -> GRPOConfig:
        whole = self.ratio != "token" or self.surrogate == "gmpo"
        if self.advantage == "reinforce_pp" and whole:
            raise ValueError("advantage reinforce_pp is of tokens: ratio must be token, and surrogate not gmpo")
        if self.ratio != "token" and self.surrogate in ("gmpo", "vespo"):
            raise ValueError(f"surrogate {self.surrogate} makes a ratio of its own; leave ratio at token")
        if self.surrogate != "clip" and (self.delta is not None or self.dual_clip is not None):
            raise ValueError(f"delta and dual_clip are bounds of surrogate clip; {self.surrogate} reads neither")
        if self.gamma != 1 and self.advantage != "reinforce_pp":
            raise ValueError(f"gamma discounts returns of tokens; advantage {self.advantage} has none")
        if self.kl_is_correction and not self.beta:
            raise ValueError("kl_is_correction is about the divergence in the loss, and beta is 0")
        return self


@register.algorithm("dr_grpo", advantage="group", aggregation="fixed", beta=0.0)
@register.algorithm(
    "dapo",
    epsilon_high=0.28,
    aggregation="token_mean",
    beta=0.0,
    dynamic_sampling=True,
    overlong_filter=True,
    overlong_cache=0.2,
)
@register.algorithm("gspo", ratio="sequence", epsilon_low=3e-4, epsilon_high=4e-4, beta=0.0)
@register.algorithm("rloo", advantage="rloo", ratio="sum", beta=0.0, kl_coef=0.03)
@register.algorithm("reinforce_pp", advantage="reinforce_pp", aggregation="token_mean", beta=0.0, kl_coef=0.01)
@register.algorithm(
    "reinforce_pp_baseline", advantage="reinforce_pp_baseline", aggregation="token_mean", beta=0.0, kl_coef=0.01
)
@register.algorithm("cispo", surrogate="cispo", aggregation="token_mean", beta=0.0)
@register.algorithm("bnpo", aggregation="token_mean", beta=0.0)
@register.algorithm("sapo", surrogate="sapo", beta=0.0)
@register.algorithm("luspo", ratio="sequence", aggregation="seq_sum", epsilon_low=3e-4, epsilon_high=4e-4, beta=0.0)
@register.algorithm("opo", advantage="opo", aggregation="token_mean", beta=0.0)
@register.algorithm("gmpo", surrogate="gmpo", epsilon_low=0.4, epsilon_high=0.4, beta=0.0)
@register.algorithm("vespo", surrogate="vespo", aggregation="token_mean", beta=0.0)
@register.algorithm("grpo")
class GRPO(Algorithm[GRPOConfig]):
    """Rewards compared within a prompt → clipped policy gradient."""

    needs = Needs(
        columns=frozenset({OLD, REFERENCE, WEIGHT}),
        rewards=True,
        vector=True,
    )

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(config)
        used = {OLD, WEIGHT} | ({REFERENCE} if config.beta or config.kl_coef else set())
        refills = config.max_refills if config.dynamic_sampling else 0
        alone = config.advantage == "reinforce_pp"
        self.needs = replace(self.needs, columns=frozenset(used), refills=refills, completions=1 if alone else 2)
        self._facts = RolloutFacts(0, 0, {}, CombineConfig())

    def take_facts(self, facts: RolloutFacts) -> None:
        """Lengths and the rewards to be kept apart.

        Raises:
            RecipeError: the recipe asks for advantages of several rewards that this config, or their weights, rule out.
        """
        self._facts = facts
        if self._objectives:
            self._check_objectives(facts.combine)

    def _check_objectives(self, combine: CombineConfig) -> None:
        config, weights = self.config, [self._facts.weights[name] for name in self._objectives]
        alone = {"kl_coef": config.kl_coef, "overlong_cache": config.overlong_cache}
        for key in (key for key, value in alone.items() if value):
            raise RecipeError(
                f"algorithm.{key}: it changes the one reward of a completion, and combine.level: advantage keeps "
                "several apart; set it to 0 (`beta` is a divergence beside them, `length` a reward of its own)"
            )
        if config.advantage not in FORMS:
            raise RecipeError(
                f"algorithm.advantage: {config.advantage} is of one reward, and combine.level: advantage keeps several "
                f"apart; set one of {', '.join(FORMS)}, or level: reward"
            )
        if combine.mode != "pama":
            return
        if any(weight < 0 for weight in weights):
            raise RecipeError("rewards: combine.mode pama cannot work against a reward; turn its scores round instead")
        if combine.solver == "projection" and len(set(weights)) > 1:
            raise RecipeError(
                "rewards: combine.solver projection takes what all rewards agree on, whatever they weigh; give them "
                "equal weights, or set solver: min_norm"
            )

    @property
    def _objectives(self) -> list[str]:
        """Rewards whose advantages are merged; none where rewards are."""
        if self._facts.combine.level != "advantage":
            return []
        return [name for name, weight in self._facts.weights.items() if weight]

    def count_units(self, group: Group) -> int:
        """A unit is one completion."""
        return len(group.completions)

    def keeps(self, group: Group) -> bool:
        """Whether two rewards of the group differ, where only such groups are wanted."""
        if not self.config.dynamic_sampling:
            return True
        combined = {c.reward for c in group.completions if not isnan(c.reward)}
        apart = [{c.scores[name].value for c in group.completions if c.scores[name].valid} for name in self._objectives]
        return any(len(values) > 1 for values in [combined, *apart])

    def build(self, groups: list[Group]) -> list[Unit]:
        """A unit is one completion."""
        return answer_units(groups, self._objectives)

    def annotate(self, batch: Batch, world: World) -> Batch:
        """`advantage` [N, L] on trained tokens."""
        config, mask = self.config, batch["mask"]
        rewards = self._rewards(batch, mask)
        if config.overlong_filter:
            mask = mask & (batch["ended"] > 0)[:, None]
        if config.dynamic_sampling:
            told = [batch["reward"], *(batch[f"objective.{name}"] for name in self._objectives)]
            told = [reward.where(batch["row"], float("nan")) for reward in told]
            signal = torch.stack([ops.has_signal(reward, batch["group"]) for reward in told]).any(0)
            batch = batch.with_columns({"signal": signal.float()})
        if self._objectives:
            return batch.with_columns({"mask": mask, **self._merged(batch, mask, world)})
        advantages = self._advantages(batch, rewards, mask, world)
        return batch.with_columns({"mask": mask, "advantage": advantages})

    def _rewards(self, batch: Batch, mask: Tensor) -> Tensor:
        """[N]: what is compared, nan where nothing was said."""
        config, rewards = self.config, batch["reward"].where(batch["row"], float("nan"))
        if config.overlong_cache:
            longest = self._facts.max_completion_length
            share = config.overlong_cache
            cache = max(1, round(share * longest)) if share < 1 else int(share)
            rewards = rewards + ops.overlong_punishment(mask.sum(-1), longest, cache)
        if config.kl_coef and config.advantage != "reinforce_pp":
            rewards = rewards - config.kl_coef * ops.sequence_sum(batch[OLD] - batch[REFERENCE], mask)
        return rewards

    def _advantages(self, batch: Batch, rewards: Tensor, mask: Tensor, world: World) -> Tensor:
        """[N, L] on masked tokens; 0 without a reward."""
        config, group = self.config, batch["group"]
        if config.advantage == "reinforce_pp":
            scored = ~rewards.isnan()
            where = mask & scored[:, None]
            kl = batch[OLD] - batch[REFERENCE] if config.kl_coef else torch.zeros_like(batch[OLD])
            told = ops.token_rewards(rewards.where(scored, 0.0), kl, where, config.kl_coef)
            return ops.whiten(ops.discounted_returns(told, where, config.gamma), where, total=world.sum)
        advantages = ops.to_tokens(self._compared(rewards, group, batch["mask"], world), mask)
        if config.advantage == "reinforce_pp_baseline":
            return ops.whiten(advantages, mask & ~rewards.isnan()[:, None], total=world.sum)
        return advantages

    def _compared(self, rewards: Tensor, group: Tensor, mask: Tensor, world: World) -> Tensor:
        """One reward [N] → advantages [N]."""
        config = self.config
        match config.advantage:
            case "opo":
                return ops.opo_advantages(rewards, mask.sum(-1), group)
            case "group_std" | "group" | "batch_std" | "rloo":
                form = config.advantage
            case _:
                form = "group"
        return ops.group_advantages(
            rewards, group, form, eps=config.advantage_eps, min_std=config.min_std, total=world.sum
        )

    def _merged(self, batch: Batch, mask: Tensor, world: World) -> dict[str, Tensor]:
        """Several rewards, each compared in its group → `advantage` [N, L], and what is logged of how it came about."""
        combine, group, names = self._facts.combine, batch["group"], self._objectives
        rewards = torch.stack([batch[f"objective.{name}"] for name in names], 1)
        rewards = rewards.masked_fill(~batch["row"][:, None], float("nan"))
        weights = torch.tensor([self._facts.weights[name] for name in names], dtype=torch.float64)
        if combine.mode == "sum":
            form, eps, least = cast("GroupForm", self.config.advantage), self.config.advantage_eps, self.config.min_std
            merged = ops.merged_advantages(rewards, weights, group, form=form, eps=eps, min_std=least, total=world.sum)
            return {"advantage": ops.to_tokens(merged, mask)}
        each = torch.stack([self._compared(reward, group, mask, world) for reward in rewards.unbind(1)], -1)
        each = ops.filled(each, ~rewards.isnan())
        if combine.solver != "projection":
            each = each / weights.to(each.dtype)  # the smaller one counts for more, so a wish divides
        each = each.clamp(min=0.0) if combine.noon else each
        tokens = each[:, None].expand(*mask.shape, -1)
        if combine.solver == "projection":
            granularity = combine.granularity
            found = ops.pareto_advantages(tokens, mask, granularity=granularity, noon=combine.noon, total=world.sum)
            shares = ops.least_shares(each)
        else:
            gram = ops.advantage_gram(tokens, mask, total=world.sum)
            solve = ops.diagonal_weights if combine.solver == "diagonal" else ops.min_norm_weights
            solved = solve(gram).to(each.dtype)
            found, shares = ops.to_tokens(each @ solved, mask), solved.expand_as(each)
        return {
            "advantage": found,
            "pama.least": ops.to_tokens(each.amin(-1), mask),
            "pama.most": ops.to_tokens(each.amax(-1), mask),
            **{f"objective_weight.{name}": share for name, share in zip(names, shares.unbind(1), strict=True)},
        }

    def _objective_metrics(self, batch: Batch) -> Metrics:
        """What each reward kept apart was, and what it counted for."""
        metrics: Metrics = {}
        for name in self._objectives:
            reward = batch[f"objective.{name}"]
            metrics[f"objectives/{name}/reward"] = Metric.mean(reward, batch["row"] & ~reward.isnan())
            if (weight := f"objective_weight.{name}") in batch:
                metrics[f"objectives/{name}/weight"] = Metric.mean(batch[weight], batch["row"])
        if "pama.least" in batch:
            mask = batch["mask"]
            metrics["pama/a_min"] = Metric.mean(batch["pama.least"], mask)
            metrics["pama/a_max"] = Metric.mean(batch["pama.most"], mask)
            metrics["pama/frac_zero"] = Metric.mean((batch["advantage"] == 0).float(), mask)
        return metrics

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        """The clipped surrogate and, with β, the divergence from the reference."""
        config, mask = self.config, batch["mask"]
        token_ratio = ops.token_ratio(out.logps, batch[OLD], mask)
        value = self._surrogate(out.logps, batch, token_ratio) * batch[WEIGHT]
        terms = {"policy": self._term(value, mask)}
        metrics = {
            "ratio/mean": Metric.mean(token_ratio, mask),
            "ratio/min": Metric.extreme(token_ratio, mask, "min"),
            "ratio/max": Metric.extreme(token_ratio, mask, "max"),
        }
        metrics |= self._objective_metrics(batch)
        if "signal" in batch:
            metrics["frac_with_signal"] = Metric.mean(batch["signal"], batch["row"])
        if config.surrogate not in ("sapo", "vespo"):
            metrics |= self._clip_metrics(out.logps.detach(), batch, token_ratio.detach())
        if config.beta:
            kl = ops.kl_estimate(out.logps, batch[REFERENCE], "k3").where(mask, 0.0)
            metrics["kl"] = Metric.mean(kl, mask)
            terms["kl"] = self._term(kl * token_ratio if config.kl_is_correction else kl, mask, config.beta)
        elif config.kl_coef:
            metrics["kl"] = Metric.mean(ops.kl_estimate(out.logps, batch[REFERENCE], "k3"), mask)
        return terms, metrics

    def _clip_metrics(self, logps: Tensor, batch: Batch, token_ratio: Tensor) -> Metrics:
        """How much the clip holds back: shares of tokens, or of answers where whole answers have a ratio."""
        config, mask, advantages = self.config, batch["mask"], batch["advantage"]
        ratio, bounds = self._ratio(logps, batch, token_ratio), (config.epsilon_low, config.epsilon_high)
        if config.surrogate == "cispo":
            bounds = (1.0, config.clip_max - 1)  # a ratio is never below 0
        elif config.surrogate == "gmpo":
            ratio = 1 + ops.log_ratios(logps, batch[OLD], mask)  # its bounds are of logarithms
        low, high = ops.clip_hits(ratio, advantages, *bounds)
        over = mask
        if config.ratio != "token":
            low, high, over = (low & mask).any(-1), (high & mask).any(-1), batch["row"]
        return {
            "clip_ratio/low_mean": Metric.mean(low.float(), over),
            "clip_ratio/high_mean": Metric.mean(high.float(), over),
            "clip_ratio/region_mean": Metric.mean((low | high).float(), over),
        }

    def _ratio(self, logps: Tensor, batch: Batch, token_ratio: Tensor) -> Tensor:
        """[N, L]: what is clipped, on every token."""
        match self.config.ratio:
            case "token":
                return token_ratio
            case "sequence":
                return ops.sequence_ratio(logps, batch[OLD], batch["mask"])[:, None].expand_as(logps)
            case "sum":
                return ops.sum_ratio(logps, batch[OLD], batch["mask"])[:, None].expand_as(logps)

    def _surrogate(self, logps: Tensor, batch: Batch, token_ratio: Tensor) -> Tensor:
        """[N, L]: what a token is to lower; of a whole answer the same on each of its tokens."""
        config, mask, advantages = self.config, batch["mask"], batch["advantage"]
        ratio = self._ratio(logps, batch, token_ratio)
        match config.surrogate:
            case "clip":
                bounds = {"upper": config.delta, "dual": config.dual_clip}
                return ops.clipped_surrogate(ratio, advantages, config.epsilon_low, config.epsilon_high, **bounds)
            case "cispo":
                return ops.cispo_surrogate(logps, ratio, advantages, config.clip_max)
            case "sapo":
                return ops.sapo_surrogate(ratio, advantages, config.tau_positive, config.tau_negative)
            case "gmpo":
                row = ops.sequence_mean(advantages, mask)
                value = ops.gmpo_surrogate(logps, batch[OLD], mask, row, config.epsilon_low, config.epsilon_high)
                return value[:, None].expand_as(logps)
            case "vespo":
                return ops.vespo_surrogate(logps, batch[OLD], mask, advantages)

    def _term(self, value: Tensor, mask: Tensor, weight: float = 1.0) -> Term:
        """What is averaged over what."""
        match self.config.aggregation:
            case "seq_mean":
                return Term(ops.sequence_mean(value, mask), over="row", weight=weight)
            case "token_mean":
                return Term(value, over="mask", weight=weight)
            case "fixed":
                longest = self._facts.max_completion_length
                return Term(ops.sequence_sum(value, mask) / longest, over="row", weight=weight)
            case "seq_sum":
                return Term(ops.sequence_sum(value, mask), over="row", weight=weight)

    def at_reference(self) -> Mapping[str, float]:
        """Before the first step nothing has moved away."""
        return {"kl": 0.0} if REFERENCE in self.needs.columns else {}
