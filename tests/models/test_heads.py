"""What stands on a backbone besides its own output layer: output layers a row chooses from, scores, several models."""

import pytest
import torch
from torch.nn.functional import linear

from alignkit.core.contracts import Heads
from alignkit.core.errors import RecipeError
from alignkit.core.types import Row
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.models.config import LoraConfig, ModelConfig
from alignkit.models.heads import extra, head_names, mixed, score_layer
from alignkit.models.layout import lay_out
from alignkit.models.load import load_policy, load_renderer, set_padding
from alignkit.models.policy import LOGPS, SCORES, CausalPolicy, ForwardOptions
from alignkit.testing import build_tiny_model

CPU = torch.device("cpu")
LAYOUTS = ["padded", "packed", "prefix_shared"]
PROMPT, ANSWERS = [1, 10, 11, 12, 13, 14, 15], [[20, 21, 2], [30, 2], [40, 41, 42, 43, 2]]
LORA = LoraConfig(r=4, alpha=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("heads") / "model")


def policy_of(model, heads, layout="auto", *, lora=None, seed=0):
    config = ModelConfig(name_or_path=str(model), dtype="float32", layout=layout, lora=lora)
    bare = load_policy(config, seed, heads)
    return CausalPolicy(bare, DistEngine(torch.float32), ForwardOptions(layout), heads)


def scored(prompt, answer):
    """A row that is scored at its last token: the token after it is what carries the score."""
    tokens = [*prompt, *answer, answer[-1]]
    return Row(tokens, [False] * (len(tokens) - 1) + [True], inputs={"prompt": float(len(prompt))})


def spoken(prompt, answer, head):
    return Row([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), inputs={"head": float(head)})


SCORED = collate([tuple(scored(PROMPT, answer) for answer in ANSWERS), tuple(scored([1, 9], a) for a in ANSWERS)])
SPOKEN = collate([tuple(spoken(PROMPT, a, head) for a in ANSWERS) for head in (1, 0, 1)])


def last_scores(policy, batch=SCORED):
    """[N, H]: every row here is scored once."""
    with torch.no_grad():
        out = policy.forward(batch, SCORES)
    assert not out.logps.any()
    return out.scores.sum(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_classifier_scores_the_last_token(model, layout, lora):
    policy = policy_of(model, Heads("sequence", ("good", "short")), layout, lora=lora)
    found = last_scores(policy)
    assert found.shape == (6, 2)
    rows = [[*p, *a] for p in (PROMPT, [1, 9]) for a in ANSWERS]
    with torch.no_grad():
        expected = torch.cat([policy.bare.eval()(input_ids=torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert policy.bare.config.id2label == {0: "good", 1: "short"}


def test_rows_scored_at_their_end_share_their_prompt():
    shared = lay_out(SCORED, "prefix_shared", CPU)
    assert shared.segments.branches == (3, 3)
    assert shared.tokens.shape[1] == len(PROMPT) + 2 + 2 * 10
    assert lay_out(SCORED, "packed", CPU).tokens.shape[1] == 3 * (len(PROMPT) + 2) + 2 * 10


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_a_token_classifier_scores_marked_places(model, layout):
    policy = policy_of(model, Heads("token", ("bad", "good")), layout)
    tokens = [*PROMPT, 20, 21, 22, 23]
    row = Row(tokens, [i in (8, 10) for i in range(len(tokens))])
    with torch.no_grad():
        found = policy.forward(collate([(row,)]), SCORES).scores
        expected = policy.bare.eval()(input_ids=torch.tensor([tokens])).logits
    torch.testing.assert_close(found[0, [8, 10]], expected[0, [7, 9]], rtol=0, atol=1e-5)
    assert not found[0, [7, 9]].any()


def test_a_frozen_backbone_trains_its_hidden_score_alone(model, tmp_path):
    policy = policy_of(model, Heads("token", ("value",), hidden=True, frozen=True))
    assert {id(p) for p in policy.parameters()} == {id(p) for p in score_layer(policy.bare).parameters()}
    loss = policy.loss(SCORED, SCORES, lambda out, _: out.scores.square().sum())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    policy.save(tmp_path)
    other = policy_of(model, Heads("token", ("value",), hidden=True, frozen=True), seed=1)
    assert not torch.equal(last_scores(policy), last_scores(other))
    other.load(tmp_path)
    assert torch.equal(last_scores(policy), last_scores(other))
    with pytest.raises(RecipeError, match=r"model.lora: the backbone is frozen"):
        policy_of(model, Heads("token", ("value",), hidden=True, frozen=True), lora=LORA)


def test_score_layers_are_drawn_from_the_seed(model):
    first, again, other = (policy_of(model, Heads("sequence", ("good",)), seed=seed) for seed in (0, 0, 1))
    weights = [policy.bare.score.weight.detach() for policy in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.5 < float(weights[0].std()) * (first.bare.config.hidden_size + 1) ** 0.5 < 1.5


def test_plain_transformers_scores_batches_as_the_run_does(model, tmp_path):
    """Its classifiers look for the last token that is not padding: the end of text must not be padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    heads = Heads("sequence", ("good",))
    policy = policy_of(model, heads)
    renderer = load_renderer(ModelConfig(name_or_path=str(model)))
    renderer.tokenizer.pad_token = renderer.tokenizer.eos_token
    set_padding([policy.bare], renderer)
    policy.save(tmp_path)
    renderer.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    rows = [[*p, *a] for p in (PROMPT, [1, 9]) for a in ANSWERS]
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        scores = loaded(**padded).logits
    torch.testing.assert_close(scores, last_scores(policy), rtol=0, atol=1e-5)
    assert policy_of(tmp_path, heads, seed=3).bare.score.weight.equal(policy.bare.score.weight)  # it goes on from there


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_several_models_stand_side_by_side(model, lora, tmp_path):
    heads = Heads("sequence", ("good",), members=2)
    policy = policy_of(model, heads, lora=lora)
    scores = last_scores(policy)
    assert scores.shape == (6, 2)
    assert not torch.allclose(scores[:, 0], scores[:, 1])
    policy.loss(SCORED, SCORES, lambda out, _: out.scores[..., 0].sum()).backward()
    touched = [any(p.grad is not None and bool(p.grad.any()) for p in m.parameters()) for m in policy.bare.models]
    assert touched == [True, False]
    policy.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member-0", "member-1"]
    other = policy_of(model, heads, lora=lora, seed=5)
    other.load(tmp_path)
    assert torch.equal(last_scores(other), scores)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_row_goes_through_its_own_head(model, layout, lora):
    policy = policy_of(model, Heads(names=("a", "b"), noise=0.3), layout, lora=lora)
    single = {}
    for name, weights in {"a": [1, 0], "b": [0, 1]}.items():
        with mixed(policy.bare, weights), torch.no_grad():
            logits = policy.bare.eval()(input_ids=SPOKEN.inputs["tokens"]).logits.log_softmax(-1)
        single[name] = logits[:, :-1].gather(2, SPOKEN.inputs["tokens"][:, 1:, None])[..., 0]
    expected = torch.where(SPOKEN.inputs["head"][:, None] == 0, single["a"], single["b"])
    with torch.no_grad():
        found = policy.forward(SPOKEN, LOGPS).logps
    mask = SPOKEN["mask"]
    torch.testing.assert_close(found[mask], expected[mask[:, 1:]], rtol=0, atol=1e-5)
    total = policy.loss(SPOKEN, LOGPS, lambda out, _: out.logps.sum())
    torch.testing.assert_close(total, found.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_an_absent_head_has_a_gradient_of_zero(model, layout):
    policy = policy_of(model, Heads(names=("a", "b", "c")), layout)
    policy.loss(SPOKEN, LOGPS, lambda out, _: out.logps.sum()).backward()
    grads = [weight.grad for weight in extra(policy.bare).weights]
    assert [bool(grad.any()) for grad in grads] == [True, True, False]
    assert policy.bare.lm_head.weight.grad is None
    assert policy.bare.model.embed_tokens.weight.grad.any()


def test_without_its_adapter_a_policy_speaks_through_the_first_output_layer(model):
    policy = policy_of(model, Heads(names=("a", "b"), noise=0.3), lora=LORA)
    plain = policy_of(model, Heads())
    with torch.no_grad(), policy.as_reference():
        torch.testing.assert_close(policy.forward(SPOKEN, LOGPS).logps, plain.forward(SPOKEN, LOGPS).logps)
    with torch.no_grad():
        assert not torch.allclose(policy.forward(SPOKEN, LOGPS).logps, plain.forward(SPOKEN, LOGPS).logps)


def test_mixtures_are_of_logits_and_their_weights_are_shares(model):
    heads = extra(policy_of(model, Heads(names=("a", "b"), noise=0.3)).bare)
    states = torch.randn(4, heads.weights[0].shape[1])
    first, second = (linear(states, weight) for weight in heads.weights)
    torch.testing.assert_close(linear(states, heads.mixture([3, 1])), (3 * first + second) / 4)
    assert torch.equal(heads.mixture([2, 0]), heads.weights[0])
    for wrong in ([1], [1, -1], [0, 0]):
        with pytest.raises(ValueError, match="expected 2 numbers, one each for a, b"):
            heads.mixture(wrong)


def test_the_saved_model_writes_with_the_even_mixture(model, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = policy_of(model, Heads(names=("a", "b"), noise=0.3))
    before = policy.bare.lm_head.weight.clone()
    policy.save(tmp_path, torch.float32)
    assert torch.equal(policy.bare.lm_head.weight, before)
    assert head_names(tmp_path) == ["a", "b"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded.lm_head.weight, extra(policy.bare).mixture([1, 1]))
    assert torch.equal(loaded.model.embed_tokens.weight, policy.bare.model.embed_tokens.weight)
    other = policy_of(model, Heads(names=("a", "b"), noise=0.3), seed=2)
    other.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(other.forward(SPOKEN, LOGPS).logps, policy.forward(SPOKEN, LOGPS).logps)


def test_first_use_and_rescored_rows_tell_a_wrong_head(model):
    policy = policy_of(model, Heads(names=("a", "b"), noise=0.3))
    row = spoken(PROMPT, ANSWERS[0], 1)
    right = policy.plain_logps(row).logps
    with torch.no_grad():
        torch.testing.assert_close(policy.told(collate([(row,)]))[0][-3:], right[-3:], rtol=0, atol=1e-5)
    other = policy.plain_logps(spoken(PROMPT, ANSWERS[0], 0)).logps
    assert not torch.allclose(other[-3:], right[-3:], atol=1e-2)
