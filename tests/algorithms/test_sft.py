"""SFT: the token mean of the negative log-likelihood of the best completion."""

import pytest
import torch
from pydantic import ValidationError

from alignkit.algorithms.sft import SFT, SFTConfig
from alignkit.core import Batch, Completion, Forward, Group
from tests.algorithms.fakes import averages, reduce_terms

ALGORITHM = SFT(SFTConfig(name="sft"))


def rows_batch(logps: torch.Tensor, mask: list[list[int]]) -> tuple[Forward, Batch]:
    wanted = torch.tensor(mask).bool()
    real = torch.ones(len(mask), dtype=torch.bool)
    tokens = torch.zeros(wanted.shape, dtype=torch.long)
    return Forward(logps=logps), Batch({"tokens": tokens}, {"mask": wanted, "row": real, "unit": real}, k=1)


def test_every_token_of_the_batch_has_the_same_weight():
    logps = torch.tensor([[0.0, -1.0, -2.0, -3.0], [0.0, 0.0, 0.0, -10.0]], requires_grad=True)
    out, batch = rows_batch(logps, [[0, 1, 1, 1], [0, 0, 0, 1]])
    terms, metrics = ALGORITHM.loss(out, batch)
    loss = reduce_terms(terms, batch)
    loss.backward()
    assert loss.item() == 4.0, "16 nats over 4 tokens, not the mean 6 of the two row means"
    assert logps.grad.tolist() == [[0.0, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, -0.25]]
    assert averages(metrics) == {"completions/mean_length": 2.0}


def test_of_several_completions_it_learns_the_best():
    worse, better = Completion("worse", [5, 2], reward=0.0), Completion("better", [6, 2], reward=1.0)
    ((row,),) = ALGORITHM.build([Group("g", [], [7], [worse, better])])
    assert row.tokens == [7, 6, 2]
    assert row.trained == [False, True, True]


def test_it_learns_the_only_completion_though_nobody_scored_it():
    ((row,),) = ALGORITHM.build([Group("g", [], [7], [Completion("text", [5, 2])])])
    assert row.tokens == [7, 5, 2]


def test_untrained_tokens_of_a_completion_stay_untrained():
    turns = Completion("two turns", [5, 6, 2], trained=[True, False, True])
    ((row,),) = ALGORITHM.build([Group("g", [], [7], [turns])])
    assert row.trained == [False, True, False, True]


def test_it_has_no_keys_of_its_own():
    with pytest.raises(ValidationError, match="beta"):
        SFTConfig(name="sft", beta=0.1)
