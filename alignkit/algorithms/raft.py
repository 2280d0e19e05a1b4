"""Reward rAnked FineTuning. Dong et al. 2023, arXiv 2304.06767.

Every round the policy answers prompts, and learns from the best of its answers as from demonstrations.

    raft            loss = −mean over tokens of kept answers of  log π
    raft_pp         loss =  mean over tokens of all answers of  −min(ρA, clip(ρ, 1 − ε, 1 + ε)·A), A = 1 if kept, else 0
    reinforce_rej   the same with A = score, 0 for prompts whose scores are all equal

with ρ = π/π_old. The last two are RAFT++ and Reinforce-Rej of Xiong et al. 2025, arXiv 2504.11343.

Deviations: losses are of the answer alone (the authors' code trains on prompts too). An answer without a competitor has
A = 0 in reinforce_rej, where the authors' code keeps its score. In the other two an answer that is cut off or empty is
never kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import (
    Algorithm,
    Batch,
    Completion,
    Forward,
    Group,
    Metric,
    Metrics,
    Needs,
    RecipeError,
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.answers import answer_units
from alignkit.core.config import OnlineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.lazy import torch
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor

OLD, REFERENCE, WEIGHT = "policy.logps", "reference.logps", "behaviour.weight"


class RAFTConfig(OnlineConfig):
    """The keys of raft and its relatives; a registered name sets its own."""

    variant: Literal["raft", "raft_pp", "reinforce_rej"] = Field("raft", description="what is made of the scores")
    selection: Literal["local", "top", "threshold"] = Field(
        "local",
        description="what is kept, but in reinforce_rej: the best answer of each prompt, the best share of the whole "
        "round, or all with a score above 0",
    )
    alpha: float = Field(0.2, gt=0, le=1, description="top: the share that is kept; it needs prompts_per_round")
    drop_truncated: bool = Field(
        True, description="raft, raft_pp: never keep an answer that the limit of length cut off"
    )
    beta: float = Field(0.0, ge=0, description="of the k3 divergence from the reference, in the loss; 0 = none")
    kl_coef: float = Field(0.0, ge=0, description="κ of the k1 divergence from the reference, in the score; 0 = none")
    epsilon_low: float = Field(0.2, ge=0, description="not raft: a ratio below 1 − this no longer counts")
    epsilon_high: float = Field(
        0.2, ge=0, description="raft_pp, reinforce_rej: a ratio above 1 + this no longer counts"
    )

    @model_validator(mode="after")
    def _knows_its_pool(self) -> RAFTConfig:
        if self.pools and self.prompts_per_round is None:
            raise ValueError("selection top keeps a share of a round; say how large that is: prompts_per_round")
        return self

    @property
    def pools(self) -> bool:
        """Whether answers of different prompts compete."""
        return self.selection == "top" and self.variant != "reinforce_rej"


@register.algorithm("raft_pp", variant="raft_pp", beta=0.001)
@register.algorithm("reinforce_rej", variant="reinforce_rej", beta=0.001)
@register.algorithm("raft")
class RAFT(Algorithm[RAFTConfig]):
    """The best of a policy's own answers → likelihood."""

    needs = Needs(columns=frozenset({OLD, REFERENCE, WEIGHT}), rewards=True)

    def __init__(self, config: RAFTConfig) -> None:
        super().__init__(config)
        used = set() if config.variant == "raft" else {OLD, WEIGHT}
        used |= {REFERENCE} if config.beta else set()
        used |= {OLD, REFERENCE} if config.kl_coef else set()
        self.needs = replace(self.needs, columns=frozenset(used))

    def take_facts(self, facts: RolloutFacts) -> None:
        """Refuse a round of which nothing could be kept."""
        config, count = self.config, facts.num_generations
        if config.variant == "reinforce_rej" and count < 2:
            raise RecipeError(
                "rollout.num_generations: reinforce_rej leaves out prompts whose answers are all right or all wrong, "
                f"so it needs 2 answers or more; it is {count}"
            )
        if config.pools:
            assert config.prompts_per_round is not None
            pool = config.prompts_per_round * count
            if int(pool * config.alpha) < 1:
                raise RecipeError(
                    f"algorithm.alpha: {config.alpha:g} of the {pool} answers of a round is less than one, so nothing "
                    f"would be trained on; keep at least {1 / pool:.2g}, or answer more prompts at once"
                )

    def count_units(self, group: Group) -> int:
        """A unit is one completion; those that are not kept train nothing in raft. At most so many are."""
        count = len(group.completions)
        if self.config.variant != "raft" or self.config.selection == "threshold":
            return count
        return 1 if self.config.selection == "local" else ceil(count * self.config.alpha)

    def build(self, groups: list[Group]) -> list[Unit]:
        """A unit is one completion."""
        return answer_units(groups, facts=_emptiness)

    def annotate(self, batch: Batch, world: World) -> Batch:
        """What is kept, and with what `advantage` [N]; the mean score of all answers and the share kept, [N]."""
        config, group = self.config, batch["group"]
        scored = batch["row"] & ~batch["reward"].isnan()
        scores = self._scores(batch, scored)
        if config.variant == "reinforce_rej":
            kept = ops.has_signal(scores, group)
            advantage = ops.reinforce_rej_advantages(scores, group)
        else:
            kept = self._selected(scores, group, world)
            weight = ops.raft_advantages(scores) if config.selection == "threshold" else torch.ones_like(scores)
            advantage = weight.where(kept, 0.0)
        everywhere = torch.ones_like(scores)
        return batch.with_columns(
            {
                "mask": batch["mask"] & scored[:, None],
                "unit": kept if config.variant == "raft" else scored,
                "kept": kept,
                "advantage": advantage,
                "pooled_reward": everywhere * world.mean(batch["reward"], scored),
                "kept_share": everywhere * world.mean(kept.float(), scored),
            }
        )

    def _scores(self, batch: Batch, scored: Tensor) -> Tensor:
        """[N]: what is compared, nan where there is nothing to learn from."""
        usable = scored
        if self.config.variant != "reinforce_rej":  # that learns from what is wrong, and these are
            usable = usable & (batch["empty"] == 0)
            if self.config.drop_truncated:
                usable = usable & (batch["ended"] > 0)
        scores = batch["reward"]
        if self.config.kl_coef:
            scores = scores - self.config.kl_coef * ops.sequence_sum(batch[OLD] - batch[REFERENCE], batch["mask"])
        return scores.where(usable, float("nan"))

    def _selected(self, scores: Tensor, group: Tensor, world: World) -> Tensor:
        """[N] bool: the answers that are kept."""
        match self.config.selection:
            case "threshold":
                return scores > 0
            case "local":
                chosen = ops.best_of_groups(scores, group)
            case "top":
                chosen = self._best_of_round(scores, group, world)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[chosen] = True
        return kept

    def _best_of_round(self, scores: Tensor, group: Tensor, world: World) -> Tensor:
        """[N] → places of those among the best share of all processes' answers; a round that is short keeps one."""
        pool: list[tuple[float, int, int, float]] = []
        for rank, told in enumerate(world.gather((scores.tolist(), group.tolist()))):
            pool += [(number, rank, place, score) for place, (score, number) in enumerate(zip(*told, strict=True))]
        pool.sort(key=lambda answer: answer[:3])  # the order of prompts over all processes, so that ties fall alike
        everyone = torch.tensor([answer[-1] for answer in pool], dtype=scores.dtype)
        if int(int((~everyone.isnan()).sum()) * self.config.alpha) < 1:
            best = ops.best_of_groups(everyone, torch.zeros_like(everyone))
        else:
            best = ops.top_fraction(everyone, self.config.alpha)
        mine = [pool[i][2] for i in best.tolist() if pool[i][1] == world.rank]
        return torch.tensor(mine, dtype=torch.long)

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        """Likelihood of what was kept, or the clipped surrogate of everything; with β the divergence from the start."""
        config, mask = self.config, batch["mask"]
        reward, kept = batch["reward"], batch["kept"]
        metrics = {
            "raft/kept_reward": Metric.mean(reward, kept),
            "raft/gap": Metric.mean(reward - batch["pooled_reward"], kept),
            "raft/kept": Metric.mean(batch["kept_share"], batch["row"]),
        }
        if config.variant == "raft":
            value = -out.logps
        else:
            advantage = batch["advantage"][:, None].expand_as(mask)
            ratio = ops.token_ratio(out.logps, batch[OLD], mask)
            value = ops.clipped_surrogate(ratio, advantage, config.epsilon_low, config.epsilon_high) * batch[WEIGHT]
            low, high = ops.clip_hits(ratio.detach(), advantage, config.epsilon_low, config.epsilon_high)
            metrics |= {
                "clip_ratio/low_mean": Metric.mean(low.float(), mask),
                "clip_ratio/high_mean": Metric.mean(high.float(), mask),
                "ratio/mean": Metric.mean(ratio, mask),
            }
        terms = {"policy": Term(value)}
        if config.beta:
            kl = ops.kl_estimate(out.logps, batch[REFERENCE], "k3")
            terms["kl"] = Term(kl, weight=config.beta)
            metrics["kl"] = Metric.mean(kl, mask)
        return terms, metrics

    def at_reference(self) -> Mapping[str, float]:
        """Before the first step nothing has moved away."""
        return {"kl": 0.0} if self.config.beta else {}


def _emptiness(group: Group, completion: Completion) -> Mapping[str, float]:
    """1 where nothing was written."""
    del group
    return {"empty": float(not completion.text.strip())}
