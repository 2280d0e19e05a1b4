"""Multi-objective GRPO: rewards are compared first and added up then."""

import pytest
import torch

from alignkit.algorithms.grpo import GRPO, GRPOConfig
from alignkit.algorithms.mo_grpo import MoGRPO
from alignkit.core import register
from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.dist.world import LocalWorld
from tests.algorithms.test_pama import NAN, ONE_GROUP, TWO, merged, rewarded


def advantages(columns, weights=None, **keys):
    made = MoGRPO(GRPOConfig(name="mo_grpo", **{"advantage_eps": 0.0, "min_std": 1e-6, **keys}))
    return merged(columns, [0] * len(columns["a"]), weights, algorithm=made, mode="sum")[1]["advantage"][:, 1]


def test_two_rewards_by_hand():
    # normalised sums −2, −2, 2, 2 of deviations, then divided by their own deviation
    assert advantages(TWO).tolist() == pytest.approx([-(0.75**0.5), -(0.75**0.5), 0.75**0.5, 0.75**0.5])


def test_the_scale_of_a_reward_does_not_matter_but_its_weight_does():
    found = advantages(TWO)
    torch.testing.assert_close(advantages({**TWO, "a": [7 + 50 * x for x in TWO["a"]]}), found)
    heavy = advantages(TWO, {"a": 3.0, "b": 1.0})
    assert heavy[1] > heavy[0] + 0.1
    summed = GRPO(GRPOConfig(name="grpo"))
    summed.take_facts(RolloutFacts(4, 8, {"a": 1.0, "b": 1.0}, CombineConfig()))
    batch = rewarded(TWO, ONE_GROUP)
    total = batch.with_columns({"reward": 50 * batch["objective.a"] + batch["objective.b"]})
    assert summed.annotate(total, LocalWorld())["advantage"][1, 1] > found[1] + 0.1


def test_equal_and_missing_rewards_give_no_advantage():
    assert advantages({"a": [1.0] * 4, "b": [2.0] * 4}, advantage_eps=1e-4).tolist() == [0.0] * 4
    silent = advantages({"a": [NAN] * 4, "b": TWO["b"]})
    torch.testing.assert_close(silent, advantages({"a": TWO["b"], "b": TWO["b"]}))


def test_the_advantage_of_the_recipe_is_taken():
    centred = advantages(TWO, advantage="group")
    torch.testing.assert_close(centred, advantages(TWO, advantage="group_std"))  # equal spreads
    wide = {**TWO, "a": [10 * x for x in TWO["a"]]}
    assert not torch.allclose(advantages(wide, advantage="group"), centred)


def test_its_name_skips_groups_without_a_spread():
    assert register.algorithm.get("mo_grpo").preset == {"min_std": 1e-6}
