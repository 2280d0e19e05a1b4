"""Several rewards made one, by hand."""

import math

import pytest
import torch

from alignkit.rewards.combine import product, routed, weighted_sum, worst_case
from alignkit.rewards.table import RewardTable
from alignkit.rewards.transforms import group_norm

SCORES = torch.tensor([[1.0, 4.0], [-2.0, 3.0], [5.0, 6.0]], dtype=torch.float64)
VALID = torch.tensor([[True, True], [True, False], [False, False]])
WEIGHTS = torch.tensor([2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(weighted_sum, [4.0, -4.0, 0.0]), (worst_case, [2.0, -4.0, 0.0]), (product, [4.0, -4.0, 0.0])],
)
def test_only_valid_rewards_take_part(function, expected):
    reward, known = function(SCORES, VALID, WEIGHTS)
    assert reward.tolist() == expected
    assert known.tolist() == [True, True, False]


@pytest.mark.parametrize("function", [weighted_sum, worst_case, product])
def test_a_weight_of_zero_has_no_effect_even_on_nan(function):
    broken = SCORES.clone()
    broken[:, 1] = math.nan
    reward, known = function(broken, torch.ones_like(VALID), torch.tensor([1.0, 0.0]).double())
    assert reward.tolist() == [1.0, -2.0, 5.0]
    assert known.all()
    assert not function(SCORES, VALID, torch.zeros(2).double())[1].any()


@pytest.mark.parametrize("function", [weighted_sum, worst_case, product])
def test_one_reward_is_itself(function):
    reward, _ = function(SCORES[:, :1], VALID[:, :1], torch.ones(1).double())
    assert reward.tolist()[:2] == [1.0, -2.0]


def correlation(x, y):
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x.norm() * y.norm())).item()


def test_where_rewards_are_combined_matters():
    """arXiv 2503.21819: at reward level the larger scale wins, at advantage level each counts as much."""
    first, second = torch.tensor([0.0, 1, 0, 1]).double(), torch.tensor([10.0, 20, 30, 40]).double()
    all_valid, group = torch.ones(4, dtype=torch.bool), torch.zeros(4)
    table = RewardTable({"a": first, "b": second}, {"a": all_valid, "b": all_valid}, group, {}, [""] * 4)
    summed, _ = weighted_sum(*table.stack(["a", "b"]), torch.ones(2).double())
    apart = [group_norm(scores, all_valid, group) for scores in (first, second)]
    assert correlation(group_norm(summed, all_valid, group), first) == pytest.approx(0.48, abs=0.005)
    assert correlation(sum(apart), first) == pytest.approx(0.85, abs=0.005)


def test_routes_compare_as_text():
    assert routed(["a", 7, None], "7") == [False, True, False]
    assert routed(["a", 7, None], None) == [True, True, True]
