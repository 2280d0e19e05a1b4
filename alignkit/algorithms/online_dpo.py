"""Online DPO: pairs of a policy's own answers, told apart by a judge. Guo et al. 2024, arXiv 2402.04792.

    loss = −log σ(β·(Δ(w) − Δ(l))),  Δ(y) = log π(y) − log π_ref(y)

with w and l the best and worst of a prompt's answers, written by the policy a step ago. Any loss of `dpo` will do; ipo
is that of arXiv 2403.08635.

Deviations: with more than two answers a prompt the best and the worst are the pair. A prompt whose answers are worth
the same has none, where the authors' judge always prefers one.
"""

from __future__ import annotations

from dataclasses import replace

from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.core import Group, Unit, register
from alignkit.core.config import OnlineConfig
from alignkit.core.pairs import OwnPairsConfig, own_pair


class OnlineDPOConfig(OnlineConfig, DPOConfig, OwnPairsConfig):
    """The keys of online_dpo: those of dpo, and which answers are a pair."""


@register.algorithm("online_dpo")
class OnlineDPO(DPO):
    """The best and the worst of a policy's own answers → DPO."""

    needs = replace(DPO.needs, rewards=True, preferences=False, models={"previous": "round", "base": "never"})
    config_type = OnlineDPOConfig
    config: OnlineDPOConfig

    def build(self, groups: list[Group]) -> list[Unit]:
        """A unit is a prompt's pair; a prompt without one has none."""
        return [pair for group in groups if (pair := own_pair(group, self.config)) is not None]
