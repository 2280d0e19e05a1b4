"""Density ratios of prompts: the classifier stands where it should, whatever the features."""

import math

import pytest
import torch

from alignkit.ops import count_tokens, fit_classifier, odds


def test_counts_are_unit_vectors():
    found = count_tokens([[3, 3, 4, 5], [600]])
    assert found.shape == (2, 512)
    expected = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64) / math.sqrt(6)
    torch.testing.assert_close(found[0, 3:6], expected)
    assert found[1].nonzero().flatten().tolist() == [600 - 512]


def test_one_feature_by_hand():
    """Rows s and −s: the ridge asks for 2·s·σ(−w·s) = w, which w = 1/s solves where s² = (1 + e)/2."""
    s = math.sqrt((1 + math.e) / 2)
    features = torch.tensor([[s], [-s]], dtype=torch.float64)
    assert fit_classifier(features, torch.tensor([True, False])).tolist() == pytest.approx([1 / s, 0.0], abs=1e-12)


@pytest.mark.parametrize("size", [1.0, 1000.0])
@pytest.mark.parametrize("apart", [0.0, 5.0])
def test_the_gradient_of_the_ridge_vanishes(size, apart):
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positive = torch.arange(60) < 30
    features[positive, 0] += apart
    features = features * size
    weights = fit_classifier(features, positive)
    x = torch.cat([features, torch.ones(60, 1)], dim=1)
    gradient = x.T @ (torch.sigmoid(x @ weights) - positive.double()) + weights
    assert gradient.abs().max() < 1e-6
    chance = torch.sigmoid(x @ weights)
    torch.testing.assert_close(odds(features, weights), chance / (1 - chance), rtol=1e-6, atol=0.0)
