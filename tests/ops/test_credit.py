"""Advantages by hand, what they must not depend on, and statistics over several processes."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from alignkit import ops
from alignkit.core.rng import generator

NAN = float("nan")
FORMS = ["group_std", "group", "batch_std", "rloo"]
REWARDS = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0], dtype=torch.float64)
GROUP = torch.tensor([5, 2, 5, 2, 5])
"""Two groups, their rows mixed: 1, 3, 8 with mean 4, and 2, 4 with mean 3."""


def draws(purpose, *shape):
    draw = generator(0, purpose)
    count = torch.Size(shape).numel()
    return torch.tensor([draw.gauss(0, 1) for _ in range(count)], dtype=torch.float64).reshape(shape)


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def on_processes(function, *parts):
    """What each process finds that holds one of the parts, while `total` sums over all of them."""
    barrier, held = Barrier(len(parts)), {}

    def run(rank):
        def total(x):
            held[rank] = x
            barrier.wait(timeout=30)
            summed = sum(held[i] for i in range(len(parts)))
            barrier.wait(timeout=30)
            return summed

        return function(*parts[rank], total=total)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("group", [-3.0, -1.0, -1.0, 1.0, 4.0]),
        ("group_std", [-3 / 13**0.5, -(0.5**0.5), -1 / 13**0.5, 0.5**0.5, 4 / 13**0.5]),
        ("batch_std", [x / 7.3**0.5 for x in (-3.0, -1.0, -1.0, 1.0, 4.0)]),
        ("rloo", [-4.5, -2.0, -1.5, 2.0, 6.0]),
    ],
)
def test_group_advantages_by_hand(form, expected):
    assert ops.group_advantages(REWARDS, GROUP, form, eps=0.0).tolist() == pytest.approx(expected)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="'median'"):
        ops.group_advantages(REWARDS, GROUP, "median")


def test_eps_is_added_to_the_standard_deviation():
    assert ops.group_advantages(numbers(0.0, 2.0), torch.zeros(2), "group_std", eps=1.0).tolist() == pytest.approx(
        [-1 / (2**0.5 + 1), 1 / (2**0.5 + 1)]
    )


@pytest.mark.parametrize("form", FORMS)
def test_what_every_form_keeps(form):
    rewards, group = draws("rewards", 12), torch.arange(12) % 3
    found = ops.group_advantages(rewards, group, form, eps=1e-9)
    for name in range(3):
        assert float(found[group == name].sum()) == pytest.approx(0.0, abs=1e-12)
    moved = rewards + numbers(5.0, -2.0, 100.0)[group]
    if form != "batch_std":
        torch.testing.assert_close(ops.group_advantages(moved, group, form, eps=1e-9), found)
    if form in ("group_std", "batch_std"):
        torch.testing.assert_close(ops.group_advantages(7 * rewards + 1, group, form, eps=1e-9), found)
    single = ops.group_advantages(rewards.float(), group, form, eps=1e-9)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [*FORMS, "opo", "merged"])
def test_equal_scores_are_exactly_no_advantage(form):
    """A mean of seven times 0.1 is not 0.1, and what is left would be divided by next to nothing."""
    rewards, group = torch.full((7,), 0.1, dtype=torch.float64), torch.zeros(7)
    if form == "opo":
        found = ops.opo_advantages(rewards, torch.arange(7), group)
    elif form == "merged":
        found = ops.merged_advantages(rewards[:, None], torch.ones(1), group)
    else:
        found = ops.group_advantages(rewards, group, form, eps=0.0 if form == "group" else 1e-12)
    assert found.tolist() == [0.0] * 7


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_a_score_is_as_if_it_were_not_there(form):
    rewards = torch.cat([REWARDS, numbers(NAN, NAN)])
    found = ops.group_advantages(rewards, torch.cat([GROUP, torch.tensor([5, 9])]), form)
    torch.testing.assert_close(found[:5], ops.group_advantages(REWARDS, GROUP, form))
    assert found[5:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_lone_answer_has_no_advantage_unless_asked(form):
    rewards, group = numbers(0.7, 1.0, 2.0), torch.tensor([1, 0, 0])
    assert ops.group_advantages(rewards, group, form)[0] == 0
    kept = ops.group_advantages(rewards, group, form, eps=0.0, keep_lone=True)[0]
    assert float(kept) == pytest.approx(0.7 / float(rewards.std()) if form == "batch_std" else 0.7)


def test_groups_that_hardly_differ_can_be_left_out():
    rewards, group = numbers(0.0, 1e-7, 0.0, 1.0), torch.tensor([0, 0, 1, 1])
    found = ops.group_advantages(rewards, group, "group_std", eps=0.0, min_std=1e-6)
    assert found.tolist() == pytest.approx([0.0, 0.0, -(0.5**0.5), 0.5**0.5])


def test_length_weighted_baseline_by_hand():
    # baseline (4·1 + 0·5 + 1·6)/5 = 2
    found = ops.opo_advantages(numbers(1.0, 5.0, 6.0), torch.tensor([4, 0, 1]), torch.zeros(3))
    assert found.tolist() == pytest.approx([-1.0, 3.0, 4.0])
    assert ops.opo_advantages(numbers(1.0, 5.0), torch.tensor([0, 0]), torch.zeros(2)).tolist() == [0.0, 0.0]
    even = ops.opo_advantages(REWARDS, torch.full((5,), 3), GROUP)
    torch.testing.assert_close(even, ops.group_advantages(REWARDS, GROUP, "group"))


def test_rewards_are_summed_over_those_that_said_something():
    rewards = numbers([1.0, 2.0, NAN], [NAN, 2.0, 7.0], [NAN, NAN, 7.0])
    found = ops.weighted_rewards(rewards, numbers(1.0, 0.5, 0.0))
    assert found[:2].tolist() == [2.0, 1.0]
    assert found[2].isnan()


def test_one_reward_merged_is_that_reward():
    found = ops.merged_advantages(REWARDS[:, None], numbers(1.0), GROUP, rescale=False)
    torch.testing.assert_close(found, ops.group_advantages(REWARDS, GROUP, "group_std"))


def test_merging_advantages_forgets_the_scale_of_each_reward():
    rewards, group, weights = draws("several", 8, 3), torch.arange(8) // 4, numbers(1.0, 0.5, 2.0)
    found = ops.merged_advantages(rewards, weights, group, eps=1e-12)
    torch.testing.assert_close(
        ops.merged_advantages(rewards * numbers(20.0, 1.0, 0.1), weights, group, eps=1e-12), found
    )
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(found.std()) == pytest.approx(1.0, rel=1e-9)


def test_a_group_without_signal_stays_at_exactly_nothing_among_others():
    rewards = torch.cat([torch.full((3, 2), 0.1, dtype=torch.float64), draws("others", 5, 2)])
    found = ops.merged_advantages(rewards, numbers(1.0, 0.5), torch.tensor([0] * 3 + [1] * 5))
    assert found[:3].tolist() == [0.0] * 3
    assert bool(found[3:].all())


def test_levels_of_combination_by_hand():
    """r1 = (0, 1, 0, 1), r2 = (10, 20, 30, 40): the larger scale wins a sum of rewards, not one of advantages."""
    rewards, group, weights = numbers([0, 10], [1, 20], [0, 30], [1, 40]), torch.zeros(4), numbers(1.0, 1.0)
    summed = ops.group_advantages(ops.weighted_rewards(rewards, weights), group, "group_std")
    merged = ops.merged_advantages(rewards, weights, group, rescale=False)

    def correlation(x):
        return float(torch.corrcoef(torch.stack([x, rewards[:, 0]]))[0, 1])

    assert correlation(summed) == pytest.approx(0.48, abs=0.005)
    assert correlation(merged) == pytest.approx(0.85, abs=0.005)


def test_whitening_by_hand():
    x, mask = numbers([1.0, NAN, 3.0], [float("inf"), 5.0, 7.0]), flags([1, 0, 1], [0, 0, 0])
    for keep_mean, expected in ((False, [-(0.5**0.5), 0.5**0.5]), (True, [2 - 0.5**0.5, 2 + 0.5**0.5])):
        found = ops.whiten(x, mask, keep_mean=keep_mean)
        assert found[mask].tolist() == pytest.approx(expected)
        assert found[~mask].tolist() == [0.0] * 4


def test_one_token_cannot_be_whitened():
    assert ops.whiten(numbers([4.0, 9.0]), flags([1, 0])).tolist() == [[4.0, 0.0]]
    assert ops.whiten(numbers([4.0, 9.0]), flags([0, 0])).tolist() == [[0.0, 0.0]]


def test_rows_of_a_batch_are_standardised():
    found = ops.batch_normalized(numbers(1.0, 3.0, NAN), flags(1, 1, 0), eps=0.0)
    assert found.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0])
    assert ops.batch_normalized(numbers(3.0), torch.ones(1).bool()).tolist() == [0.0]


def test_gae_by_hand():
    # δ₁ = 2 − ¼ = 1.75; δ₀ = 1 + 0.9·¼ − ½ = 0.725; A₀ = 0.725 + 0.45·1.75
    advantages, returns = ops.gae(numbers([1.0, 2.0]), numbers([0.5, 0.25]), flags([1, 1]), 0.9, 0.5)
    assert advantages[0].tolist() == pytest.approx([1.5125, 1.75])
    assert returns[0].tolist() == pytest.approx([2.0125, 2.0])


def test_limits_of_gae():
    rewards, values, mask = draws("rewards", 2, 4), draws("values", 2, 4), torch.ones(2, 4).bool()
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(ops.gae(rewards, torch.zeros_like(values), mask, 1.0, 1.0)[0], to_go)
    torch.testing.assert_close(ops.gae(rewards, values, mask, 1.0, 1.0)[1], to_go)
    later = torch.cat([values[:, 1:], torch.zeros(2, 1)], dim=1)
    torch.testing.assert_close(ops.gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * later - values)


def test_credit_steps_over_tokens_that_are_not_trained():
    """A prompt, a tool's output within the answer and padding, all full of numbers that mean nothing."""
    mask = flags([0, 1, 0, 0, 1, 1, 0])
    rewards, values = draws("rewards", 1, 7), draws("values", 1, 7)
    values[~mask] = NAN
    plain = torch.ones(1, 3).bool()
    short = (rewards[mask][None], values[mask][None])
    for found, expected in zip(
        (*ops.gae(rewards, values, mask, 0.9, 0.8), ops.discounted_returns(rewards, mask, 0.9)),
        (*ops.gae(*short, plain, 0.9, 0.8), ops.discounted_returns(short[0], plain, 0.9)),
        strict=True,
    ):
        torch.testing.assert_close(found[mask], expected[0])
        assert not found[~mask].any()


def test_returns_by_hand():
    found = ops.discounted_returns(numbers([1.0, 2.0, 4.0]), flags([1, 1, 1]), 0.5)
    assert found.tolist() == [[3.0, 4.0, 4.0]]


@pytest.mark.parametrize(("lam", "unchanged"), [(1.0, True), (0.95, False)])
def test_scores_moved_alike_cancel_in_whitening_only_without_decay(lam, unchanged):
    mask = flags([1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0])
    scores, kl, values = draws("scores", 3), draws("kl", 3, 4), draws("values", 3, 4)

    def whitened(scores):
        rewards = ops.token_rewards(scores, kl, mask, 0.1)
        return ops.whiten(ops.gae(rewards, values, mask, 1.0, lam)[0], mask)

    assert torch.allclose(whitened(scores), whitened(scores + 3), atol=1e-6) is unchanged


def test_the_score_stands_on_the_last_token_or_behind_it():
    mask = flags([0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0])
    scores, kl = numbers(5.0, 7.0, NAN), torch.ones(3, 4, dtype=torch.float64)
    on_last = ops.token_rewards(scores, kl, mask, 0.5)
    assert on_last.tolist() == [[0.0, -0.5, 4.5, 0.0], [0.0, -0.5, 0.0, 6.5], [0.0] * 4]
    behind = ops.token_rewards(scores, kl, mask, 0.5, behind_last=True)
    assert behind.tolist() == [[0.0, -0.5, -0.5, 5.0], [0.0, -0.5, 0.0, 6.5], [0.0] * 4]
    assert ops.extended(mask).tolist() == flags([0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]).tolist()


def test_overlong_punishment_by_hand():
    lengths = torch.tensor([0, 12, 13, 16, 20, 30])
    assert ops.overlong_punishment(lengths, 20, 8).tolist() == [0.0, 0.0, -0.125, -0.5, -1.0, -1.0]
    assert ops.overlong_punishment(lengths.double(), 20, 0).tolist() == [0.0] * 5 + [-1.0]


def test_a_group_has_signal_where_any_two_scores_differ():
    rewards = numbers(0.3, 1.0, 0.1 + 0.2, 1.0, NAN, 2.0, 2.0, NAN)
    group = torch.tensor([0, 1, 0, 1, 1, 2, 3, 3])
    assert ops.has_signal(rewards, group).tolist() == [True, False, True, False, False, False, False, False]


def test_advantages_of_selection_by_hand():
    rewards, group = numbers(1.0, -1.0, 1.0, 1.0, 1.0, NAN), torch.tensor([0, 0, 1, 1, 2, 0])
    assert ops.raft_advantages(rewards).tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert ops.reinforce_rej_advantages(rewards, group).tolist() == [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_best_of_each_group():
    rewards, group = numbers(1.0, 5.0, 3.0, 5.0, 3.0, NAN, NAN), torch.tensor([4, 0, 4, 0, 4, 0, 7])
    assert ops.best_of_groups(rewards, group).tolist() == [1, 2]
    assert ops.best_of_groups(rewards.exp(), group).tolist() == [1, 2]


def test_the_best_share_by_hand():
    rewards = numbers(1.0, NAN, 5.0, 3.0, 5.0, 0.0)
    assert ops.top_fraction(rewards, 0.5).tolist() == [2, 4]
    assert ops.top_fraction(rewards, 1.0).tolist() == [2, 4, 3, 0, 5]
    with pytest.raises(ValueError, match=r"0\.1 of 5 scored answers is less than one"):
        ops.top_fraction(rewards, 0.1)


def test_agreement_by_hand():
    advantages = numbers([[2.0, 1.0], [-1.0, 3.0], [-2.0, -0.5], [9.0, 9.0]])
    mask = flags([1, 1, 1, 0])
    assert ops.pareto_advantages(advantages, mask).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert ops.pareto_advantages(advantages, mask, noon=False).tolist() == [[1.0, 0.0, -0.5, 0.0]]
    for granularity in ("sequence", "batch"):
        found = ops.pareto_advantages(advantages, mask, granularity=granularity)
        assert found[0].tolist() == pytest.approx([2 / 3] * 3 + [0.0])
    with pytest.raises(ValueError, match="'word'"):
        ops.pareto_advantages(advantages, mask, granularity="word")


@pytest.mark.parametrize("noon", [True, False])
def test_agreement_is_the_smallest_norm_of_any_mixture(noon):
    advantages, mask = draws("objectives", 3, 5, 3), torch.ones(3, 5).bool()
    found = ops.pareto_advantages(advantages, mask, noon=noon)
    each = advantages.clamp(min=0) if noon else advantages
    steps = torch.linspace(0, 1, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps)
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], dim=1)
    mixtures = each.reshape(15, 3) @ grid[grid[:, 2] > -1e-9].T
    assert float((mixtures.abs().amin(1).reshape(3, 5) - found.abs()).abs().max()) < 0.02
    torch.testing.assert_close(ops.pareto_advantages(advantages[..., [2, 0, 1, 1]], mask, noon=noon), found)
    lone = ops.pareto_advantages(advantages[..., :1], mask, noon=noon)
    torch.testing.assert_close(lone, each[..., 0])


def gram(*objectives):
    """Of objectives written as lists of advantages, one a token."""
    advantages = numbers(*objectives).T[None]
    return ops.advantage_gram(advantages, torch.ones(advantages.shape[:2]).bool())


def test_weights_of_objectives_by_hand():
    orthogonal, parallel = gram([1.0, 0.0], [0.0, 2.0]), gram([1.0, 0.0], [2.0, 0.0])
    assert ops.diagonal_weights(orthogonal).tolist() == pytest.approx([0.8, 0.2])
    assert ops.min_norm_weights(orthogonal).tolist() == pytest.approx([0.8, 0.2])
    assert ops.diagonal_weights(parallel).tolist() == pytest.approx([0.8, 0.2])
    assert ops.min_norm_weights(parallel).tolist() == pytest.approx([1.0, 0.0])


def test_two_objectives_meet_where_the_formula_says():
    first, second = draws("first", 6), draws("second", 6)
    share = float((second - first) @ second / (second - first).square().sum())
    found = ops.min_norm_weights(gram(first.tolist(), second.tolist()))
    assert found.tolist() == pytest.approx([min(max(share, 0), 1), 1 - min(max(share, 0), 1)], abs=1e-9)


def test_no_mixture_is_smaller_than_that_of_the_solver():
    of_four = gram(*draws("four", 4, 6).tolist())
    weights = ops.min_norm_weights(of_four)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert bool((weights >= 0).all())
    slope = of_four @ weights
    assert float(slope.min()) == pytest.approx(float(weights @ slope), abs=1e-9)  # no corner lies lower


@pytest.mark.parametrize("solver", [ops.diagonal_weights, ops.min_norm_weights])
def test_an_objective_without_advantages_has_no_say(solver):
    found = solver(gram([1.0, 0.0], [0.0, 0.0], [0.0, 1.0]))
    assert found.tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert solver(gram([0.0], [0.0])).tolist() == [0.5, 0.5]


def test_hardness_by_hand():
    distance = numbers(0.0, 0.0, 2.0)
    found = ops.data_hardness(distance, numbers(1.0, 0.0, 1.0))
    assert found.tolist() == pytest.approx([0.5 / 0.7310585786, 1.0, 0.8807970780 / 0.7310585786])


def test_means_are_those_of_each_category():
    x, category, over = numbers(1.0, 3.0, 10.0, NAN), torch.tensor([0, 0, 2, 2]), torch.tensor([1, 1, 1, 0]).bool()
    assert ops.category_means(x, category, over, 4).tolist() == [2.0, 0.0, 10.0, 0.0]


def test_outliers_do_not_say_how_a_category_responds():
    """Gaps 0, 0, 0, 4 with mean 1: with τ = 4 the last is an outlier, and what is left has mean 0."""
    gap, category, over = numbers(0.0, 0.0, 0.0, 4.0), torch.zeros(4).long(), torch.ones(4).bool()
    found, kept = ops.responsiveness(gap, category, over, numbers(1.0), 4.0, tau_mode="absolute")
    assert kept.tolist() == [True, True, True, False]
    assert found.tolist() == pytest.approx([0.5 / 0.7310585786])
    everyone, kept = ops.responsiveness(gap, category, over, numbers(1.0), float("inf"), tau_mode="absolute")
    assert everyone.tolist() == [1.0]
    assert bool(kept.all())
    with pytest.raises(ValueError, match="'std'"):
        ops.responsiveness(gap, category, over, numbers(1.0), 1.0, tau_mode="std")


def test_rows_left_out_say_nothing_of_a_category():
    gap, category, over = numbers(0.0, 2.0, 1.5), torch.tensor([0, 0, 0]), flags(1, 1, 0)
    found, kept = ops.responsiveness(gap, category, over, numbers(1.0), 4.0, tau_mode="absolute")
    assert kept.tolist() == [True, True, False]
    assert found.tolist() == [1.0]


@pytest.mark.parametrize("tau", [2.2, 2.3])
def test_outliers_by_variance_do_not_depend_on_the_scale(tau):
    """The variance of 0, 0, 0, 4 is 4, and 9 is two and a quarter times that."""
    for scale in (1.0, 50.0):
        gap = scale * numbers(0.0, 0.0, 0.0, 4.0)
        _, kept = ops.responsiveness(gap, torch.zeros(4).long(), torch.ones(4).bool(), gap.mean()[None], tau)
        assert kept.tolist() == [True, True, True, tau > 2.25]


def test_equal_categories_are_as_one():
    gap, over = draws("gap", 5), torch.ones(35).bool()
    category = torch.arange(35) % 7
    one, _ = ops.responsiveness(gap, torch.zeros(5).long(), over[:5], gap.mean()[None], 1.0)
    seven, _ = ops.responsiveness(gap.repeat_interleave(7), category, over, gap.mean().repeat(7), 1.0)
    torch.testing.assert_close(seven, one.repeat(7))


def test_statistics_are_over_all_processes():
    x, mask = draws("x", 6, 4), draws("mask", 6, 4) > -0.5
    rewards, group = draws("rewards", 6), torch.tensor([0, 0, 1, 1, 1, 1])
    several, weights, objectives = draws("several", 6, 2), numbers(1.0, 2.0), draws("objectives", 6, 4, 2)
    category = torch.tensor([0, 1, 0, 1, 1, 1])
    means = ops.category_means(rewards, category, mask[:, 0], 2)

    def batch_std(rewards, group, total):
        return ops.group_advantages(rewards, group, "batch_std", total=total)

    def merged(several, group, total):
        return ops.merged_advantages(several, weights, group, total=total)

    def responds(rewards, category, over, total):
        return ops.responsiveness(rewards, category, over, means, 1.0, total=total)[1]

    def one_for_all(objectives, mask, total):
        return ops.pareto_advantages(objectives, mask, granularity="batch", total=total)

    for function, columns in (
        (ops.whiten, (x, mask)),
        (ops.batch_normalized, (rewards, mask[:, 0])),
        (batch_std, (rewards, group)),
        (merged, (several, group)),
        (responds, (rewards, category, mask[:, 0])),
        (one_for_all, (objectives, mask)),
    ):
        whole = function(*columns, total=lambda x: x)
        parts = [tuple(column[rows] for column in columns) for rows in (slice(0, 2), slice(2, 6))]
        torch.testing.assert_close(torch.cat(on_processes(function, *parts)), whole)
    for found in on_processes(ops.advantage_gram, (objectives[:2], mask[:2]), (objectives[2:], mask[2:])):
        torch.testing.assert_close(found, ops.advantage_gram(objectives, mask))
