"""Proximal Policy Optimization with a learned critic. Schulman et al. 2017, arXiv 1707.06347.

In the form of Ouyang et al. 2022, arXiv 2203.02155: each token pays for its distance from the reference, the last one
earns the score of the answer, and a critic V says of every place what is still to come.

    r_t = −κ·KL_t + [t is last]·score      A_t = Σ_s (γλ)^s·(r + γV' − V)_{t+s}      G = A + V
    loss = mean over tokens of  −min(ρA, clip(ρ, 1 − ε, 1 + ε)·A) + c·½·max((v − G)², (clip(v, V ± ε_v) − G)²)

with ρ = π/π_old and A whitened over the round. κ may follow a target (arXiv 1909.08593); the dual clip is of
arXiv 1912.09729.

Deviations: an answer cut off at the limit of length is worth 0 behind its last token, as one that ended. Tokens that
are not trained are stepped over. The score stands on the last token, in TRL one behind it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import Algorithm, Batch, Forward, Group, Metric, Metrics, Needs, Terms, Unit, World, register
from alignkit.core.answers import answer_units
from alignkit.core.config import OnlineConfig
from alignkit.core.lazy import torch
from alignkit.core.types import Term

OLD, VALUES, REFERENCE, WEIGHT = "policy.logps", "policy.values", "reference.logps", "behaviour.weight"
HELPER = "~"
"""Begins the names of metrics that others are derived from, and that are not logged."""
ROUNDING = 1e-9
"""A variance below this share of the mean square is what rounding leaves of none."""


class PPOConfig(OnlineConfig):
    """The keys of ppo."""

    epsilon_low: float = Field(0.2, ge=0, description="a ratio below 1 − this no longer counts")
    epsilon_high: float = Field(0.2, ge=0, description="a ratio above 1 + this no longer counts")
    dual_clip: float | None = Field(None, gt=1, description="of a negative advantage at most so often; null = no bound")
    value_clip: float | None = Field(
        0.2, gt=0, description="how far a value may move from that of the round's start and count; null = anywhere"
    )
    value_coef: float = Field(0.1, gt=0, description="c, weight of the critic's loss")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the bonus for entropy; 0 = none")
    gamma: float = Field(1.0, gt=0, le=1, description="γ, discount a token")
    lam: float = Field(0.95, ge=0, le=1, description="λ; 1 = returns as they come, 0 = the critic's word for all later")
    kl_coef: float = Field(
        0.05, ge=0, description="κ of the divergence from the reference, in the reward; 0 = no reference"
    )
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="of that divergence at a token")
    kl_target: float | None = Field(
        None, gt=0, description="nats an answer which κ is moved to keep, once a round; null = κ stays"
    )
    kl_horizon: float = Field(10_000.0, gt=0, description="answers in which κ may grow or fall by a fifth")
    whiten_rewards: bool = Field(False, description="divide token rewards by their standard deviation over the round")
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="taken off the score of an answer that the limit of length cut off"
    )

    @model_validator(mode="after")
    def _can_adapt(self) -> PPOConfig:
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_target multiplies kl_coef, and 0 stays 0; give kl_coef to start from")
        return self


@register.algorithm("ppo")
class PPO(Algorithm[PPOConfig]):
    """Scores and a critic's expectations → clipped policy gradient.

    Its state is κ.
    """

    needs = Needs(
        columns=frozenset({OLD, VALUES, REFERENCE, WEIGHT}), outputs=frozenset({"logps", "values"}), rewards=True
    )

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        unused = set() if config.kl_coef else {REFERENCE}
        outputs = self.needs.outputs | ({"entropy"} if config.entropy_coef else set())
        self.needs = replace(self.needs, columns=self.needs.columns - unused, outputs=outputs)
        self._kl_coef = config.kl_coef

    def count_units(self, group: Group) -> int:
        """A unit is one completion."""
        return len(group.completions)

    def build(self, groups: list[Group]) -> list[Unit]:
        """A unit is one completion."""
        return answer_units(groups)

    def annotate(self, batch: Batch, world: World) -> Batch:
        """Credit of the round; then κ moves, for the next one."""
        credited, config = self.annotate_held_out(batch, world), self.config
        if config.kl_target is not None:
            unit = credited["unit"]
            kl, count = float(world.mean(credited["kl"], unit)), int(world.sum(unit.sum()))
            self._kl_coef = ops.adapted_coefficient(self._kl_coef, kl, config.kl_target, count, config.kl_horizon)
        return credited

    def annotate_held_out(self, batch: Batch, world: World) -> Batch:
        """`advantage` and `return` [N, L] on trained tokens; `score`, `kl` (summed over tokens) and `kl_coef` [N]."""
        config = self.config
        scored = batch["row"] & ~batch["reward"].isnan()
        mask = batch["mask"] & scored[:, None]
        cut_off = batch["ended"] == 0
        score = (batch["reward"] - config.missing_eos_penalty * cut_off).where(scored, 0.0)
        kl = torch.zeros_like(batch[OLD])
        if config.kl_coef:
            kl = ops.kl_estimate(batch[OLD], batch[REFERENCE], config.kl_estimator).where(mask, 0.0)
        rewards = ops.token_rewards(score, kl, mask, self._kl_coef)
        if config.whiten_rewards:
            rewards = ops.whiten(rewards, mask, keep_mean=True, total=world.sum)
        advantages, returns = ops.gae(rewards, batch[VALUES], mask, config.gamma, config.lam)
        return batch.with_columns(
            {
                "mask": mask,
                "unit": scored,
                "score": score,
                "kl": kl.sum(-1),
                "kl_coef": torch.full_like(score, self._kl_coef),
                "advantage": ops.whiten(advantages, mask, total=world.sum),
                "return": returns,
            }
        )

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        """The clipped surrogate, the critic's loss, and with its weight the entropy."""
        config, mask, advantages = self.config, batch["mask"], batch["advantage"]
        values, old_values, returns = out.values, batch[VALUES], batch["return"]
        assert values is not None
        ratio = ops.token_ratio(out.logps, batch[OLD], mask)
        surrogate = ops.clipped_surrogate(
            ratio, advantages, config.epsilon_low, config.epsilon_high, dual=config.dual_clip
        )
        terms = {
            "policy": Term(surrogate * batch[WEIGHT]),
            "value": Term(ops.value_loss(values, returns, old_values, config.value_clip), weight=config.value_coef),
        }
        if config.entropy_coef:
            assert out.entropy is not None
            terms["entropy"] = Term(-out.entropy, weight=config.entropy_coef)
        metrics = self._round_metrics(batch)
        low, high = ops.clip_hits(ratio.detach(), advantages, config.epsilon_low, config.epsilon_high)
        metrics |= {
            "policy/approxkl_avg": Metric.mean(ops.kl_estimate(batch[OLD], out.logps, "k3", largest=None), mask),
            "policy/clipfrac_avg": Metric.mean((low | high).float(), mask),
            "val/ratio": Metric.mean(ratio, mask),
        }
        if config.value_clip is not None:
            hits = ops.value_hits(values.detach(), returns, old_values, config.value_clip)
            metrics["val/clipfrac_avg"] = Metric.mean(hits.float(), mask)
        for name, x in (("return", returns), ("error", returns - old_values)):
            metrics[f"{HELPER}{name}/mean"] = Metric.mean(x, mask)
            metrics[f"{HELPER}{name}/square"] = Metric.mean(x.double().square(), mask)
        return terms, metrics

    def _round_metrics(self, batch: Batch) -> Metrics:
        """What the answers earned before the policy moved."""
        rows, score = batch["row"], batch["score"]
        metrics = {"objective/scores": Metric.mean(score, rows)}
        if self.config.kl_coef:
            paid = -batch["kl_coef"] * batch["kl"]
            metrics |= {
                "objective/kl": Metric.mean(batch["kl"], rows),
                "objective/kl_coef": Metric.mean(batch["kl_coef"], rows),
                "objective/non_score_reward": Metric.mean(paid, rows),
                "objective/rlhf_reward": Metric.mean(score + paid, rows),
            }
        return metrics

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        """Also the share of the variance of returns that the critic explains."""
        logged = {name: value for name, value in metrics.items() if not name.startswith(HELPER)}
        if f"{HELPER}return/mean" in metrics:
            spread, error = (
                metrics[f"{HELPER}{name}/square"] - metrics[f"{HELPER}{name}/mean"] ** 2 for name in ("return", "error")
            )
            if spread > ROUNDING * metrics[f"{HELPER}return/square"]:
                logged["val/explained_variance"] = 1 - error / spread
        return logged

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self._kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kl_coef = state["kl_coef"]
