"""Your own code: a loss by path; an algorithm by decorator, entry point or path. All inherit what the loop gives."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit import Recipe, load_recipe, resume, train
from alignkit.algorithms.dpo import DPO
from alignkit.core import RecipeError, register
from alignkit.loop.trainer import Trainer
from alignkit.testing import (
    Killed,
    build_tiny_model,
    comparable_metrics,
    digest,
    gradient_step,
    read_metrics,
    relative_difference,
    toy_rows,
)

BETA, GAMMA = 0.5, 2.0
SOURCE = f"""\
from alignkit import ops
from alignkit.core import Algorithm, AlgorithmConfig, Needs, register
from alignkit.core.pairs import best_worst
from alignkit.core.types import Metric, Term


class FocalConfig(AlgorithmConfig):
    beta: float = {BETA}


def focal(out, batch, config):
    "−(1 − σ(m))^{GAMMA:g} · log σ(m)"
    ratios = ops.sequence_sum(out.logps - batch["reference.logps"], batch["mask"])
    chosen, rejected = batch.by_unit(ratios).unbind(1)
    margin = config.beta * (chosen - rejected)
    value = (-margin).sigmoid() ** {GAMMA} * ops.logistic_pair(margin)
    return {{"policy": Term(value, over="unit")}}, {{"focal/margin": Metric.mean(margin, batch["unit"])}}


class Plain(Algorithm[FocalConfig]):
    "The same as an algorithm."
    needs = Needs(completions=2, columns=frozenset({{"reference.logps"}}), preferences=True)

    def build(self, groups):
        return [best_worst(group) for group in groups]

    def loss(self, out, batch):
        return focal(out, batch, self.config)
"""
DECORATED = SOURCE.replace("class Plain", '@register.algorithm("decorated")\nclass Plain')

WAYS: dict[str, dict[str, Any]] = {
    "loss": {"algorithm": {"name": "dpo", "beta": BETA, "loss": "plain_extension:focal"}},
    "path": {"algorithm": {"name": "plain_extension:Plain"}},
    "decorator": {"algorithm": {"name": "decorated"}, "imports": ["decorated_extension"]},
    "entry_point": {"algorithm": {"name": "pointed"}},
}
"""How a recipe names each."""
MODULES = ("plain_extension", "decorated_extension", "shadow_extension")
SHADOWED = {
    "output_dir": "x",
    "model": {"name_or_path": "owner/model"},
    "data": [{"path": "owner/pairs"}],
    "algorithm": {"name": "dpo"},
    "imports": ["shadow_extension"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("extension") / "model")


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's modules and the plug-in's metadata, importable here; registry and modules are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plain_extension.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "decorated_extension.py").write_text(DECORATED, encoding="utf-8")
    installed = tmp_path / "plug_in-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-in\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[alignkit.algorithms]\npointed = plain_extension:Plain\n")
    importlib.invalidate_caches()
    register.algorithm.names()
    monkeypatch.setattr(register.algorithm, "_entries", {**register.algorithm._entries})
    yield
    forget_modules()


def forget_modules() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


def recipe_of(model: Path, run: str, way: dict[str, Any], *, lora: bool = False, **settings: Any) -> Recipe:
    """A short run of seven pairs, three a step, so that the last step of a pass is short."""
    rows = Path("rows.jsonl")
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(DPO, 7)), encoding="utf-8")
    training = {"num_epochs": 2, "batch_size": 3, "learning_rate": 1e-3, "max_length": 64, "save_steps": 2}
    return load_recipe(
        {
            "output_dir": run,
            "model": {"name_or_path": str(model), "dtype": "float32", "lora": {"r": 4} if lora else None},
            "data": [{"path": str(rows)}],
            "train": {**training, **settings},
            **way,
        }
    )


def test_a_loss_by_path_has_its_own_gradient(model: Path) -> None:
    plain, _ = gradient_step(recipe_of(model, "dpo", {"algorithm": {"name": "dpo", "beta": BETA}}))
    found, logged = gradient_step(recipe_of(model, "focal", WAYS["loss"]))
    # At the reference m = 0 for every pair, σ = ½. d/dm of DPO's loss is −½ there; of −(1 − σ)^γ·log σ it is
    # (1 − σ)^γ·(γ·σ·log σ − (1 − σ)) = −½^γ·(γ·ln 2 + 1)/2. So one gradient is a multiple of the other.
    ratio = 0.5**GAMMA * (GAMMA * math.log(2) + 1)
    assert ratio == pytest.approx(0.5966, abs=1e-4)
    assert relative_difference(found, {name: ratio * x for name, x in plain.items()}) < 1e-5
    assert relative_difference(found, plain) > 0.4
    assert logged["loss"] == pytest.approx(0.5**GAMMA * math.log(2), abs=1e-6)
    assert logged["focal/margin"] == pytest.approx(0.0, abs=1e-5)
    assert "rewards/margins" not in logged  # its metrics are those the function returns


@pytest.mark.parametrize("way", WAYS)
def test_it_inherits_accumulation(way: str, model: Path) -> None:
    whole, logged = gradient_step(recipe_of(model, "whole", WAYS[way]))
    pieces, logged_in_pieces = gradient_step(recipe_of(model, "pieces", WAYS[way], micro_batch_size=1))
    assert relative_difference(pieces, whole) < 1e-6
    assert logged_in_pieces["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert logged["loss"] == pytest.approx(0.5**GAMMA * math.log(2), abs=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_it_inherits_adapters(way: str, model: Path) -> None:
    result = train(recipe_of(model, "lora", WAYS[way], lora=True, num_epochs=4), quiet=True, report=False)
    losses = [record["loss"] for record in read_metrics(result.folder)]
    assert losses[0] == pytest.approx(0.5**GAMMA * math.log(2), abs=1e-6)  # the reference is the adapter turned off
    assert losses[-1] < losses[0]
    assert (result.folder / "adapter_model.safetensors").is_file()
    assert not (result.folder / "model.safetensors").exists()


@pytest.mark.parametrize("way", WAYS)
def test_it_inherits_resume(way: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(recipe_of(model, "unbroken", WAYS[way]), quiet=True, report=False)
    update = Trainer.update

    def killed(trainer: Trainer, part: list[int]) -> None:
        if trainer.progress.step + 1 == 4:
            raise Killed
        update(trainer, part)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", killed)
        with pytest.raises(Killed):
            train(recipe_of(model, "broken", WAYS[way]), quiet=True, report=False)
    forget_modules()  # a new process would know nothing of them: the written recipe must bring them back
    register.algorithm._entries.pop("decorated", None)
    resumed = resume("broken", quiet=True, report=False)
    assert resumed.steps == whole.steps == 6
    assert digest(resumed.folder) == digest(whole.folder)
    assert comparable_metrics(resumed.folder) == comparable_metrics(whole.folder)


def test_a_name_that_is_taken_is_refused(model: Path) -> None:
    shadow = DECORATED.replace('"decorated"', '"dpo"')
    Path("shadow_extension.py").write_text(shadow, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"'dpo' is taken by .*dpo:DPO; shadow_extension:Plain must"):
        recipe_of(model, "x", {"algorithm": {"name": "dpo"}, "imports": ["shadow_extension"]})
    # The same where nobody has asked for the built-in yet: in a process of its own.
    lines = ["from alignkit import load_recipe", f"load_recipe({json.dumps(SHADOWED)})"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert "'dpo' is taken by alignkit.algorithms.dpo:DPO; shadow_extension:Plain must" in done.stderr


def test_an_entry_point_cannot_shadow_a_built_in(tmp_path: Path) -> None:
    points = tmp_path / "plug_in-1.0.dist-info" / "entry_points.txt"
    points.write_text("[alignkit.algorithms]\ndpo = plain_extension:Plain\n")
    with pytest.raises(RecipeError, match=r"both registered \(alignkit\.algorithms\.dpo:DPO\) and an entry point"):
        register.algorithm.get("dpo")


def test_entry_points_are_listed() -> None:
    assert {"dpo", "pointed", "sft"} <= set(register.algorithm.names())
