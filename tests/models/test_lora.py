"""Adapters: the reference is the adapter off, or the adapter the run began with; what is exported is plain peft."""

import json
from math import log

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from alignkit.core.errors import RecipeError
from alignkit.data.collate import collate
from alignkit.models.load import REFERENCE_ADAPTER, load_policy
from alignkit.run import sample, train
from alignkit.testing import read_metrics
from tests.models.workshop import LORA, assembled, plain_logits

LOGPS = frozenset({"logps"})


@pytest.fixture(scope="module")
def first(workshop):
    """The folder of a finished LoRA run."""
    return train(workshop.recipe("first", model={"lora": LORA}), quiet=True, report=False).folder


def load_with_peft(workshop, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workshop.model), folder)


def first_loss(folder):
    return read_metrics(folder)[0]["loss"]


def first_batch(run):
    return collate(run.trainer.algorithm.build(run.groups))


def test_reference_is_the_adapter_off(workshop, first):
    assert first_loss(first) == pytest.approx(log(2), abs=1e-6)
    assert read_metrics(first)[-1]["loss"] < 0.6  # it did learn


def test_only_the_adapter_trains_and_is_saved(workshop, first):
    run = assembled(workshop.recipe("parts", model={"lora": LORA}))
    names = {name for name, p in run.trainer.policy.bare.named_parameters() if p.requires_grad}
    run.close()
    assert names
    assert all("lora_" in name for name in names)
    saved = load_file(first / "adapter_model.safetensors")
    assert len(saved) == len(names)
    assert all("lora_" in name for name in saved)
    assert not (first / "model.safetensors").exists()


def test_exported_folder_loads_with_plain_peft(workshop, first):
    """Trained weights in memory and what peft loads give the same logits, and other ones than the start model."""
    recipe = workshop.recipe("again", model={"lora": LORA})
    run = assembled(recipe)
    run.precompute(Console(quiet=True))
    for file in run.files:
        file.fresh()
    run.trainer.run()
    run.close()
    ours = plain_logits(run.trainer.policy.bare)
    loaded = load_with_peft(workshop, first)
    torch.testing.assert_close(plain_logits(loaded), ours, rtol=0, atol=1e-6)
    with loaded.disable_adapter():
        assert (plain_logits(loaded) - ours).abs().max() > 1e-3


def test_adapter_goes_on_training_against_its_frozen_self(workshop, first):
    start = plain_logits(load_with_peft(workshop, first))
    recipe = workshop.recipe("second", model={"name_or_path": str(first), "lora": LORA})
    run = assembled(recipe)
    policy, batch = run.trainer.policy, first_batch(run)
    before = run.trainer.roster.fill(batch, {"reference.logps"})["reference.logps"]
    frozen = {n: p.clone() for n, p in policy.bare.named_parameters() if f".{REFERENCE_ADAPTER}." in n}
    assert frozen
    trained = {n for n, p in policy.bare.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in policy.bare.named_parameters() if ".default." in n}
    run.precompute(Console(quiet=True))
    for file in run.files:
        file.fresh()
    run.trainer.run()
    run.close()

    folder = workshop.folder / "second"
    assert first_loss(folder) == pytest.approx(log(2), abs=1e-6)
    assert read_metrics(folder)[-1]["loss"] < first_loss(folder) - 0.05
    for name, parameter in policy.bare.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
            assert not parameter.requires_grad
    with policy.evaluating(), policy.as_reference():
        after = policy.forward(batch, LOGPS).logps
        torch.testing.assert_close(plain_logits(policy.bare), start, rtol=0, atol=1e-6)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert {n for n, p in policy.bare.named_parameters() if p.requires_grad} == trained

    exported = folder / "checkpoint-3"
    assert not (exported / REFERENCE_ADAPTER).exists()
    policy.bare.set_adapter("default")
    torch.testing.assert_close(
        plain_logits(load_with_peft(workshop, exported)), plain_logits(policy.bare), rtol=0, atol=1e-6
    )


def test_finished_adapter_can_be_sampled_from(first):
    drawn = sample(first, ["ab"], num=2, max_tokens=4)
    assert [1 <= len(one["tokens"]) <= 4 for one in drawn] == [True, True]


def test_adapter_of_another_shape_is_refused(workshop, first):
    recipe = workshop.recipe("shape", model={"name_or_path": str(first), "lora": {"r": 8, "alpha": 8}})
    with pytest.raises(RecipeError, match=r"has r=4, alpha=8.*r=8, alpha=8.*lora: null"):
        train(recipe, quiet=True, report=False)


def test_adapter_without_lora_is_merged_and_trained_in_full(workshop, first):
    expected = plain_logits(load_with_peft(workshop, first))
    recipe = workshop.recipe("merged", model={"name_or_path": str(first)})
    run = assembled(recipe)
    run.close()
    assert not run.trainer.policy.is_peft
    torch.testing.assert_close(plain_logits(run.trainer.policy.bare), expected, rtol=0, atol=1e-5)
    result = train(recipe, quiet=True, report=False)
    assert first_loss(result.folder) == pytest.approx(log(2), abs=1e-6)
    assert json.loads((result.folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_start_of_an_adapter_follows_the_seed(workshop):
    def start(seed):
        model = load_policy(workshop.recipe("seeded", model={"lora": LORA}).model, seed)
        return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert not any(torch.equal(other[name], weight) for name, weight in first.items())


def test_a_continued_adapter_has_the_dropout_of_the_recipe_and_an_absolute_base(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(workshop.folder)
    noisy = workshop.recipe("noisy", model={"name_or_path": "model", "lora": {**LORA, "dropout": 0.5}})
    folder = train(noisy, quiet=True, report=False).folder
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(workshop.model)
    monkeypatch.chdir(tmp_path)
    model = load_policy(workshop.recipe("calm", model={"name_or_path": str(folder), "lora": LORA}).model)
    dropouts = [m for name, m in model.named_modules() if name.endswith("lora_dropout.default")]
    assert dropouts
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in dropouts)
