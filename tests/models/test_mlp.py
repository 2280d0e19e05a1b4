"""Gated feed-forwards that keep less for backward: the same numbers, in streams alone, and the module as it was."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from alignkit.core.errors import RecipeError
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.models import mlp
from alignkit.models.mlp import light_feed_forwards
from alignkit.models.policy import CausalPolicy, ForwardOptions
from alignkit.testing import relative_difference
from tests.models.test_exactness import ALLOWED, LOGPS, SIZES, build, objective, pairs

UNITS = pairs(4, 20, 12)
BATCH = collate(UNITS)
TRAINED_BY_LORA = [["q_proj", "gate_proj", "up_proj", "down_proj"], ["q_proj"]]


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=dtype).requires_grad_()


def with_adapters(model: Any, targets: list[str]) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, config)


def gradients(model: Any, layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    policy = CausalPolicy(model, DistEngine(dtype), ForwardOptions(layout))
    loss = policy.loss(BATCH, LOGPS, objective)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept(model: Any, layout: str) -> list[int]:
    """How many tensors as wide as the feed-forward are kept for the backward pass, of each of the two layers."""
    policy = CausalPolicy(model, DistEngine(torch.float32), ForwardOptions(layout))
    weights = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.shape[-1] == SIZES["intermediate_size"] and x.data_ptr() not in weights:
            seen[x.data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        policy.loss(BATCH, LOGPS, objective)
    sizes = [x.numel() for x in seen.values()]
    return [sizes.count(size) for size in sorted(set(sizes), reverse=True)]  # the last layer has fewer rows


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_by_finite_differences(bias):
    gate, up, weight = (numbers(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(1, 3, 5), (1, 3, 5), (4, 5)]))
    rest = (numbers(4, seed=3, dtype=torch.float64),) if bias else ()
    assert gradcheck(mlp._GatedLinear.apply, (gate, up, weight, *rest))
    assert gradcheck(mlp._GatedLinear.apply, (gate, up, weight.detach(), *rest))
    assert gradcheck(mlp._Gated.apply, (gate, up))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_module(bias, autocast):
    torch.manual_seed(0)
    module: Any = LlamaMLP(LlamaConfig(**SIZES, mlp_bias=bias))
    x = numbers(1, 7, SIZES["hidden_size"], seed=1)

    def run(forward: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = forward(x)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])]

    for found, expected in zip(run(lambda x: mlp._feed_forward(module, x)), run(module), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("targets", TRAINED_BY_LORA, ids=["adapted feed-forward", "adapted attention"])
@pytest.mark.parametrize("family", ["llama", "qwen2, tied"])
def test_adapters_train_the_same(family, targets):
    model = with_adapters(build(family), targets)
    loss, found = gradients(model, "prefix_shared")
    expected_loss, expected = gradients(model, "padded")
    assert found.keys() == expected.keys() != set()
    torch.testing.assert_close(loss, expected_loss)
    assert relative_difference(found, expected) <= ALLOWED


def test_half_of_it_is_kept():
    assert kept(build("llama"), "padded") == [8]  # both layers see the same rows
    assert kept(build("llama"), "prefix_shared") == [2, 2]
    assert kept(with_adapters(build("llama"), TRAINED_BY_LORA[0]), "prefix_shared") == [3, 3]
    assert kept(with_adapters(build("llama"), ["q_proj", "lm_head"]), "prefix_shared") == [2, 2]  # whole logits


def test_a_model_is_as_before_after_a_call():
    model = build("llama")
    inside = []
    with light_feed_forwards(model):
        inside += ["forward" in vars(layer.mlp) for layer in model.model.layers]
    with pytest.raises(KeyError), light_feed_forwards(model):
        raise KeyError
    assert inside == [True, True]
    assert not any("forward" in vars(module) for module in model.modules())


def test_rows_that_run_again_in_backward_run_as_they_did():
    model = build("llama")
    loss, expected = gradients(model, "prefix_shared")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, found = gradients(model, "prefix_shared")
    torch.testing.assert_close(again, loss)
    assert relative_difference(found, expected) <= ALLOWED


@pytest.mark.parametrize("family", ["gemma", "mixtral", "gpt2"])
def test_other_feed_forwards_are_left_alone(family):
    model = build(family)
    with light_feed_forwards(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_module_with_another_activation_or_a_forward_of_its_own_is_left_alone():
    model = build("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    first.act_fn, second.forward = nn.GELU(), (own := lambda x: x)
    with light_feed_forwards(model):
        assert "forward" not in vars(first)
        assert second.forward is own
    assert second.forward is own


def test_one_that_lies_is_found_out(monkeypatch):
    honest = mlp._feed_forward
    monkeypatch.setattr(mlp, "_feed_forward", lambda module, x: 1.1 * honest(module, x))
    policy = CausalPolicy(build("llama"), DistEngine(torch.float32), ForwardOptions("auto"))
    policy.try_path(UNITS)
    assert policy.path.layout == "padded"
    assert policy.path.why[0].startswith("at first use it gave other numbers than plain transformers, by ")
    with pytest.raises(RecipeError, match="other numbers than plain transformers"):
        CausalPolicy(build("llama"), DistEngine(torch.float32), ForwardOptions("packed")).try_path(UNITS)
