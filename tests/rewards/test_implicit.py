"""The implicit reward by models whose log-probabilities a test has chosen."""

import pytest
import torch

from alignkit.core.errors import RecipeError, RunFailed
from alignkit.rewards.implicit import Implicit, ImplicitConfig
from tests.rewards.scripted import rows

PROMPTS = [[1, 2], [1, 2], [3]]
IDS = torch.tensor([[5, 6, 0], [7, 8, 9], [4, 0, 0]])
LENGTHS = torch.tensor([2, 3, 1])


class Priced:
    """Models of which each gives every token the same log-probability; `asked` holds what each was asked."""

    def __init__(self, versions, **prices):
        self.versions, self.prices, self.asked = versions, prices, {}

    def identity(self, model="policy"):
        return self.versions[model]

    def logps(self, units, model="policy"):
        self.asked[model] = units
        return [[self.prices[model]] * sum(row.trained) for unit in units for row in unit]


def batch(lengths=LENGTHS):
    found = rows(["a", "b"], ["c"])
    found.prompt_ids, found.completion_ids = PROMPTS, IDS
    found.completion_mask = torch.arange(3) < lengths[:, None]
    return found


def implicit(**keys):
    return Implicit(ImplicitConfig(**keys))


MOVED = {"policy": "2", "previous": "1", "base": "0"}
PRICES = {"policy": -1.0, "previous": -1.5, "base": -3.0}


def test_the_sum_of_log_ratios_of_both_models():
    models = Priced(MOVED, **PRICES)
    output = implicit().score(batch(), models)
    assert output.score.tolist() == [4.0, 6.0, 2.0]
    assert output.components["previous"].tolist() == [3.0, 4.5, 1.5]
    assert output.valid.tolist() == [True] * 3
    (first,), *_ = models.asked["base"]
    assert (first.tokens, first.trained) == ([1, 2, 5, 6], [False, False, True, True])
    assert [len(row.tokens) for (row,) in models.asked["policy"]] == [4, 5, 2]


def test_scale_and_mean():
    models = Priced(MOVED, **PRICES)
    assert implicit(beta=0.1).score(batch(), models).score.tolist() == pytest.approx([0.4, 0.6, 0.2])
    output = implicit(length_normalize=True).score(batch(), models)
    assert output.score.tolist() == [2.0] * 3
    assert output.components["previous"].tolist() == [1.5] * 3


def test_a_model_that_is_still_the_base_is_asked_how_likely_a_token_is():
    models = Priced({"policy": "1", "previous": "0", "base": "0"}, policy=-1.0, base=-3.0, previous=-3.0)
    output = implicit().score(batch(), models)
    assert output.score.tolist() == [4.0, 6.0, 2.0]
    assert output.components["previous"].tolist() == [-3.0] * 3
    at_first = implicit(beta=2).score(batch(), Priced(dict.fromkeys(MOVED, "0"), policy=-3.0))
    assert at_first.score.tolist() == at_first.components["previous"].tolist() == [-6.0] * 3


def test_equal_weights_are_asked_once():
    models = Priced({"policy": "1", "previous": "0", "base": "0"}, **PRICES)
    implicit().score(batch(), models)
    assert len(models.asked) == 2


def test_what_has_no_tokens_has_no_reward():
    models = Priced(MOVED, **PRICES)
    output = implicit().score(batch(torch.tensor([2, 0, 1])), models)
    assert output.valid.tolist() == [True, False, True]
    assert output.score.tolist() == [4.0, 0.0, 2.0]
    assert output.components["previous"].tolist() == [3.0, 0.0, 1.5]


def test_the_models_it_asks():
    assert implicit().models() == ("policy", "base", "previous")
    source = implicit(model="twin", base="reference", previous=None)
    assert source.models() == ("twin", "reference")
    output = source.score(batch(), Priced({"twin": "1", "reference": "0"}, twin=-1.0, reference=-3.0))
    assert output.components == {}


def test_it_needs_models_and_tokens():
    with pytest.raises(RecipeError, match="'implicit' asks the models of a run"):
        implicit().score(batch(), None)
    with pytest.raises(RunFailed, match="come without any"):
        implicit().score(rows(["a"]), Priced(MOVED, **PRICES))
