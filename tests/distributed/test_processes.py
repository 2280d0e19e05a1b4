"""Two processes against one, on CPU over gloo. Two launches do everything; the tests look at what they left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignkit.algorithms.dpo import DPO
from alignkit.loop.checkpoint import find_fault
from alignkit.recipe import dump_recipe, load_recipe
from alignkit.run import train
from alignkit.testing import (
    build_tiny_model,
    comparable_metrics,
    digest,
    read_metrics,
    run_processes,
    toy_rows,
    weight_difference,
)

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

WORKER = str(Path(__file__).with_name("worker.py"))
NUM_PAIRS = 7  # in batches of 3: the last one of an epoch has a single pair, so one of two ranks has none
LORA = {"r": 4, "alpha": 8}


def write_config(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": kind, "use_cpu": True, "num_processes": 2, "num_machines": 1}))
    return path


def accelerate(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ})


class Launched:
    """The folder with all recipes and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = build_tiny_model(folder / "model")
        rows = toy_rows(DPO, NUM_PAIRS + 5)
        for name, part in (("train", rows[:NUM_PAIRS]), ("held_out", rows[NUM_PAIRS:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def recipe(self, run: str, algorithm: str = "dpo", lora=None, eval=None, start=None, **training):
        defaults = {
            "num_epochs": 10,
            "max_steps": 10,
            "batch_size": 3,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "lr_scheduler": "linear",
            "max_length": 64,
            "save_steps": 4,
        }
        return load_recipe(
            {
                "output_dir": str(self.folder / run),
                "model": {"name_or_path": str(start or self.model), "dtype": "float32", "lora": lora},
                "data": [{"path": str(self.folder / "train.jsonl")}],
                "algorithm": {"name": algorithm},
                "train": {**defaults, **training},
                "eval": eval or {},
            }
        )

    def recipes(self):
        held_out = {
            "data": [{"path": str(self.folder / "held_out.jsonl")}],
            "every_steps": 2,
            "num_samples": 1,  # one of two ranks has none to write and none to score
            "rewards": [{"name": "length"}],
            "sampling": {"max_completion_length": 6},
        }
        best = {
            "data": held_out["data"],
            "every_steps": 1,
            "best_metric": "eval_rewards/accuracies",
            "patience": 2,
        }
        fast = {"learning_rate": 3e-2, "save_total_limit": 1}
        return {
            "best": self.recipe("best", eval=best, **fast),
            "best-killed": self.recipe("best-killed", eval=best, **fast),
            "full": self.recipe("full"),
            "killed": self.recipe("killed"),
            "lora": self.recipe("lora", lora=LORA, max_steps=5),
            "lora-on": self.recipe("lora-on", lora=LORA, start=self.folder / "lora", max_steps=4),
            "lora-killed": self.recipe("lora-killed", lora=LORA, max_steps=5, save_steps=1),
            "eval": self.recipe("eval", max_steps=4, eval=held_out),
            "sft": self.recipe("sft", "sft", max_steps=5),
            "stopped": self.recipe("stopped", max_steps=5, save_steps=0),
        }

    def seen(self, name: str) -> list[dict]:
        """What each rank wrote."""
        return [json.loads((self.folder / f"{name}-rank-{rank}.json").read_text()) for rank in (0, 1)]

    def alone(self, name: str) -> Path:
        """The same recipe in this process, every unit in one micro-batch; run once."""
        folder = self.folder / f"{name}-alone"
        if folder.exists():
            return folder
        recipe = self.recipes()[name]
        training = recipe.train.model_copy(update={"micro_batch_size": None})
        update = {"output_dir": str(folder), "train": training}
        return train(recipe.model_copy(update=update), quiet=True, report=False).folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    made = Launched(tmp_path_factory.mktemp("processes"))
    for name, recipe in made.recipes().items():
        (made.folder / f"{name}.yaml").write_text(dump_recipe(recipe))
    killed = accelerate(write_config(made.folder, "MULTI_GPU"), WORKER, "kill", str(made.folder))
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr, killed.stderr[-3000:]
    run_processes([WORKER, "train", str(made.folder)], 2)
    return made


def assert_same_metrics(found: Path, expected: Path) -> None:
    """Both runs logged the same records, to 1e-5."""
    assert len(read_metrics(found)) == len(read_metrics(expected))
    for got, want in zip(comparable_metrics(found), comparable_metrics(expected), strict=True):
        assert got.keys() == want.keys()
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_every_rank_ran_in_a_world_of_two(launched):
    for name in ("full", "lora", "lora-on", "eval", "resumed", "sft"):
        assert [seen["world"] for seen in launched.seen(name)] == [2, 2]


def test_every_rank_returns_the_same_result(launched):
    first, second = launched.seen("full")
    assert first == second
    assert first["steps"] == 10
    assert "loss" in first["metrics"]


@pytest.mark.parametrize("name", ["full", "lora", "lora-on", "sft", "eval"])
def test_two_processes_train_as_one(launched, name):
    alone = launched.alone(name)
    assert weight_difference(launched.folder / name, alone) <= 1e-6
    assert_same_metrics(launched.folder / name, alone)


def test_training_moved_the_weights(launched):
    """Else the comparison above would compare two start models."""
    assert weight_difference(launched.folder / "full", launched.model) > 1e-3


def test_samples_do_not_depend_on_the_ranks(launched):
    two, one = (folder / "samples.jsonl" for folder in (launched.folder / "eval", launched.alone("eval")))
    lines = [json.loads(line) for line in two.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines == [json.loads(line) for line in one.read_text().splitlines()]


def test_every_rank_agrees_on_the_best_and_on_the_end(launched):
    first, second = launched.seen("best")
    assert first == second
    folder, alone = launched.folder / "best", launched.alone("best")
    found = json.loads((folder / "best.json").read_text())
    assert found == json.loads((alone / "best.json").read_text())
    assert (found["value"], found["step"], found["last_step"], found["stopped_early"]) == (1.0, 3, 5, True)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    # Rounding moves weights in proportion to the learning rate, here 30 times that of the other runs.
    assert weight_difference(folder / "best", alone / "best") <= 3e-5


def test_killed_processes_remember_the_best(launched):
    whole, killed = launched.folder / "best", launched.folder / "best-killed"
    assert len(launched.seen("best-killed")) == 2
    assert (killed / "best.json").read_bytes() == (whole / "best.json").read_bytes()
    assert (digest(killed / "best"), digest(killed)) == (digest(whole / "best"), digest(whole))
    assert comparable_metrics(killed) == comparable_metrics(whole)


def test_checkpoint_holds_a_part_of_every_rank(launched):
    checkpoint = launched.folder / "full" / "checkpoint-8"
    assert find_fault(checkpoint) is None
    assert [(checkpoint / f"rank-{rank}" / "round.json").is_file() for rank in (0, 1, 2)] == [True, True, False]


def test_killed_processes_resume_to_the_same_bits(launched):
    whole, killed = launched.folder / "full", launched.folder / "killed"
    assert [seen["steps"] for seen in launched.seen("resumed")] == [10, 10]
    assert digest(killed) == digest(whole)
    assert comparable_metrics(killed) == comparable_metrics(whole)


def test_killed_adapter_run_resumes_to_the_same_bits(launched):
    whole, killed = launched.folder / "lora", launched.folder / "lora-killed"
    assert len(launched.seen("lora-killed")) == 2
    assert digest(killed) == digest(whole)
    assert comparable_metrics(killed) == comparable_metrics(whole)


def test_signal_to_one_rank_stops_all_at_the_same_step(launched):
    first, second = launched.seen("stopped")
    assert "stopped by another rank after step 2" in first["message"]
    assert "stopped by SIGTERM after step 2" in second["message"]
    folder = launched.folder / "stopped"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert find_fault(folder / "checkpoint-2") is None


def test_single_process_cannot_pose_as_two(launched):
    """`distributed_type: MULTI_CPU` starts one process for `num_processes: 2`; it must not train by itself."""
    config = write_config(launched.folder, "MULTI_CPU")
    recipe = launched.folder / "single.yaml"
    recipe.write_text(dump_recipe(launched.recipe("single")))
    done = accelerate(config, "-m", "alignkit", "train", str(recipe))
    assert done.returncode != 0
    assert "started only one" in done.stderr + done.stdout
    assert not (launched.folder / "single" / "metrics.jsonl").exists()
