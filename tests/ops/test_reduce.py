"""Masked sums and means."""

import math

import pytest
import torch

from alignkit import ops


def test_sum_and_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    assert ops.sequence_sum(x, mask).tolist() == [5.0, 16.0]
    assert ops.sequence_mean(x, mask).tolist() == [2.5, 16.0]


def test_an_empty_row_is_zero_with_zero_gradient():
    x = torch.ones(2, 3, requires_grad=True)
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]]).bool()
    means = ops.sequence_mean(x, mask)
    assert means.tolist() == [0.0, 1.0]
    means.sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.5, 0.5]]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_outside_the_mask_never_arrives(poison):
    x = torch.tensor([[poison, 1.0, 2.0]], requires_grad=True)
    total = ops.sequence_sum(x, torch.tensor([[False, True, True]]))
    total.sum().backward()
    assert total.tolist() == [3.0]
    assert x.grad.tolist() == [[0.0, 1.0, 1.0]]
