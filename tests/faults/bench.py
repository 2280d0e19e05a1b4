"""A run small enough to break many times, and what two equal runs must have in common."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.testing import Bench, comparable_metrics, digest
from tests.faults.process import Command, Plant, alignkit, start

STEPS = 9
VARIANTS = {
    "full": [],
    # dropout, so that a resumed run must also draw the same noise
    "lora": ["model.lora.r=4", "model.lora.alpha=8", "model.lora.dropout=0.1"],
}
RECIPE = """\
output_dir: unnamed
model: {{name_or_path: {model}, dtype: float32}}
data: [{{path: {data}}}]
algorithm: {{name: dpo}}
train:
  num_epochs: 3
  batch_size: 3
  learning_rate: 5e-3
  lr_scheduler: cosine
  warmup_steps: 2
  max_length: 64
  save_steps: 2
  logging_steps: 3      # shares no factor with save_steps: some checkpoints fall inside a window
  micro_batch_size: 2
eval:
  data: [{{path: {data}, limit: 3}}]
  every_steps: 4
  num_samples: 2
  sampling: {{max_completion_length: 6}}
"""


@dataclass
class Runs:
    """A recipe and a folder for its runs."""

    folder: Path
    recipe: Path
    data: Path
    model: Path
    rows: list[dict[str, Any]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def train(self, name: str, *settings: str, plant: Plant | None = None) -> tuple[int, str]:
        """Exit code and output of a run into the folder `name`."""
        return alignkit(*self._train(name, settings), said=self[f"{name}.log"], plant=plant)

    def begin(self, name: str, *settings: str, plant: Plant | None = None) -> Command:
        """The same without waiting for its end."""
        return start(self._train(name, settings), self[f"{name}.log"], plant)

    def resume(self, name: str, plant: Plant | None = None) -> tuple[int, str]:
        """Exit code and output of `alignkit resume`."""
        return alignkit("resume", self[name], said=self[f"{Path(name).name}.resumed.log"], plant=plant)

    def resume_to(self, name: str, whole: Path) -> str:
        """Resume the run to its end and compare it with an unbroken one; its output."""
        code, said = self.resume(name)
        assert code == 0, said
        assert_equal_runs(self[name], whole)
        return said

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """A file of rows beside the runs."""
        path = self[name]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def _train(self, name: str, settings: tuple[str, ...]) -> list[object]:
        return ["train", self.recipe, f"output_dir={self[name]}", *settings]


def build_runs(folder: Path) -> Runs:
    """A tiny model, seven pairs and their recipe."""
    bench = Bench("dpo", folder=folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=bench.model, data=bench.data), encoding="utf-8")
    return Runs(folder, recipe, bench.data, bench.model, bench.rows)


def assert_equal_runs(found: Path, whole: Path) -> None:
    """The same weights bit for bit, the same records but for timings, the same samples; no half-written checkpoint."""
    assert digest(found) == digest(whole)
    assert comparable_metrics(found) == comparable_metrics(whole)
    assert (found / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert leftovers(found) == []
    assert checkpoints(found) == checkpoints(whole)


def checkpoints(run: Path) -> list[int]:
    """Steps of a run's checkpoints, oldest first."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


def leftovers(run: Path) -> list[str]:
    """Half-written files and folders."""
    return sorted(path.name for path in run.glob(".writing-*"))


Whole = Callable[[str], Path]
"""Variant → the folder of its unbroken run."""
