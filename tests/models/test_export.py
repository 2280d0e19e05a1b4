"""What a full run leaves behind: a folder plain transformers loads, in the dtype of the recipe."""

import json

import pytest
import torch
from safetensors.torch import load_file

from alignkit.data.collate import collate
from alignkit.run import sample, train
from alignkit.testing import read_metrics
from tests.models.workshop import assembled, plain_logits


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def finished(request, workshop):
    """dtype and folder of a full run."""
    recipe = workshop.recipe(f"full-{request.param}", model={"dtype": request.param})
    return getattr(torch, request.param), train(recipe, quiet=True, report=False).folder


def test_plain_transformers_loads_what_was_trained(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype, folder = finished
    exported = AutoModelForCausalLM.from_pretrained(folder)
    trained = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-3", dtype=torch.float32)
    assert exported.dtype == dtype
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab cd")["input_ids"]) == "ab cd"
    atol = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(plain_logits(exported.float()), plain_logits(trained), rtol=0, atol=atol)


def test_export_has_the_recipe_dtype_and_checkpoints_float32(finished):
    dtype, folder = finished
    exported, kept = (load_file(path / "model.safetensors") for path in (folder, folder / "checkpoint-3"))
    assert exported.keys() == kept.keys()
    assert "lm_head.weight" not in exported  # tied to the embeddings: stored once
    assert {x.dtype for x in exported.values()} == {dtype}
    assert {x.dtype for x in kept.values()} == {torch.float32}
    for name, weight in kept.items():
        assert torch.equal(exported[name], weight.to(dtype)), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_export_leaves_the_policy_as_it_was(workshop, tmp_path):
    run = assembled(workshop.recipe("left", model={"dtype": "bfloat16"}))
    run.close()
    policy = run.trainer.policy
    before = {name: p.clone() for name, p in policy.bare.named_parameters()}
    policy.save(tmp_path, torch.bfloat16)
    for name, parameter in policy.bare.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])
    assert str(policy.bare.config.dtype).removeprefix("torch.") == "float32"  # transformers notes it as text
    assert policy.bare.lm_head.weight is policy.bare.model.embed_tokens.weight


def test_finished_model_can_be_sampled_from(finished):
    drawn = sample(finished[1], ["ab"], num=2, max_tokens=4)
    assert len(drawn) == 2
    assert all(1 <= len(one["tokens"]) <= 4 for one in drawn)


def test_bfloat16_follows_float32(workshop):
    """Losses of five steps within 2e-2; weights stay float32, so that small steps are not rounded away."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        recipe = workshop.recipe(f"five-{dtype}", model={"dtype": dtype}, train={"max_steps": 5, "learning_rate": 1e-3})
        losses[dtype] = [record["loss"] for record in read_metrics(train(recipe, quiet=True, report=False).folder)]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=2e-2)
    assert losses["bfloat16"] != losses["float32"]  # the dtype did something


def test_small_steps_survive_in_bfloat16(workshop):
    """At 1e-6 a bfloat16 weight would not move at all."""
    recipe = workshop.recipe("small", model={"dtype": "bfloat16"}, train={"learning_rate": 1e-6, "max_steps": 1})
    folder = train(recipe, quiet=True, report=False).folder
    start, end = load_file(workshop.model / "model.safetensors"), load_file(folder / "checkpoint-1/model.safetensors")
    moved = [(end[name] != weight).float().mean() for name, weight in start.items()]
    assert min(moved) > 0.2


def test_frozen_weights_of_an_adapter_run_are_in_the_recipe_dtype(workshop):
    run = assembled(workshop.recipe("thin", model={"dtype": "bfloat16", "lora": {"r": 2}}))
    run.close()
    dtypes = {p.requires_grad: p.dtype for p in run.trainer.policy.bare.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    batch = collate(run.trainer.algorithm.build(run.groups))
    out = run.trainer.policy.forward(batch, frozenset({"logps"}))
    assert out.logps.dtype == torch.float32
