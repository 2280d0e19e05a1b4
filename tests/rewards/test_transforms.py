"""Transforms by hand, and what their papers say of them."""

import math

import pytest
import torch

from alignkit.core.errors import RecipeError, RunFailed
from alignkit.rewards.table import RewardTable
from alignkit.rewards.transforms import (
    CalibrateConfig,
    ClipConfig,
    ExpTiltConfig,
    LscConfig,
    TransformConfig,
    WhitenConfig,
    build_transform,
    calibrated,
    exp_tilt,
    find_transform,
    group_norm,
    group_rank,
    log_sigmoid_centred,
    soft_clip,
    whiten,
)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def table(scores, groups=None, **columns):
    count = len(scores)
    return RewardTable(
        scores={"r": scores},
        valid={"r": torch.ones(count, dtype=torch.bool)},
        group=torch.tensor(groups if groups is not None else [0] * count),
        columns=columns,
        texts=[f"text {i}" for i in range(count)],
    )


def applied(config, scores, valid=None, **columns):
    valid = torch.ones(len(scores), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return build_transform(config).apply(scores, valid, table(scores, **columns), None).tolist()


ALL = torch.ones(4, dtype=torch.bool)


def test_clips():
    assert applied(ClipConfig(name="clip", low=-1.0, high=2.0), column(-3, 0, 5)) == [-1.0, 0.0, 2.0]
    assert applied(ClipConfig(name="clip", high=2.0), column(-3, 0, 5)) == [-3.0, 0.0, 2.0]
    soft = soft_clip(column(-1e6, 0, 1e-3, 1e6), 2.0)
    assert soft.tolist() == pytest.approx([-2.0, 0.0, 1e-3, 2.0], rel=1e-6)


def test_whitening_leaves_out_what_is_not_valid():
    valid = [True, True, False, True]
    found = applied(WhitenConfig(name="whiten"), column(1, 2, 1e9, 3), valid)
    assert [found[i] for i in (0, 1, 3)] == pytest.approx([-1.0, 0.0, 1.0], abs=1e-7)
    scaled = whiten(column(10, 20, 30, 40), ALL, shift_mean=False)
    assert scaled.mean().item() == pytest.approx(25.0)
    assert scaled.std().item() == pytest.approx(1.0, abs=1e-7)
    assert whiten(column(5, 7), torch.tensor([True, False])).tolist() == [5.0, 7.0]


class OtherProcess:
    """A world of two, of which the other brings these sums."""

    def __init__(self, *sums):
        self.sums = list(sums)

    def sum(self, x):
        return x + self.sums.pop(0)


def test_whitening_is_over_all_processes():
    world = OtherProcess(column(1, 3), column(1)[0])  # the score 3: count and sum, then (3 − 2)²
    found = whiten(column(1, 2), torch.tensor([True, True]), world)
    assert found.tolist() == pytest.approx([-1.0, 0.0], abs=1e-7)
    assert whiten(column(), torch.zeros(0, dtype=torch.bool), OtherProcess(column(2, 3), column(1)[0])).tolist() == []


def test_group_norm_does_not_care_where_groups_stand_nor_for_affine_maps():
    scores, groups = column(1, 10, 3, 30), torch.tensor([7, 2, 7, 2])
    found = group_norm(scores, ALL, groups)
    half = math.sqrt(0.5)
    assert found.tolist() == pytest.approx([-half, -half, half, half], abs=1e-5)
    torch.testing.assert_close(group_norm(1e3 * scores + 5, ALL, groups), found, rtol=1e-5, atol=1e-5)
    assert group_norm(scores, ALL, groups, "none").tolist() == [-1.0, -10.0, 1.0, 10.0]


def test_group_norm_of_equal_lonely_and_invalid_scores_is_zero():
    assert group_norm(column(0.1, 0.1, 0.1, 5), ALL, torch.tensor([0, 0, 0, 1])).tolist() == [0.0] * 4
    valid = torch.tensor([True, True, False, False])
    assert group_norm(column(1, 3, math.nan, 9), valid, torch.zeros(4)).tolist()[2:] == [0.0, 0.0]


def test_a_median_scale_shrugs_at_an_outlier():
    # median 2.5, deviations 1.5 ½ ½ 97.5, whose median is 1
    found = group_norm(column(1, 2, 3, 100), ALL, torch.zeros(4), "mad")
    assert found.tolist()[:3] == pytest.approx([-1.5 / 1.4826, -0.5 / 1.4826, 0.5 / 1.4826], abs=1e-5)


def test_ranks_share_ties_and_see_only_the_order():
    scores = column(5, 1, 5, 7)
    assert group_rank(scores, ALL, torch.zeros(4)).tolist() == [0.0, -1.0, 0.0, 1.0]
    assert torch.equal(group_rank(scores.exp(), ALL, torch.zeros(4)), group_rank(scores, ALL, torch.zeros(4)))
    assert group_rank(scores, ALL, torch.tensor([0, 1, 1, 2])).tolist() == [0.0, -1.0, 1.0, 0.0]


def test_log_sigmoid_centring_at_its_ends():
    found = log_sigmoid_centred(column(1.0, 101.0, -99.0), column(1.0, 1.0, 1.0))
    assert found.tolist() == pytest.approx([-math.log(2), 0.0, -100.0], abs=1e-12)
    slopes = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_sigmoid_centred(slopes, column(0.5)).sum(), slopes)
    torch.testing.assert_close(slope, torch.sigmoid(0.5 - slopes.detach()))


def test_lsc_takes_its_reference_from_data_or_recipe():
    scores = column(2.0, 3.0)
    by_quantile = applied(LscConfig(name="lsc", q=0.5), scores, ref_rewards=[[0.0, 2.0, 9.0], [1.0, 3.0, 4.0]])
    assert by_quantile == pytest.approx([-math.log(2)] * 2)
    canned = LscConfig(name="lsc", reference="canned", column="refusal", temperature=2.0)
    assert applied(canned, scores, refusal=[2.0, 1.0]) == pytest.approx([-math.log(2), -math.log1p(math.exp(-1.0))])
    constant = LscConfig(name="lsc", reference="constant", constant=2.0)
    assert applied(constant, scores)[0] == pytest.approx(-math.log(2))
    assert build_transform(constant).requires == ()
    assert build_transform(canned).requires == ("refusal",)


@pytest.mark.parametrize("value", [None, [], "x", [1.0, math.nan], [None]])
def test_reference_rewards_that_are_none(value):
    with pytest.raises(RunFailed, match=r"column 'ref_rewards' of row 0 \(completion 'text 0'\)"):
        applied(CalibrateConfig(name="calibrate"), column(1.0), ref_rewards=[value])
    assert applied(CalibrateConfig(name="calibrate"), column(1.0), [False], ref_rewards=[value]) == [0.0]


def test_calibration_is_the_share_below_and_half_of_what_is_equal():
    assert calibrated(3.0, [1, 2, 3, 4]) == 0.625
    found = applied(CalibrateConfig(name="calibrate"), column(3.0, 99.0), ref_rewards=[[1, 2, 3, 4], [1, 2]])
    assert found == [0.625, 1.0]
    reference = [0.3, -1.0, 2.0, 0.9, 5.0]
    shares = [calibrated(score, reference) for score in reference]
    assert sum(shares) / len(shares) == pytest.approx(0.5)
    assert shares == [calibrated(math.exp(score), [math.exp(x) for x in reference]) for score in reference]


def test_tilts_stay_within_one_and_refuse_what_is_no_share():
    quantile = column(0.0, 0.5, 1.0)
    assert exp_tilt(quantile, 10.0, "best_of_n").tolist() == pytest.approx([math.exp(-10), math.exp(-5), 1.0])
    assert exp_tilt(quantile, 10.0, "worst_of_n").tolist() == pytest.approx([-1.0, -math.exp(-5), -math.exp(-10)])
    with pytest.raises(RunFailed, match=r"met the score 1.5; expected one in 0 … 1"):
        applied(ExpTiltConfig(name="exp_tilt"), column(0.5, 1.5))


def tilted(values, divergence):
    """The density on (0, 1), as weights of a grid, that a reward makes of a uniform one at this KL, in nats."""
    low, high = 1e-4, 1e4
    for _ in range(60):
        strength = math.sqrt(low * high)
        density = torch.softmax(strength * values, 0)
        kl = torch.xlogy(density, density * len(density)).sum().item()
        low, high = (strength, high) if kl < divergence else (low, strength)
    return density


@pytest.mark.parametrize(
    ("divergence", "mode", "plain", "better"),
    [
        (1.0, "best_of_n", 0.877, 0.935),
        (1.0, "worst_of_n", 0.974, 0.993),
        (2.0, "best_of_n", 0.952, 0.973),
        (2.0, "worst_of_n", 0.9995, 0.9998),
    ],
)
def test_what_a_tilt_is_good_for(divergence, mode, plain, better):
    """Win rate of the best (worst) of four answers against four of the reference, at equal KL; arXiv 2412.19792."""
    grid = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000

    def wins(values):
        density = tilted(values, divergence)
        below = density.cumsum(0) - density / 2
        if mode == "best_of_n":
            return (4 * below**3 * density * grid**4).sum().item()
        return (4 * (1 - below) ** 3 * density * (1 - (1 - grid) ** 4)).sum().item()

    assert wins(grid) == pytest.approx(plain, abs=0.002)
    assert wins(exp_tilt(grid, 10.0, mode)) == pytest.approx(better, abs=0.002)


def test_names_are_looked_up():
    assert build_transform(TransformConfig(name="rank")).apply(column(2, 1), ALL[:2], table(column(2, 1)), None)[0] == 1
    with pytest.raises(RecipeError, match=r"unknown transform 'whitten': did you mean 'whiten'\?"):
        find_transform("whitten")
    with pytest.raises(RecipeError, match=r"expected a subclass of alignkit.rewards.transforms.Transform"):
        find_transform(f"{__name__}:table")
