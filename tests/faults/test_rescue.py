"""A fault in somebody's code loses no step, and starting over removes nothing that is not the run's."""

import pytest

from alignkit.algorithms.dpo import DPO
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
