"""AEPO: the bundle that its name stands for."""

import pytest
import torch

from alignkit.algorithms.grpo import GRPO
from alignkit.core import register
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.types import Forward
from alignkit.dist.world import LocalWorld
from tests.algorithms.fakes import averages, reduce_terms
from tests.algorithms.test_pama import LENGTH, rewarded


def test_two_groups_by_hand():
    entry = register.algorithm.get("aepo")
    made = GRPO(entry.target.config_type(**{"name": "aepo", **entry.preset}))
    made.take_facts(RolloutFacts(2, 8, {"aer": 1.0}, CombineConfig()))
    assert made.needs.columns == {"policy.logps", "behaviour.weight"}
    batch = rewarded({}, [0, 0, 0, 1, 1])
    batch = made.annotate(batch.with_columns({"reward": torch.tensor([2.0, 0.5, 0.5, 1.0, 1.0])}), LocalWorld())
    assert batch["advantage"][:, 1].tolist() == pytest.approx([1.5, -0.75, -0.75, 0, 0])
    ratio = torch.tensor([1.35, 1.0, 0.7, 1.0, 1.0]).log()[:, None].expand(5, LENGTH + 1).where(batch["mask"], 0.0)
    terms, metrics = made.loss(Forward(ratio), batch)
    # 1.35 is within 1 + 0.4; 0.7 is below 1 − 0.2, where a negative advantage is clipped
    assert reduce_terms(terms, batch).item() == pytest.approx(-(1.35 * 1.5 - 0.75 - 0.8 * 0.75) / 5)
    assert averages({k: m for k, m in metrics.items() if m.how == "mean"})["clip_ratio/low_mean"] == pytest.approx(0.2)
