"""Self-Rewarding Language Models. Yuan et al. 2024, arXiv 2401.10020.

Every round the policy answers prompts, judges its own answers, and learns from the best and worst of each prompt:

    loss = −log σ(β·(Δ(w) − Δ(l))),  Δ(y) = log π(y) − log π_t(y)

with π_t the policy at the beginning of the round. The judge is whatever `rewards` say: the policy as a judge that
writes or chooses (`judge`), the reward it implies (`implicit`, taken where the recipe has no rewards), or anything
else.

Deviations: prompts come from the data, none is invented by the model; fine-tuning on demonstrations and judgements
comes before, as a run of `sft`.
"""

from __future__ import annotations

from dataclasses import replace

from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.core import Group, Unit, register
from alignkit.core.config import IterativeConfig
from alignkit.core.pairs import ROUND_MODELS, ROUND_STARTS, OwnPairsConfig, own_pair


class SelfRewardingConfig(IterativeConfig, DPOConfig, OwnPairsConfig):
    """The keys of self_rewarding: those of dpo, of rounds, and which answers are a pair."""


@register.algorithm("self_rewarding")
class SelfRewarding(DPO):
    """The best and the worst of a policy's own answers, by its own judgement, round by round → DPO."""

    needs = replace(
        DPO.needs, rewards=True, preferences=False, models=ROUND_MODELS, starts=ROUND_STARTS, sources=("implicit",)
    )
    config_type = SelfRewardingConfig
    config: SelfRewardingConfig

    def build(self, groups: list[Group]) -> list[Unit]:
        """A unit is a prompt's pair; a prompt without one has none."""
        return [pair for group in groups if (pair := own_pair(group, self.config)) is not None]
