"""The writer for Llama's block: what it takes, and that it steps back where it would say something else."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from alignkit.models.affine import read_affine
from alignkit.rollout import fused, native
from alignkit.rollout.draw import support_logps
from alignkit.rollout.fused import why_not
from alignkit.rollout.writer import close_up
from tests.rollout.test_native import FAMILIES, SIZES, build, engine, prompts, tokens_by_id


def adapted(**settings):
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def layer_of(model):
    return model.get_base_model().model.layers[0].self_attn.q_proj


def test_rows_close_up_within_their_families():
    assert close_up([0, 2, 3], "aaaa") == [0, 3, 2]
    assert close_up([1, 3, 4, 6], "aaabbbb") == [1, 6, 4, 3]
    assert close_up([0, 1, 2], "aab") == [0, 1, 2]
    assert close_up([], "aa") == []
    families = "aaabbbbbccdd"
    for kept in ([2, 3, 7, 9, 11], [0, 4, 6, 7, 8, 10, 11], [5], [1, 2, 3, 4, 5, 6, 7, 11]):
        order, memory = close_up(kept, families), list(range(12))
        for place, row in enumerate(order):
            memory[place] = memory[row]  # in the order of places, as memory is moved
        assert sorted(order) == kept
        assert memory[: len(kept)] == order
        assert "".join(families[row] for row in order) == "".join(families[row] for row in kept)


def test_weights_are_read_at_every_use():
    model, groups = build("llama"), prompts(4)
    sampler = engine(model)
    before = tokens_by_id(sampler.fill(groups, 2))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    after = tokens_by_id(sampler.fill(groups, 2))
    assert after != before
    assert after == tokens_by_id(engine(model, fused=False).fill(groups, 2))


def test_how_weights_are_laid_out_changes_nothing(monkeypatch):
    model, groups = build("qwen3"), prompts(4)
    monkeypatch.setattr(native, "PlainWriter", lambda *_: pytest.fail("it was written with the model's forward"))
    expected = tokens_by_id(engine(model).fill(groups, 2))
    laid_out, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, rows: laid_out.append(1) or reorder(weight, rows)
    )
    assert tokens_by_id(engine(model).fill(groups, 2)) == expected
    assert not laid_out
    monkeypatch.setattr(fused, "LARGE", 0)
    assert tokens_by_id(engine(model).fill(groups, 2)) == expected
    assert len(laid_out) == 2 * (2 * 5 + 1)  # to be tried, and to write: five products of two layers, and the head
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert tokens_by_id(engine(model).fill(groups, 2)) == expected
    assert len(laid_out) == 22


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])
def test_other_precisions(dtype, allowed, monkeypatch):
    monkeypatch.setattr(native, "PlainWriter", lambda *_: pytest.fail("it was written with the model's forward"))
    model = build("qwen3").to(dtype)
    sampler = engine(model, max_batch=5)
    for group in sampler.fill(prompts(6), 2):
        for completion in group.completions:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*group.prompt, *completion.tokens]])).logits[0]
            table = support_logps(logits[len(group.prompt) - 1 : -1], sampler.sampling)
            expected = table.gather(-1, torch.tensor(completion.tokens)[:, None]).squeeze(-1)
            assert (torch.tensor(completion.logps) - expected).abs().mean() < allowed


def test_a_writer_that_differs_is_not_used(monkeypatch):
    model, groups = build("llama"), prompts(4)
    expected = tokens_by_id(engine(model, fused=False).fill(groups, 2))
    turn = fused._turn
    monkeypatch.setattr(fused, "_turn", lambda x, turns: turn(x, turns.conj()))
    sampler = engine(model)
    with pytest.warns(UserWarning, match=r"slower: log-probabilities .* nats apart") as said:
        assert tokens_by_id(sampler.fill(groups, 2)) == expected
    assert tokens_by_id(sampler.fill(groups, 2)) == expected
    assert len(said) == 1


def test_what_it_does_not_take(monkeypatch):
    assert why_not(build("llama"), 64) is None
    assert "no kernel on meta" in why_not(build("llama").to("meta"), 64)
    assert "gemma2 has another block" in why_not(build("gemma2, softcaps and a window"), 64)
    mistral = build("mistral, a window")
    assert "65 tokens do not fit its window of 6" in why_not(mistral, 65)
    assert why_not(mistral, 6) is None
    turning = {**SIZES, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    monkeypatch.setitem(FAMILIES, "dynamic", ("Llama", turning))
    assert "dynamic" in why_not(build("dynamic"), 64)


def test_adapters_become_weights():
    model = adapted(lora_alpha=8)
    layer, x = layer_of(model), torch.randn(3, 32)
    weight, bias = read_affine(layer)
    assert bias is None
    torch.testing.assert_close(x @ weight.T, layer(x))
    with model.disable_adapter():
        assert read_affine(layer)[0] is layer.base_layer.weight


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize(
    ("settings", "dtype", "why"),
    [
        ({"use_dora": True}, torch.float32, "more than the product"),
        ({"lora_bias": True}, torch.float32, "more than the product"),
        ({}, torch.bfloat16, "bfloat16 weights are too coarse"),
    ],
)
def test_an_adapter_that_cannot_be_worked_in_is_written_with_as_it_is(settings, dtype, why):
    model, groups = adapted(**settings), prompts(4)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(dtype)
    with pytest.raises(ValueError, match=why):
        read_affine(layer_of(model))
    expected = tokens_by_id(engine(model, fused=False).fill(groups, 2))
    with pytest.warns(UserWarning, match=f"slower: a first use failed: .*{why}"):
        assert tokens_by_id(engine(model).fill(groups, 2)) == expected


def test_other_layers_are_no_matrices():
    with pytest.raises(ValueError, match=r"Embedding is not a plain linear layer"):
        read_affine(torch.nn.Embedding(3, 4))
