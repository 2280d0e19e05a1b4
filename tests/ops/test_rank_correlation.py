"""Agreement of rankings: the numbers of scipy and of CREAM's code, ties, and what leaves them as they are."""

import pytest
import torch

from alignkit import ops
from tests.shared import golden_case

A = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0], dtype=torch.float64)
B = torch.tensor([2.0, 7.0, 1.0, 8.0, 2.5], dtype=torch.float64)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", ["four", "pair", "many", "ties_in_prediction", "constant_prediction"])
def test_golden_tau(name):
    case = golden_case("urpo.json", f"kendall_{name}")
    tau = ops.kendall_tau(double(case["inputs"]["predicted_scores"]), double(case["inputs"]["true_scores"]))
    assert float(tau) == pytest.approx(case["outputs"]["tau_a"], rel=1e-8, abs=1e-10)
    assert float(tau + 1) / 2 == pytest.approx(case["outputs"]["reward_tau_a_01"], rel=1e-8, abs=1e-10)


RATES = {
    "kendall": lambda a, b: (ops.kendall_tau(a, b) + 1) / 2,
    "spearman": lambda a, b: (ops.spearman_rho(a, b) + 1) / 2,
    "toporder": lambda a, b: ops.same_extremes(a, b, positional=True).double(),
}


@pytest.mark.parametrize("method", RATES)
def test_golden_consistency_of_two_rounds(method):
    case = golden_case("cream.json", f"consistency_{method}")
    now, before = (case["inputs"][f"rewards_{which}"] for which in ("current", "previous"))
    expected = case["outputs"]["rate_per_prompt"]
    found = RATES[method](double([now[name] for name in expected]), double([before[name] for name in expected]))
    assert found.tolist() == pytest.approx(list(expected.values()), rel=1e-7, abs=1e-9)
    assert float(found.mean()) == pytest.approx(case["outputs"]["mean_rate"], rel=1e-7)


@pytest.mark.parametrize("correlation", [ops.kendall_tau, ops.spearman_rho])
def test_equal_rankings_agree_fully_and_reversed_ones_not_at_all(correlation):
    assert float(correlation(A, A.exp())) == pytest.approx(1), "a growing transform changes no rank"
    assert float(correlation(A, -A)) == pytest.approx(-1)
    assert float(correlation(A, torch.ones_like(A))) == 0, "no opinion is no agreement, and no nan"
    many = correlation(torch.stack([A, B, -B]), torch.stack([B, B, B]))
    assert many.tolist() == pytest.approx([float(correlation(B, A)), 1, -1])
    assert float(correlation(A[:1], B[:1])) == 0


def test_a_tied_pair_counts_nothing_unless_the_order_of_the_list_breaks_it():
    tied, other = double([2.0, 2.0, 1.0]), double([1.0, 3.0, 2.0])
    assert float(ops.kendall_tau(tied, other)) == pytest.approx((0 - 1 + 1) / 3)
    assert float(ops.kendall_tau(tied, other, ties="ordinal")) == pytest.approx((-1 - 1 + 1) / 3)
    assert float(ops.kendall_tau(tied.flip(0), other.flip(0), ties="ordinal")) == pytest.approx((1 - 1 + 1) / 3)


def test_equal_scores_share_their_rank():
    assert ops.average_ranks(double([5.0, 1.0, 5.0, 3.0])).tolist() == [3.5, 1, 3.5, 2]
    assert float(ops.spearman_rho(double([1.0, 1.0, 2.0]), double([1.0, 2.0, 3.0]))) == pytest.approx(0.75**0.5)


def test_extremes_are_items_and_not_places():
    a, b = double([2.0, 9.0, 1.0, 5.0]), double([3.0, 8.0, 0.0, 2.0])
    assert bool(ops.same_extremes(a, b))
    assert not bool(ops.same_extremes(a, b, positional=True)), "ranks of the first and the last: 3 and 2, 2 and 3"
    assert not bool(ops.same_extremes(a, -b))
    assert not bool(ops.same_extremes(double([2.0, 2.0, 1.0]), double([2.0, 1.5, 1.0]))), "two best are not one"
    assert ops.same_extremes(torch.stack([a, a]), torch.stack([b, -b])).tolist() == [True, False]
