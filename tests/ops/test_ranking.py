"""The logistic loss of a margin."""

import math

import pytest
import torch

from alignkit import ops


def test_no_margin_is_ln_2_whatever_the_smoothing():
    for smoothing in (0.0, 0.2, 0.5):
        assert ops.logistic_pair(torch.zeros(1).double(), smoothing).item() == pytest.approx(math.log(2), abs=1e-15)


def test_by_hand():
    # σ(ln 3) = 3/4: the loss is −ln ¾, and with ε = ¼ it is −¾·ln ¾ − ¼·ln ¼.
    margin = torch.tensor([math.log(3)], dtype=torch.float64)
    assert ops.logistic_pair(margin).item() == pytest.approx(-math.log(0.75))
    assert ops.logistic_pair(margin, 0.25).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_huge_margins_stay_finite_and_linear():
    margin = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = ops.logistic_pair(margin)
    value.sum().backward()
    assert value.tolist() == [1e4, 0.0]
    assert margin.grad.tolist() == [-1.0, 0.0]


def test_half_smoothing_is_even_in_the_margin():
    margin = torch.linspace(-6, 6, 13).double()
    torch.testing.assert_close(ops.logistic_pair(margin, 0.5), ops.logistic_pair(-margin, 0.5))


def test_smoothing_per_pair():
    margin = torch.tensor([1.0, 1.0], dtype=torch.float64)
    mixed = ops.logistic_pair(margin, torch.tensor([0.0, 0.3], dtype=torch.float64))
    assert mixed[:1] == ops.logistic_pair(margin[:1], 0.0)
    assert mixed[1:] == ops.logistic_pair(margin[1:], 0.3)


def test_gradient_by_finite_differences():
    margin = torch.randn(6, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: ops.logistic_pair(m, 0.1), margin)
