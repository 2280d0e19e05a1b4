"""The in-process sampler: draws, log-probabilities, stops, and independence from the batch."""

import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.core.errors import DataError, RunFailed
from alignkit.core.types import Completion, Group
from alignkit.rollout.config import SamplingConfig
from alignkit.rollout.native import NativeEngine, draw, support_logps

STOP = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=STOP,
    )
    return LlamaForCausalLM(config).float()


def engine(model, *, stop_ids=(STOP,), seed=0, max_batch=64, **sampling):
    return NativeEngine(
        model,
        stop_ids=stop_ids,
        pad_id=0,
        decode=lambda tokens: " ".join(map(str, tokens)),
        sampling=SamplingConfig(**{"max_completion_length": 12, **sampling}),
        seed=seed,
        max_batch=max_batch,
    )


def prompts(count):
    """Groups with prompts of 1 to 9 tokens."""
    draws = random.Random(1)
    return [
        Group(f"g{i}", [], [1, *(draws.randrange(5, 40) for _ in range(draws.randrange(0, 9)))]) for i in range(count)
    ]


def tokens_by_id(groups):
    return {group.id: [completion.tokens for completion in group.completions] for group in groups}


def full_forward_logps(model, prompt, tokens, sampling):
    """Log-probabilities of `tokens` by one unpadded forward without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    table = support_logps(logits[len(prompt) - 1 : -1], sampling)
    return table.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1).tolist()


def test_tokens_do_not_depend_on_the_batch(model):
    groups = prompts(8)
    together = tokens_by_id(engine(model).fill(groups, 3))
    alone = tokens_by_id(engine(model, max_batch=1).fill(groups, 3))
    backwards = tokens_by_id(engine(model, max_batch=5).fill(groups[::-1], 3))
    assert together == alone == backwards
    lengths = {len(tokens) for completions in together.values() for tokens in completions}
    assert len(lengths) > 3, "rows must finish at different times for this test to say anything"


def test_seed_version_and_index_change_the_draw(model):
    groups = prompts(4)
    first = engine(model)
    base = tokens_by_id(first.fill(groups, 2))
    assert base == tokens_by_id(engine(model).fill(groups, 2))
    assert any(one != two for one, two in base.values())
    assert base != tokens_by_id(engine(model, seed=1).fill(groups, 2))
    first.sync(3)
    later = first.fill(groups, 2)
    assert base != tokens_by_id(later)
    assert {completion.version for group in later for completion in group.completions} == {3}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 7, "top_p": 0.8}])
def test_logps_agree_with_a_plain_forward(model, sampling):
    sampler = engine(model, **sampling)
    for group in sampler.fill(prompts(8), 2):
        for completion in group.completions:
            expected = full_forward_logps(model, group.prompt, completion.tokens, sampler.sampling)
            assert completion.logps == pytest.approx(expected, abs=1e-5)


def test_stop_token_is_kept_in_tokens_and_left_out_of_the_text(model):
    completions = [c for group in engine(model).fill(prompts(16), 2) for c in group.completions]
    stopped = [c for c in completions if c.tokens[-1] == STOP]
    assert stopped
    assert len(stopped) < len(completions)
    for completion in completions:
        assert STOP not in completion.tokens[:-1]
        assert len(completion.tokens) == 12 or completion.tokens[-1] == STOP
        spoken = completion.tokens[:-1] if completion.tokens[-1] == STOP else completion.tokens
        assert completion.text == " ".join(map(str, spoken))
        assert len(completion.logps) == len(completion.tokens)


def test_full_groups_pass_and_inputs_stay_as_they_are(model):
    mine = Completion("mine", [5, 6])
    full = Group("full", [], [1, 5], [mine, Completion("too", [7])])
    half = Group("half", [], [1, 6], [mine])
    filled = engine(model).fill([full, half], 2)
    assert filled[0] is full
    assert half.completions == [mine]
    assert filled[1].completions[0] is mine
    assert len(filled[1].completions) == 2
    # the second sample of a group is the same whether or not the first one was already there
    empty = Group("half", [], [1, 6])
    assert filled[1].completions[1].tokens == engine(model).fill([empty], 2)[0].completions[1].tokens


def test_temperature_zero_takes_the_likeliest_token(model):
    group = engine(model, temperature=0.0, stop_ids=()).fill([Group("g", [], [1, 9, 12])], 1)[0]
    tokens = [1, 9, 12]
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    assert group.completions[0].tokens == tokens[3:]
    assert group.completions[0].logps == [0.0] * 12


def test_completion_ends_with_the_context(model):
    group = Group("long", [], [1] + [7] * 28)
    filled = engine(model, stop_ids=()).fill([group], 1)[0]
    assert len(filled.completions[0].tokens) == 3
    with pytest.raises(DataError, match=r"'long'.*32 tokens.*context is 32"):
        engine(model).fill([Group("long", [], [1] * 32)], 1)


def test_training_mode_and_checkpointing_are_left_as_they_were(model):
    model.train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    expected = tokens_by_id(engine(model).fill(prompts(4), 1))
    assert model.training
    assert model.model.layers[0].mlp.training
    assert not model.model.layers[1].mlp.training
    model.gradient_checkpointing_disable()
    model.eval()
    assert expected == tokens_by_id(engine(model).fill(prompts(4), 1))


def test_broken_weights_are_named(model):
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(RunFailed, match=r"group 'g0'.*not finite"):
        engine(broken).fill(prompts(1), 1)


def test_support_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    by_k = support_logps(logits, SamplingConfig(top_k=2)).exp()
    torch.testing.assert_close(by_k, torch.tensor([[0.625, 0.375, 0.0, 0.0]]).double(), rtol=0, atol=1e-7)
    # 0.5 does not reach 0.7, 0.5 + 0.3 does
    by_p = support_logps(logits, SamplingConfig(top_p=0.7)).exp()
    torch.testing.assert_close(by_p, torch.tensor([[0.625, 0.375, 0.0, 0.0]]).double(), rtol=0, atol=1e-7)
    cooler = support_logps(logits, SamplingConfig(temperature=0.5)).exp()
    total = 0.25 + 0.09 + 0.0225 + 0.0025
    torch.testing.assert_close(cooler, torch.tensor([[0.25, 0.09, 0.0225, 0.0025]]).double() / total, rtol=0, atol=1e-7)
    # top_p looks at what top_k left: 0.625 reaches 0.6 alone
    both = support_logps(logits, SamplingConfig(top_k=2, top_p=0.6)).exp()
    torch.testing.assert_close(both, torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double())


def test_inverse_cdf_by_hand():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    tokens, logps = draw(logits, uniforms, SamplingConfig())
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]  # the token of probability 0 is never drawn, not even on its border
    assert logps.tolist() == pytest.approx([math.log(p) for p in (0.25, 0.25, 0.5, 0.5, 0.25, 0.25)], abs=1e-7)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_k": 4, "top_p": 0.95}])
def test_frequencies_follow_the_distribution(sampling):
    torch.manual_seed(3)
    toy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=5,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            initializer_range=0.7,
        )
    )
    count = 6000
    sampler = engine(toy, stop_ids=(), max_batch=2000, max_completion_length=1, **sampling)
    drawn = [c.tokens[0] for c in sampler.fill([Group("toy", [], [1, 2, 3])], count)[0].completions]
    with torch.no_grad():
        logits = toy(input_ids=torch.tensor([[1, 2, 3]])).logits[:, -1]
    exact = support_logps(logits, sampler.sampling).exp()[0].tolist()
    possible = [token for token in range(5) if exact[token] > 0]
    assert set(drawn) <= set(possible)
    chi_square = sum((drawn.count(t) - count * exact[t]) ** 2 / (count * exact[t]) for t in possible)
    assert chi_square < {2: 10.8, 3: 13.8, 4: 16.3, 5: 18.5}[len(possible)]  # 99.9 % quantiles
