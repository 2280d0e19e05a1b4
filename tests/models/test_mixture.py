"""A run with several output layers, afterwards: sampled from with any mixture, and written as a plain model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from alignkit.cli import app
from alignkit.core import RecipeError
from alignkit.run import export, sample, train
from alignkit.testing import Bench
from tests.models.workshop import plain_logits

LORA = {"r": 4, "alpha": 8}


def finish(bench, run, **blocks):
    recipe = bench.recipe(run, max_steps=8, num_epochs=8, learning_rate=1e-2, **blocks)
    return train(recipe, quiet=True, report=False).folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench("mah_dpo", folder=tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", params=[None, LORA], ids=["full", "lora"])
def run(request, bench):
    return finish(bench, f"run-{bool(request.param)}", model={"lora": request.param})


@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory):
    """A finished run with adapters and one output layer."""
    toys = Bench("dpo", folder=tmp_path_factory.mktemp("pairs"))
    return finish(toys, "run", model={"lora": LORA})


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def greedy(run, **keys):
    drawn = sample(run, ["ab", "cd"], temperature=0.0, max_tokens=8, **keys)
    return [one["tokens"] for one in drawn]


def greedy_of(folder):
    from transformers import AutoTokenizer

    model, tokenizer, found = plain(folder), AutoTokenizer.from_pretrained(folder), []
    for prompt in ("ab", "cd"):
        tokens = tokenizer(prompt)["input_ids"]
        begin = len(tokens)
        while len(tokens) < begin + 8 and (len(tokens) == begin or tokens[-1] != 2):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[begin:])
    return found


def test_plain_transformers_loads_every_mixture(run, tmp_path):
    weights = {"loud": {"loud": 1}, "late": [0, 2], "mixed": {"loud": 0.25, "late": 0.75}, "even": None}
    folders = {name: export(run, tmp_path / name, head_weights=given) for name, given in weights.items()}
    heads = load_file(run / "heads.safetensors")
    first, second = heads["weights.0"], heads["weights.1"]
    expected = {"loud": first, "late": second, "mixed": first / 4 + second * 3 / 4, "even": (first + second) / 2}
    assert not torch.equal(first, second)
    bodies = []
    for name, folder in folders.items():
        written = load_file(folder / "model.safetensors")
        torch.testing.assert_close(written["lm_head.weight"], expected[name], rtol=0, atol=1e-6)
        assert not any("alignkit" in key or "lora" in key for key in written)
        assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]
        bodies.append({key: weight for key, weight in written.items() if key != "lm_head.weight"})
        assert greedy_of(folder) == greedy(run, head_weights=weights[name])
    assert all(torch.equal(body[key], weight) for body in bodies for key, weight in bodies[0].items())
    logits = {name: plain_logits(plain(folder)) for name, folder in folders.items()}
    torch.testing.assert_close(logits["mixed"], logits["loud"] / 4 + logits["late"] * 3 / 4, rtol=0, atol=1e-4)


def test_the_dtype_is_the_one_asked_for(run, tmp_path):
    folder = export(run, tmp_path / "small", dtype="bfloat16")
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(RecipeError, match="dtype is 'float8', expected one of float32, bfloat16"):
        export(run, tmp_path / "other", dtype="float8")


def test_what_is_there_is_never_overwritten(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        export(run, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    with pytest.raises(RecipeError, match="no head 'soft' to weigh"):
        export(run, tmp_path / "none", head_weights={"soft": 1.0})
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert (export(run, tmp_path / "empty") / "config.json").is_file()


def test_adapters_of_any_method_are_merged(pairs_run, tmp_path):
    from peft import AutoPeftModelForCausalLM

    merged = plain_logits(plain(export(pairs_run, tmp_path / "merged")))
    torch.testing.assert_close(
        merged, plain_logits(AutoPeftModelForCausalLM.from_pretrained(pairs_run)), rtol=0, atol=1e-4
    )
    with pytest.raises(RecipeError, match="this model has but its own"):
        sample(pairs_run, ["ab"], head_weights=[1.0])
    with pytest.raises(RecipeError, match="so there are no heads to weigh"):
        export(pairs_run, tmp_path / "out", head_weights=[1.0])


def test_both_commands_take_weights(run, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    told = invoke("export", run, tmp_path / "out", "--head-weights", "late=1", "--dtype", "float32")
    assert told.exit_code == 0, told.output
    assert told.output.strip() == str(tmp_path / "out")
    heads = load_file(run / "heads.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], heads["weights.1"])
    asked = ("sample", run, "--prompt", "ab", "--temperature", 0, "--max-tokens", 8, "--json", "--head-weights")
    by_name, by_place = (json.loads(invoke(*asked, given).output) for given in ("late=1,loud=0", "0,1"))
    assert by_name == by_place
    assert by_name[0]["tokens"] == greedy(run, head_weights={"late": 1})[0]
    for given in ("late=much", "late=1,0", "late=1,late=2", ""):
        assert "expected a number for each head" in str(invoke(*asked, given).exception)
    assert "none may be negative" in str(invoke(*asked, "late=1,loud=-1").exception)
