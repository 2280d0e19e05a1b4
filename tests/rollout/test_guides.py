"""What a model is while it writes: mixtures of several output layers."""

import copy
from contextlib import contextmanager

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.core import RecipeError, register
from alignkit.core.contracts import Heads
from alignkit.core.types import Group
from alignkit.models.heads import attach, extra, output_layer
from alignkit.recipe import dump_recipe, load_recipe, recipe_schema
from alignkit.rollout.config import SamplingConfig
from alignkit.rollout.guides import Guide, build_guide
from alignkit.rollout.guides.head_weighted import HeadWeighted, HeadWeightedConfig, in_order
from alignkit.rollout.native import NativeEngine

NAMES = ("a", "b", "c")
PROMPTS = [Group(f"g{i}", [], [1, 5 + i]) for i in range(6)]


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).float()


@pytest.fixture(scope="module")
def model(plain):
    """The same with three heads, far apart."""
    headed = copy.deepcopy(plain)
    attach(headed, Heads(names=NAMES, noise=0.3), seed=0)
    return headed


def written(model, **sampling):
    engine = NativeEngine(
        model,
        stop_ids=(4,),
        pad_id=0,
        decode=lambda tokens: " ".join(map(str, tokens)),
        sampling=SamplingConfig(max_completion_length=8, **sampling),
        seed=0,
    )
    return [completion.tokens for group in engine.fill(PROMPTS, 2) for completion in group.completions]


def weighted(model, weights=None, **keys):
    return written(model, guides=[{"name": "head_weighted", "head_weights": weights, **keys}])


def logits(model, weights):
    with build_guide(HeadWeightedConfig(name="head_weighted", head_weights=weights)).over(model), torch.no_grad():
        return model(input_ids=torch.tensor([[1, 6, 7, 8]])).logits


def with_head(model, number):
    with output_layer(model, extra(model).weights[number]):
        return written(model)


def test_it_is_registered_under_its_name():
    assert register.guide.get("head_weighted").target is HeadWeighted


def test_a_one_hot_mixture_is_the_single_head(model):
    alone = []
    for i in range(3):
        merged = copy.deepcopy(model)
        merged.lm_head.weight.data.copy_(extra(merged).weights[i].data)
        del merged._modules["alignkit_heads"]
        alone.append(written(merged))
        one_hot = [float(i == j) for j in range(3)]
        assert weighted(model, one_hot) == weighted(model, {NAMES[i]: 2.0}) == weighted(model, head_index=i) == alone[i]
    assert alone[0] != alone[1] != alone[2]


def test_mixing_logits_and_mixing_weights_write_the_same_tokens(model):
    """Token by token: the merged head, and the mean of what every head says."""
    shares, weights = (0.5, 0.3, 0.2), [5, 3, 2]
    each = [logits(model, [float(i == j) for j in range(3)]) for i in range(3)]
    torch.testing.assert_close(logits(model, weights), sum(s * x for s, x in zip(shares, each, strict=True)))
    merged = copy.deepcopy(model)
    merged.lm_head.weight.data.copy_(extra(model).mixture(weights))
    del merged._modules["alignkit_heads"]
    assert weighted(model, weights) == written(merged)


def test_without_weights_all_heads_count_the_same(model):
    assert written(model) == weighted(model) == weighted(model, [1, 1, 1])
    assert written(model) != weighted(model, [1, 0, 0])


def test_weights_of_identical_heads_are_irrelevant(plain):
    model = copy.deepcopy(plain)
    attach(model, Heads(names=NAMES), seed=0)
    assert written(plain) == weighted(model, [1, 0, 0]) == weighted(model, [1, 2, 1])


def test_the_model_is_afterwards_what_it_was(model):
    before = model.lm_head.weight
    weighted(model, [1, 0, 0])
    with pytest.raises(ZeroDivisionError), build_guide(HeadWeightedConfig(name="head_weighted")).over(model):
        raise ZeroDivisionError
    assert model.lm_head.weight is before


def test_a_model_with_one_head_is_refused_before_it_writes(plain):
    with pytest.raises(RecipeError, match="this model has but its own"):
        weighted(plain, [1.0])


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"head_weights": {"d": 1.0}}, "no head 'd' to weigh; the heads are a, b, c"),
        ({"head_weights": [1.0, 1.0]}, "2 head weights for 3 heads: a, b, c"),
        ({"head_index": 3}, "the heads are 0 to 2"),
    ],
)
def test_weights_of_other_heads_are_refused(model, keys, complaint):
    with pytest.raises(RecipeError, match=complaint):
        written(model, guides=[{"name": "head_weighted", **keys}])


@pytest.mark.parametrize("weights", [[1.0, -0.5], {"a": -1.0}, [0.0, 0.0], {}, [float("nan")], [float("inf"), 1.0]])
def test_weights_that_make_no_mean_are_refused(weights):
    with pytest.raises(ValidationError, match="none may be negative, and one must be above 0"):
        HeadWeightedConfig(name="head_weighted", head_weights=weights)
    with pytest.raises(RecipeError, match="none may be negative, and one must be above 0"):
        in_order(weights, NAMES)


def recipe(guides):
    return {
        "output_dir": "runs/x",
        "model": {"name_or_path": "owner/model"},
        "data": [{"path": "owner/pairs"}],
        "algorithm": {"name": "mah_dpo", "objectives": ["a", "b"]},
        "eval": {"sampling": {"guides": guides}},
    }


@pytest.mark.parametrize("weights", [{"a": 0.25, "b": 1}, [0.25, 1], None])
def test_a_recipe_with_guides_survives_being_written_down(weights, tmp_path):
    loaded = load_recipe(recipe([{"name": "head_weighted", "head_weights": weights}]))
    (guide,) = loaded.eval.sampling.guides
    assert guide == HeadWeightedConfig(name="head_weighted", head_weights=weights)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(loaded))
    assert load_recipe(path) == loaded
    assert load_recipe(path, ["eval.sampling.guides.0.head_weights=null"]).eval.sampling.guides[0].head_weights is None


@pytest.mark.parametrize(
    ("guide", "complaint"),
    [
        ({"name": "head_wieghted"}, "did you mean 'head_weighted'"),
        ({"name": "head_weighted", "head_weight": [1, 0]}, "did you mean 'head_weights'"),
        ({"name": "head_weighted", "head_weights": {"a": 1, "b": -1}}, "none may be negative"),
        ({"name": "head_weighted", "head_weights": [1, 0], "head_index": 0}, "give one of them"),
        ({"head_weights": [1, 0]}, "name  missing key"),
    ],
)
def test_mistakes_in_guides_are_reported_with_their_place(guide, complaint):
    with pytest.raises(RecipeError, match=rf"eval\.sampling\.guides\.0.*{complaint}"):
        load_recipe(recipe([guide]))


def test_the_schema_knows_the_keys_of_guides():
    choices = {choice["title"]: choice for choice in recipe_schema()["$defs"]["GuideConfig"]["oneOf"]}
    assert set(choices["head_weighted"]["properties"]) == {"name", "head_weights", "head_index"}


class Reversed(Guide):
    """Says the opposite."""

    @contextmanager
    def over(self, model):
        with output_layer(model, -model.lm_head.weight):
            yield


def test_a_guide_of_your_own_is_named_by_its_path(plain):
    path = f"{__name__}:Reversed"
    opposite = copy.deepcopy(plain)
    opposite.lm_head.weight = torch.nn.Parameter(-plain.lm_head.weight.detach())
    assert written(plain, guides=[{"name": path}]) == written(opposite) != written(plain)
    with pytest.raises(RecipeError, match=r"expected a subclass of alignkit\.rollout\.guides\.Guide"):
        SamplingConfig(guides=[{"name": f"{__name__}:written"}])
