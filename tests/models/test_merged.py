"""Writing a model that goes on training: what is loaded elsewhere, and that nothing moves here."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alignkit.core.errors import RecipeError
from alignkit.models.load import fingerprint
from alignkit.models.merged import save_merged

TOKENS = torch.tensor([[1, 5, 9, 3, 7]])


def build(tied=False, dtype=torch.float32, **lora):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(dtype)
    if not lora:
        return model
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    ("tied", "targets"),
    [(False, None), (True, None), (False, "all-linear"), (True, "all-linear"), (False, ["q_proj", "embed_tokens"])],
)
def test_what_is_loaded_elsewhere_says_the_same_and_nothing_moves(tmp_path, tied, targets):
    model = build(tied, **({} if targets is None else {"target_modules": targets, "use_rslora": True})).eval()
    before, expected = fingerprint(model), logits(model)
    save_merged(model, tmp_path, torch.float32)
    assert fingerprint(model) == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-6)


def test_the_reference_adapter_is_left_out(tmp_path):
    model = build(target_modules="all-linear").eval()
    expected = logits(model)
    model.add_adapter("reference", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    save_merged(model, tmp_path, torch.float32)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=0, atol=2e-6)


def test_weights_are_written_in_the_dtype_and_added_up_before(tmp_path):
    model = build(dtype=torch.bfloat16, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.float()  # adapters train in float32 beside bfloat16 weights
    layer.base_layer.bfloat16()
    save_merged(model, tmp_path, torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").model.layers[0].self_attn.q_proj.weight
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_is_more_than_two_matrices_is_refused(tmp_path, more):
    model = build(target_modules=["q_proj"], **more)
    with pytest.raises(RecipeError, match=r"more than LoRA's two matrices.*rollout.engine: native"):
        save_merged(model, tmp_path, torch.float32)
