"""A fault in somebody's code loses no step; starting over removes a run's files only; other software is noticed."""

import hashlib
import json

import pytest

from alignkit.algorithms.dpo import DPO
from alignkit.core.errors import RunFailed
from alignkit.recipe import load_recipe
from alignkit.run import resume, train
from alignkit.testing import Bench, comparable_metrics, digest


def test_a_fault_in_a_loss_leaves_the_steps_before_it(tmp_path, monkeypatch):
    bench = Bench("dpo", folder=tmp_path)
    settings = {"batch_size": 3, "num_epochs": 2, "save_steps": 0}
    whole = train(bench.recipe("whole", **settings), quiet=True, report=False)
    sound, calls = DPO.loss, []

    def breaks(self, out, batch):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("mine")
        return sound(self, out, batch)

    monkeypatch.setattr(DPO, "loss", breaks)
    broken = bench.recipe("broken", **settings)
    with pytest.raises(ZeroDivisionError, match="mine"):
        train(broken, quiet=True, report=False)
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.setattr(DPO, "loss", sound)
    resume(broken.output_dir, quiet=True, report=False)
    assert digest(tmp_path / "broken") == digest(whole.folder)
    assert comparable_metrics(tmp_path / "broken") == comparable_metrics(whole.folder)


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    bench = Bench("sft", folder=tmp_path)
    recipe = bench.recipe("run", max_steps=1)
    train(recipe, quiet=True)
    mine = tmp_path / "run" / "notes.txt"
    mine.write_text("mine", encoding="utf-8")
    left = {path.name for path in mine.parent.iterdir()}
    stale = tmp_path / "run" / "checkpoint-7"
    stale.mkdir()
    train(recipe, overwrite=True, quiet=True)
    assert mine.read_text(encoding="utf-8") == "mine"
    assert {path.name for path in mine.parent.iterdir()} == left


def test_resume_with_other_software_says_so_and_with_other_state_refuses(tmp_path, capsys):
    bench = Bench("sft", folder=tmp_path)
    run = train(bench.recipe("run", max_steps=1), quiet=True, report=False).folder
    lock = json.loads((run / "run.lock").read_text(encoding="utf-8"))
    lock["packages"]["torch"] = "1.0"
    (run / "run.lock").write_text(json.dumps(lock), encoding="utf-8")
    resume(run, report=False)
    assert "other software than this run began with: torch 1.0 → " in capsys.readouterr().out

    state = run / "checkpoint-1" / "track.json"
    state.write_text(state.read_text(encoding="utf-8").replace('"window"', '"widow"'), encoding="utf-8")
    manifest = json.loads((run / "checkpoint-1" / "manifest.json").read_text(encoding="utf-8"))
    content = state.read_bytes()
    manifest["track.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (run / "checkpoint-1" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(RunFailed, match="its part 'track' lacks 'window': another version of alignkit"):
        resume(run, quiet=True, report=False)


def test_a_run_that_has_nothing_to_learn_from_says_so(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": False}]
    bench = Bench("sft", folder=tmp_path, rows=rows)
    with pytest.raises(RunFailed, match="no row gave anything to train on"):
        train(bench.recipe("run"), quiet=True, report=False)


def test_rows_of_one_id_are_sampled_and_compared_apart(tmp_path):
    bench = Bench("sft", folder=tmp_path)
    held_out = tmp_path / "held_out.jsonl"
    rows = [{"id": "same", "prompt": prompt, "completion": "b"} for prompt in ("ab", "cd", "ef")]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = bench.recipe("run", max_steps=1)
    blocks = {"data": [{"path": str(held_out)}], "num_samples": 3, "rewards": [{"name": "length"}]}
    run = train(load_recipe({**recipe.model_dump(by_alias=True), "eval": blocks}), quiet=True, report=False).folder
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["id"]) for line in samples] == [
        (step, name) for step in (0, 1) for name in ("same", "same#2", "same#3")
    ]
