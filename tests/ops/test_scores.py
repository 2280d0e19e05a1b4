"""Calibration, errors and ensembles of scores, by hand."""

import pytest
import torch

from alignkit import ops
from alignkit.core.rng import generator

HOWS = ["mean", "median", "min", "mean_std", "uwo"]
SCORES = torch.tensor([[1.0, 3.0, 2.0, 6.0], [0.0, -1.0, 1.0, 0.0]], dtype=torch.float64)


def ece(probability, label, bins=10):
    return sum(float(gap.mean().abs()) for gap in ops.calibration_gaps(probability, label, bins))


def test_ten_claims_of_nine_tenths_of_which_seven_hold_are_off_by_a_fifth():
    probability = torch.full((10,), 0.9, dtype=torch.float64)
    label = torch.tensor([1.0] * 7 + [0.0] * 3, dtype=torch.float64)
    assert ece(probability, label) == pytest.approx(0.2)
    assert ece(1 - probability, 1 - label) == pytest.approx(0.2), "which side stands first says nothing"


def test_outcomes_drawn_from_the_claim_are_calibrated():
    draw = generator(0, "calibrated")
    margin = torch.tensor([draw.gauss(0, 2) for _ in range(20_000)], dtype=torch.float64)
    label = torch.tensor([float(draw.random() < p) for p in margin.sigmoid().tolist()], dtype=torch.float64)
    assert ece(margin.sigmoid(), label) < 0.02


def test_an_even_claim_is_half_right():
    assert ece(torch.full((4,), 0.5), torch.ones(4)) == 0.0


def test_gaps_by_hand():
    """0.62 stands in the third of ten bins from ½ on, 0.05 (0.95 of the other side) in the last."""
    gaps = ops.calibration_gaps(torch.tensor([0.62, 0.05]), torch.tensor([1.0, 1.0]), 10)
    assert [k for k, gap in enumerate(gaps) if gap.any()] == [2, 9]
    assert gaps[2].tolist() == pytest.approx([-0.38, 0.0])
    assert gaps[9].tolist() == pytest.approx([0.0, 0.95])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [3.0, 0.0]),
        ("median", [2.5, 0.0]),
        ("min", [1.0, -1.0]),
        ("mean_std", [3 - 0.5 * 3.5**0.5, -0.5 * 0.5**0.5]),
        ("uwo", [3 - 0.5 * 3.5, -0.25]),
    ],
)
def test_aggregates_by_hand(how, expected):
    assert ops.aggregate_scores(SCORES, how).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("how", HOWS)
def test_what_every_aggregate_keeps(how):
    found = ops.aggregate_scores(SCORES, how)
    torch.testing.assert_close(ops.aggregate_scores(SCORES[:, :1], how), SCORES[:, 0])
    torch.testing.assert_close(ops.aggregate_scores(SCORES[:, [2, 0, 3, 1]], how), found)
    torch.testing.assert_close(ops.aggregate_scores(SCORES + 7, how), found + 7)
    if how in ("mean", "median"):
        assert bool((ops.aggregate_scores(SCORES, "min") <= found).all())


@pytest.mark.parametrize("how", ["mean_std", "uwo"])
def test_disagreement_that_costs_nothing_leaves_the_mean(how):
    torch.testing.assert_close(ops.aggregate_scores(SCORES, how, 0.0), SCORES.mean(-1))


def test_standardised_members_have_one_scale():
    found = ops.standardize(SCORES, SCORES.mean(0), SCORES.std(0, correction=0))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]], dtype=torch.float64))
    same = torch.full((3, 1), 4.0)
    assert ops.standardize(same, same.mean(0), same.std(0, correction=0)).tolist() == [[0.0]] * 3


def test_values_of_steps_by_hand():
    assert ops.discounted(1.0, 3, 0.5) == [0.25, 0.5, 1.0]
    assert ops.discounted(0.0, 2, 0.5) == [0.0, 0.0]


def test_peers_by_hand():
    margins = torch.tensor([0.3, 2.0, -1.0, 0.3, 5.0])
    assert ops.peer_select(margins, 3).tolist() == [0, 1, 4]
    assert ops.peer_select(margins, 5).tolist() == [0, 1, 2, 3, 4]
