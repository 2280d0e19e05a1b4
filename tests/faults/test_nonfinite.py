"""Nan and infinity stop a run before the step, and leave what is needed to find out why."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.loop.checkpoint import find_fault, read_state
from tests.faults import plants
from tests.faults.bench import VARIANTS, Runs, checkpoints

pytestmark = pytest.mark.xdist_group("faults-nonfinite")

SPOILT = "layers.1.mlp.up_proj"


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_in_the_weights_stops_before_the_step(runs: Runs, variant: str) -> None:
    name = f"nan-{variant}"
    fault = plants.nan_in_weights if variant == "full" else plants.nan_in_adapter
    code, said = runs.train(name, *VARIANTS[variant], plant=(fault, 4))
    run = runs[name]
    assert code == 1, said
    error = said[said.index("error: ") :]
    assert error.startswith("error: step 4: ")
    assert "loss" in error.partition(" not finite; stopped before the step")[0]
    assert "The weights hold nan or infinity: " in error
    assert SPOILT in error
    assert "Traceback" not in said

    dump = run / "debug" / "step-4"
    assert f"The batch is in {dump}, the last checkpoint is {run / 'checkpoint-2'}" in error
    state = read_state(dump, "batch-rank-0")
    assert state["inputs"]["tokens"].shape[0] == 2 * len(state["units"])
    assert set(state["groups"]) <= {row["id"] for row in runs.rows}
    for group in state["groups"]:
        assert group in error
    assert state["metrics"]["loss"] == "nan"

    # the broken weights were not saved over the sound ones, and nothing of the step was logged
    assert checkpoints(run) == [2]
    assert find_fault(run / "checkpoint-2") is None
    weights = load_file(next((run / "checkpoint-2").glob("*model.safetensors")))
    assert all(bool(torch.isfinite(x).all()) for x in weights.values())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records) == 3
    assert all(math.isfinite(x) for record in records for x in record.values())


def test_run_stopped_by_nan_can_be_resumed_to_the_unbroken_end(runs: Runs, whole) -> None:
    runs.train("nan-once", plant=(plants.nan_in_weights, 5))
    runs.resume_to("nan-once", whole("full"))


def test_nan_in_the_start_model_is_refused_at_the_door(runs: Runs) -> None:
    broken = shutil.copytree(runs.model, runs["broken-model"])
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][1, 2] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, said = runs.train("nan-start", f"model.name_or_path={broken}")
    assert code == 1
    assert f"error: model.name_or_path: the weights in {broken} hold nan or infinity" in said
    assert "model.layers.0.self_attn.q_proj.weight" in said
    assert "Nothing was trained" in said


def test_infinite_loss_stops_and_leaves_a_checkpoint_of_the_sound_weights(runs: Runs) -> None:
    # two micro-batches a step: the third step begins with call 5
    settings = ["algorithm.loss=tests.faults.losses:infinite_later", "eval.data=[]", "eval.num_samples=0"]
    code, said = runs.train("inf", *settings, "train.save_steps=0")
    run = runs["inf"]
    assert code == 1, said
    error = said[said.index("error: ") :]
    assert error.startswith("error: step 3: ")
    assert "loss/likelihood" in error.partition(" not finite")[0]
    assert "The weights hold" not in error
    assert f"the last checkpoint is {run / 'checkpoint-2'}" in error
    assert find_fault(run / "checkpoint-2") is None
    assert (run / "debug" / "step-3" / "batch-rank-0.safetensors").is_file()

    code, said = runs.resume("inf")  # two sound steps again in a new process, then the same end
    assert code == 1
    assert f"continuing from {run / 'checkpoint-2'}" in said
    assert "error: step 5: " in said
