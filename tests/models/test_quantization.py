"""Adapters on weights in 4 and in 8 bits."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alignkit.core.errors import RecipeError
from alignkit.models.config import ModelConfig
from alignkit.models.load import load_policy
from alignkit.recipe import load_recipe
from alignkit.run import export, train
from alignkit.testing import Bench, build_tiny_tokenizer, read_metrics, save_quietly

pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes, see the extra qlora")

LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Quantization goes by blocks of 64 numbers, and so wide is this model."""
    found = Bench("dpo", folder=tmp_path_factory.mktemp("quantized"))
    tokenizer = build_tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    found.model = save_quietly(found.folder / "wide", model, tokenizer)
    return found


def recipe(bench, run, quantization, **training):
    model = {"lora": LORA, "quantization": quantization, "dtype": "bfloat16"}
    return bench.recipe(run, model=model, **training)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
def test_adapter_learns_on_quantized_weights(bench, kind, bits):
    done = train(recipe(bench, kind, kind, max_steps=12, num_epochs=12, learning_rate=1e-2), quiet=True, report=False)
    losses = [record["loss"] for record in read_metrics(done.folder)]
    assert losses[-1] < losses[0] * 2 / 3
    saved = json.loads((done.folder / "adapter_config.json").read_text())
    assert saved["r"] == 4
    merged = export(done.folder, bench.folder / f"{kind}-merged")
    weights = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    start = LlamaForCausalLM.from_pretrained(bench.model).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert weights[name].shape == start[name].shape
    assert (weights[name].float() - start[name].float()).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.3), ("int8", 0.6)])
def test_frozen_weights_are_small(bench, kind, share):
    def size(quantization):
        config = ModelConfig(name_or_path=str(bench.model), lora=LORA, quantization=quantization)
        layers = load_policy(config).get_base_model().model.layers
        frozen = [p for p in layers.parameters() if not p.requires_grad and p.numel() > 1000]
        return sum(p.numel() * p.element_size() for p in frozen)

    assert size(kind) < share * size(None)


def test_quantized_weights_need_an_adapter():
    with pytest.raises(ValidationError, match="train an adapter on them"):
        ModelConfig(name_or_path="x", quantization="nf4")


@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_quantized_weights_are_not_cut_into_parts(bench, backend):
    settings = recipe(bench, "cut", "nf4").model_dump(mode="json", by_alias=True) | {"dist": {"backend": backend}}
    with pytest.raises(RecipeError, match=f"nf4 and dist.backend: {backend} exclude each other.*zero2"):
        load_recipe(settings)


def test_missing_library_is_told(bench, monkeypatch):
    monkeypatch.setattr("alignkit.models.load.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'alignkit\[qlora\]'"):
        train(recipe(bench, "missing", "nf4", max_steps=1), quiet=True, report=False)
