"""Surrogates, divergences and the critic's loss: by hand, at the old policy, where their gradients end."""

import math

import pytest
import torch

from alignkit import ops
from alignkit.core.rng import generator


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def draws(purpose, *shape):
    draw = generator(0, purpose)
    count = torch.Size(shape).numel()
    return torch.tensor([draw.gauss(0, 1) for _ in range(count)], dtype=torch.float64).reshape(shape)


def leaf(*rows):
    return numbers(*rows).requires_grad_()


MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
TWO = math.log(2)


def test_ratios_by_hand():
    logps, old = numbers([TWO, 2 * TWO, 9], [-TWO, 9, 9], [9, 9, 9]), torch.zeros(3, 3, dtype=torch.float64)
    assert ops.token_ratio(logps, old, MASK)[MASK].tolist() == pytest.approx([2.0, 4.0, 0.5])
    assert ops.token_ratio(logps, old, MASK)[~MASK].tolist() == [1.0] * 6
    assert ops.sequence_ratio(logps, old, MASK).tolist() == pytest.approx([2**1.5, 0.5, 1.0])
    assert ops.sum_ratio(logps, old, MASK).tolist() == pytest.approx([8.0, 0.5, 1.0])
    assert ops.log_ratios(logps, old, MASK).tolist() == [[TWO, 2 * TWO, 0.0], [-TWO, 0.0, 0.0], [0.0] * 3]


@pytest.mark.parametrize("ratio", [ops.token_ratio, ops.sequence_ratio, ops.sum_ratio])
def test_huge_ratios_are_cut_off_and_padding_is_never_read(ratio):
    logps = torch.tensor([[300.0, float("-inf")], [-300.0, float("nan")], [1.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False]] * 3)
    found = ratio(logps, torch.zeros(3, 2), mask).reshape(3, -1)
    found.sum().backward()
    assert found[:, 0].tolist() == pytest.approx([math.exp(20), math.exp(-20), math.e])
    assert logps.grad.tolist() == [[0.0, 0.0], [0.0, 0.0], [pytest.approx(math.e), 0.0]]


def test_the_clip_by_hand():
    ratio, advantages = numbers(0.5, 0.5, 1.1, 2.0, 2.0), numbers(1.0, -1.0, 3.0, 1.0, -1.0)
    found = ops.clipped_surrogate(ratio, advantages, 0.2, 0.3)
    assert found.tolist() == pytest.approx([-0.5, 0.8, -3.3, -1.3, 2.0])


def test_bounds_of_a_bad_answer_grown_likely():
    ratio, advantages = leaf(0.5, 5.0, 5.0, 1.0), numbers(-1.0, -1.0, 1.0, -1.0)
    bounded = ops.clipped_surrogate(ratio, advantages, 0.2, 0.2, upper=4.0)
    assert bounded.tolist() == pytest.approx([0.8, 4.0, -1.2, 1.0])
    dual = ops.clipped_surrogate(ratio, advantages, 0.2, 0.2, dual=3.0)
    assert dual.tolist() == pytest.approx([0.8, 3.0, -1.2, 1.0])
    for value in (bounded, dual):
        (slope,) = torch.autograd.grad(value.sum(), ratio, retain_graph=True)
        assert slope.tolist() == [0.0, 0.0, 0.0, 1.0]
    plain = ops.clipped_surrogate(ratio, advantages, 0.2, 0.2)
    assert torch.autograd.grad(plain.sum(), ratio)[0].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_hits_are_where_the_clip_stops_the_gradient():
    ratio, advantages = (0.5 * draws("ratio", 50)).exp().requires_grad_(), draws("advantages", 50)
    low, high = ops.clip_hits(ratio, advantages, 0.2, 0.28)
    ops.clipped_surrogate(ratio, advantages, 0.2, 0.28).sum().backward()
    assert torch.equal(low | high, ratio.grad == 0)
    assert bool(low.any())
    assert bool(high.any())
    assert not (low & high).any()


def test_without_bounds_the_clip_is_the_policy_gradient():
    ratio, advantages = draws("ratio", 9).exp(), draws("advantages", 9)
    found = ops.clipped_surrogate(ratio, advantages, float("inf"), float("inf"))
    torch.testing.assert_close(found, -ratio * advantages)


@pytest.mark.parametrize("kind", ["clip", "cispo", "sapo", "vespo"])
def test_at_the_old_policy_every_token_pulls_by_its_advantage(kind):
    logps, mask = draws("logps", 2, 3).requires_grad_(), torch.ones(2, 3).bool()
    old, advantages = logps.detach().clone(), numbers([0.7] * 3, [-1.3] * 3)
    ratio = ops.token_ratio(logps, old, mask)
    value = {
        "clip": lambda: ops.clipped_surrogate(ratio, advantages, 0.2, 0.2),
        "cispo": lambda: ops.cispo_surrogate(logps, ratio, advantages, 5.0),
        "sapo": lambda: ops.sapo_surrogate(ratio, advantages),
        "vespo": lambda: ops.vespo_surrogate(logps, old, mask, advantages),
    }[kind]()
    value.sum().backward()
    torch.testing.assert_close(logps.grad, -advantages)


@pytest.mark.parametrize("kind", ["sequence", "gmpo", "luspo"])
def test_at_the_old_policy_every_answer_pulls_by_its_advantage(kind):
    """As much on each token as a mean over the answer; with luspo as a sum."""
    logps, mask = draws("logps", 2, 3).requires_grad_(), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    old, advantages = logps.detach().clone(), numbers(0.7, -1.3)
    ratio = ops.sequence_ratio(logps, old, mask)
    value = {
        "sequence": lambda: ops.clipped_surrogate(ratio, advantages, 0.2, 0.2),
        "gmpo": lambda: ops.gmpo_surrogate(logps, old, mask, advantages, 0.4, 0.4),
        "luspo": lambda: ops.luspo_surrogate(ratio, advantages, mask, 0.2, 0.2),
    }[kind]()
    value.sum().backward()
    length = torch.ones(2, 1) if kind == "luspo" else mask.sum(-1, keepdim=True)
    torch.testing.assert_close(logps.grad, (-advantages[:, None] / length).where(mask, 0.0))


def test_clipped_tokens_still_teach_in_cispo():
    logps = leaf(math.log(3), -1.0)
    found = ops.cispo_surrogate(logps, logps.exp(), numbers(2.0, -1.0), 1.5)
    assert found.tolist() == pytest.approx([-1.5 * 2 * math.log(3), -math.exp(-1)])
    found.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-3.0, math.exp(-1)])


def test_the_soft_clip_by_hand():
    found = ops.sapo_surrogate(numbers(1.0, 2.0, 2.0), numbers(1.0, 1.0, -1.0), 1.0, 2.0)
    assert found.tolist() == pytest.approx([-2.0, -4 / (1 + math.exp(-1)), 2 / (1 + math.exp(-2))])


def test_geometric_means_by_hand():
    """Log-ratios 1 and −1 within ±0.5: what would gain is cut off, what costs counts in full."""
    logps, old = numbers([1.0, -1.0, 7.0], [1.0, -1.0, 7.0]), torch.zeros(2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0]] * 2).bool()
    found = ops.gmpo_surrogate(logps, old, mask, numbers(2.0, -2.0), 0.5, 0.5)
    assert found.tolist() == pytest.approx([-2 * math.exp(-0.25), 2 * math.exp(0.25)])
    assert ops.gmpo_surrogate(logps, old, mask, numbers(0.0, 0.0), 0.5, 0.5).tolist() == [0.0, 0.0]


def test_weights_of_whole_answers_by_hand():
    """w = 4·½ = 2: φ = e^(3 − 6)·2² for a good answer, e^(2 − 4)·2³ for a bad one; one far off counts for nothing."""
    row = [2 * TWO, -TWO, 9.0]
    logps, mask = leaf(row, row, [300.0, 9, 9], [-300.0, 9, 9]), torch.tensor([[1, 1, 0]] * 2 + [[1, 0, 0]] * 2).bool()
    advantages = numbers([1.0], [-1.0], [1.0], [1.0]).expand(4, 3)
    found = ops.vespo_weight(logps, torch.zeros_like(logps), mask, advantages)
    assert not found.requires_grad
    assert found[:2, 0].tolist() == pytest.approx([4 * math.exp(-3), 8 * math.exp(-2)])
    assert found[2:, 0].tolist() == pytest.approx([0.0, math.exp(3) * 1e-16], abs=1e-20)
    assert found.shape == (4, 3)
    neither = ops.vespo_weight(logps[:1], torch.zeros(1, 3), mask[:1], numbers([0.0]))
    assert neither.tolist() == [[pytest.approx(4 * math.exp(-3))]]


def test_answers_count_as_often_as_they_have_tokens():
    ratio, advantages = numbers(1.5, 0.9, 1.0), numbers(1.0, -1.0, 1.0)
    found = ops.luspo_surrogate(ratio, advantages, MASK, 0.2, 0.2)
    assert found.tolist() == pytest.approx([-2.4, 0.9, 0.0])


def test_divergences_by_hand():
    logps, reference = numbers(-1.0, -2.0), numbers(-2.0, -1.0)
    for estimator, expected in (
        ("k1", [1.0, -1.0]),
        ("abs", [1.0, 1.0]),
        ("k2", [0.5, 0.5]),
        ("k3", [math.exp(-1), math.e - 2]),
    ):
        assert ops.kl_estimate(logps, reference, estimator).tolist() == pytest.approx(expected)
        assert ops.kl_estimate(logps, logps, estimator).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="'k4'"):
        ops.kl_estimate(logps, reference, "k4")


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimates_have_the_divergence_as_their_mean(estimator):
    logps, reference = draws("policy", 7).log_softmax(0), draws("reference", 7).log_softmax(0)
    divergence = (logps.exp() * (logps - reference)).sum()
    found = (logps.exp() * ops.kl_estimate(logps, reference, estimator, largest=None)).sum()
    torch.testing.assert_close(found, divergence)


def test_k3_is_bounded_and_keeps_its_digits():
    logps = leaf(-5.0, -300.0, 0.0)
    found = ops.kl_estimate(logps, numbers(0.0, 0.0, -300.0), "k3")
    assert found.tolist() == [10.0, 10.0, 10.0]
    found.sum().backward()
    assert logps.grad.tolist() == [0.0, 0.0, 0.0]
    unbounded = ops.kl_estimate(numbers(-5.0, 0.0), numbers(0.0, -300.0), "k3", largest=None)
    assert unbounded.tolist() == pytest.approx([math.exp(5) - 6, math.exp(-20) + 19])
    small = ops.kl_estimate(torch.tensor([-1e-3]), torch.tensor([0.0]), "k3")  # float32, of 1e-3
    assert small.item() == pytest.approx(5.0017e-7, rel=1e-3)


def test_how_far_a_policy_moved_is_never_negative():
    old, new = draws("old", 20), draws("new", 20)
    found = ops.kl_estimate(old, new, "k3", largest=None)
    ratio = (new - old).exp()
    torch.testing.assert_close(found, ratio - 1 - ratio.log())
    assert bool((found >= 0).all())


def test_the_coefficient_follows_its_target():
    assert ops.adapted_coefficient(0.2, 6.6, 6.0, 64, 6400) == pytest.approx(0.2 * (1 + 0.1 * 0.01))
    assert ops.adapted_coefficient(0.2, 60.0, 6.0, 64, 6400) == pytest.approx(0.2 * 1.002)
    assert ops.adapted_coefficient(0.2, 0.0, 6.0, 64, 6400) == pytest.approx(0.2 * 0.998)


def test_value_loss_by_hand():
    """V = 0 and ε = ½: towards a return of 2 only the first half step counts; away from it every step does."""
    values, returns, old = leaf(0.25, 1.0, -1.0), numbers(2.0, 2.0, 2.0), numbers(0.0, 0.0, 0.0)
    found = ops.value_loss(values, returns, old, 0.5)
    assert found.tolist() == pytest.approx([1.75**2 / 2, 1.5**2 / 2, 9 / 2])
    found.sum().backward()
    assert values.grad.tolist() == pytest.approx([-1.75, 0.0, -3.0])
    assert ops.value_hits(values, returns, old, 0.5).tolist() == [False, True, False]
    assert ops.value_loss(values, returns, old, None).tolist() == pytest.approx([1.75**2 / 2, 0.5, 4.5])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_by_finite_differences(sign):
    logps, old = draws("logps", 2, 3).requires_grad_(), draws("old", 2, 3)
    mask, advantages = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(), sign * numbers(0.7, -1.3)
    tokens = advantages[:, None].expand(2, 3)
    for function in (
        lambda x: ops.clipped_surrogate(ops.token_ratio(x, old, mask), tokens, 0.2, 0.3, dual=3.0),
        lambda x: ops.clipped_surrogate(ops.sequence_ratio(x, old, mask), advantages, 0.2, 0.3),
        lambda x: ops.clipped_surrogate(ops.sum_ratio(x, old, mask), advantages, 0.2, 0.3),
        lambda x: ops.sapo_surrogate(ops.token_ratio(x, old, mask), tokens),
        lambda x: ops.gmpo_surrogate(x, old, mask, advantages, 0.4, 0.4),
        lambda x: ops.luspo_surrogate(ops.sequence_ratio(x, old, mask), advantages, mask, 0.2, 0.2),
        lambda x: ops.kl_estimate(x, old, "k2"),
        lambda x: ops.kl_estimate(x, old, "k3"),
    ):
        assert torch.autograd.gradcheck(function, logps)
