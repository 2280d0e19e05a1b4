"""Model families beside Llama, from tiny configs: DPO trains them, the step-0 truths hold, their config is kept."""

import json
from math import log

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from alignkit.core.errors import RecipeError
from alignkit.run import train
from alignkit.testing import build_tiny_tokenizer, gradient_step, read_metrics, relative_difference, save_quietly

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
FAMILIES = {
    "GPT2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "initializer_range": 0.1,
    },
    "Gemma2": {
        **SIZES,
        "head_dim": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "attention_dropout": 0.1,
    },
    "Gemma3Text": {**SIZES, "head_dim": 8, "sliding_window": 8},
    "Qwen2": {**SIZES, "attention_dropout": 0.1},
    "Mistral": {**SIZES, "sliding_window": 6},
    "Mixtral": {**SIZES, **EXPERTS, "num_local_experts": 4, "router_jitter_noise": 0.1},
    "Qwen2Moe": {
        **SIZES,
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
}
MAY_CHANGE = {"transformers_version", "_name_or_path"}


def build(family, folder):
    tokenizer = build_tiny_tokenizer()
    config_type = getattr(transformers, f"{family}Config")
    config = config_type(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **FAMILIES[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return save_quietly(folder, model, tokenizer)


@pytest.fixture(scope="module")
def start(request, tmp_path_factory):
    return request.param, build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("start", list(FAMILIES), indirect=True)
def test_family_trains_and_keeps_its_config(workshop, start):
    family, folder = start
    recipe = workshop.recipe(family, model={"name_or_path": str(folder)})
    done = train(recipe, quiet=True, report=False)
    losses = [record["loss"] for record in read_metrics(done.folder)]
    assert losses[0] == pytest.approx(log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 1e-3
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, done.folder))
    assert {k: v for k, v in after.items() if k not in MAY_CHANGE} == {
        k: v for k, v in before.items() if k not in MAY_CHANGE
    }
    exported = AutoModelForCausalLM.from_pretrained(done.folder)
    kept = AutoModelForCausalLM.from_pretrained(done.folder / "checkpoint-3")
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), kept.parameters(), strict=True))


@pytest.mark.parametrize("start", ["GPT2", "Gemma2", "Mixtral"], indirect=True)
def test_gradient_does_not_depend_on_padding(workshop, start):
    """One unit a forward against all in one, where short rows are padded to the longest."""
    family, folder = start
    found = [
        gradient_step(
            workshop.recipe(f"{family}-{size}", model={"name_or_path": str(folder)}, train={"micro_batch_size": size})
        )[0]
        for size in (1, None)
    ]
    assert relative_difference(*found) <= 2e-6


@pytest.mark.parametrize("start", ["GPT2", "Mixtral"], indirect=True)
def test_family_trains_with_adapters(workshop, start):
    family, folder = start
    recipe = workshop.recipe(f"{family}-lora", model={"name_or_path": str(folder), "lora": {"r": 2}})
    done = train(recipe, quiet=True, report=False)
    losses = [record["loss"] for record in read_metrics(done.folder)]
    assert losses[0] == pytest.approx(log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("start", ["GPT2"], indirect=True)
def test_rows_longer_than_the_context_are_refused(workshop, start):
    recipe = workshop.recipe("long", model={"name_or_path": str(start[1])}, train={"max_length": 65})
    with pytest.raises(RecipeError, match=r"65 tokens, but the model was built for 64"):
        train(recipe, quiet=True, report=False)
