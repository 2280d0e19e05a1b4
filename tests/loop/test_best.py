"""The best evaluation is found, kept, exported and remembered; a run without gains ends. Curves are made up."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.types import Metric
from alignkit.dist.world import LocalWorld
from alignkit.loop.best import Best
from alignkit.loop.checkpoint import Checkpoints
from alignkit.loop.config import EvalConfig
from alignkit.loop.evaluate import Evaluator
from alignkit.loop.trainer import Trainer
from alignkit.recipe import Recipe, load_recipe
from alignkit.run import resume, train
from alignkit.testing import Bench, Killed, comparable_metrics, digest, killed_at, read_metrics, weight_difference

STEPS = 6


def config(**keys: Any) -> EvalConfig:
    return EvalConfig.model_validate(
        {"data": [{"path": "x"}], "every_steps": 1, "best_metric": "eval_score", "min_delta": 0.0, **keys}
    )


def follow(curve: list[float], **keys: Any) -> tuple[int | None, float | None, int | None]:
    """Step and value of the best, and the step the run would stop after, of one evaluation a step."""
    best = Best(config(**keys))
    for step, value in enumerate(curve):
        best.judge(step, {"eval_score": value})
        if best.exhausted:
            return best.step, best.value, step
    return best.step, best.value, None


@pytest.mark.parametrize(
    ("curve", "keys", "expected"),
    [
        ([0.1, 0.2, 0.3], {"patience": 1}, (2, 0.3, None)),
        ([0.3, 0.2, 0.1], {"best_mode": "min", "patience": 1}, (2, 0.1, None)),
        ([0.3, 0.2, 0.1], {}, (0, 0.3, None)),  # the start model may be the best
        ([0.2, 0.5, 0.5, 0.5, 0.4], {}, (1, 0.5, None)),  # of equals the earliest
        ([0.2, 0.5, 0.5, 0.5, 0.9], {"patience": 2}, (1, 0.5, 3)),  # a tie is no gain
        ([0.2, 0.1, 0.3, 0.1, 0.1, 0.9], {"patience": 2}, (2, 0.3, 4)),  # a gain starts the count anew
        ([nan, 0.1, nan, 0.2, inf], {}, (3, 0.2, None)),
        ([-inf, 0.1], {"best_mode": "min"}, (1, 0.1, None)),
        ([nan, nan, nan, 0.2], {"patience": 2}, (None, None, 2)),  # step 0 is before training and does not count
        ([nan, nan, nan, 0.2], {"patience": 3}, (3, 0.2, None)),
        ([0.0, 0.5, 0.5, 1.0], {"patience": 2, "min_delta": 0.5}, (1, 0.5, 2)),  # 0.5 is not more than 0.5
        ([0.0, 0.25, 0.75, 1.0, 1.5], {"patience": 2, "min_delta": 0.5}, (4, 1.5, None)),  # small gains add up
        ([0.0, 0.25, 0.5, 0.5], {"patience": 2, "min_delta": 1}, (2, 0.5, 2)),  # too little for patience, yet the best
    ],
)
def test_curves_by_hand(curve: list[float], keys: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert follow(curve, **keys) == expected


def test_its_state_says_all() -> None:
    curve = [0.2, nan, 0.5, 0.5, 0.6, 0.1, 0.1, 0.7]
    for cut in range(len(curve)):
        whole, first, second = (Best(config(patience=9, min_delta=0.2)) for _ in range(3))
        for step, value in enumerate(curve):
            whole.judge(step, {"eval_score": value})
            (first if step < cut else second).judge(step, {"eval_score": value})
            if step == cut - 1:
                second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.state_dict() == whole.state_dict()


def test_what_was_not_measured_is_no_gain() -> None:
    best = Best(config(patience=1))
    assert best.judge(0, {"eval_score": 0.5})
    assert not best.judge(1, {"eval_loss": 0.9})
    assert best.exhausted


def test_without_a_metric_nothing_is_best() -> None:
    best = Best(EvalConfig())
    best.check([])
    assert not best.judge(0, {"eval_score": 1.0})
    assert (best.step, best.exhausted) == (None, False)


@pytest.mark.parametrize(
    ("metric", "mode", "smaller"),
    [
        ("eval_loss", None, True),
        ("eval_loss/policy", None, True),
        ("eval_nll_loss", None, True),
        ("eval_kl", None, True),
        ("eval_rewards/accuracies", None, False),
        ("eval_win_rate", None, False),
        ("eval_rewards/closs/mean", None, False),  # a word, not letters
        ("eval_loss", "max", False),
        ("eval_win_rate", "min", True),
    ],
)
def test_the_better_end(metric: str, mode: str | None, smaller: bool) -> None:
    keys = {"best_metric": metric, "best_mode": mode, "num_samples": 1, "rewards": [{"name": "length"}]}
    assert config(**keys).smaller_is_better is smaller


def curve_of(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


@contextmanager
def scripted(curve: dict[int, float]) -> Iterator[None]:
    """Evaluations measure one made-up metric, `eval_score`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "_held_out", lambda self: {"score": Metric(curve[self.last_step])})
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench("sft", folder=tmp_path_factory.mktemp("best"))


def recipe(bench: Bench, run: str, *overrides: str) -> Recipe:
    """Six steps, evaluated after each, a checkpoint after every second."""
    base = bench.recipe(
        run, max_steps=STEPS, num_epochs=9, batch_size=3, save_steps=2, save_total_limit=1, learning_rate=1e-2
    )
    defaults = [f"eval.data.0.path={bench.data}", "eval.every_steps=1", "eval.best_metric=eval_score"]
    return load_recipe(base.model_dump(mode="json", by_alias=True), [*defaults, *overrides])


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "best.json").read_text())
    return found


def test_the_best_outlives_the_newest_and_is_exported(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(curve_of(0.1, 0.2, 0.9, 0.3, 0.9, 0.5, 0.4)):
        result = train(recipe(bench, "older"), report=False)
    assert result.steps == STEPS
    assert checkpoints(result.folder) == [2, 6]  # save_total_limit is 1
    assert result.best == result.folder / "best"
    assert told(result.folder) == {
        "metric": "eval_score",
        "mode": "max",
        "value": 0.9,
        "step": 2,
        "last_step": 6,
        "stopped_early": False,
    }
    assert weight_difference(result.best, result.folder / "checkpoint-2") == 0
    assert weight_difference(result.folder, result.folder / "checkpoint-6") == 0
    assert weight_difference(result.best, result.folder) > 1e-3
    said = capsys.readouterr().out
    assert f"best eval_score 0.9 at step 2 is in {result.best}; the weights of the last step, 6, are in" in said
    assert "stopped early" not in said
    assert (
        "`best` holds those of step 2, where `eval_score` was best: 0.9." in (result.folder / "README.md").read_text()
    )
    # plain transformers, tokenizer included
    model = AutoModelForCausalLM.from_pretrained(result.best)
    ids = AutoTokenizer.from_pretrained(result.best)("abc", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


def test_the_start_may_be_the_best(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(curve_of(6, 5, 4, 3, 2, 1, 0)):
        result = train(recipe(bench, "falling"), report=False)
    assert checkpoints(result.folder) == [0, 6]
    assert weight_difference(result.folder / "best", bench.model) == 0
    assert "best eval_score 6 at step 0, before training, is in" in capsys.readouterr().out


def test_a_best_found_only_at_the_very_end_replaces_the_one_before(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step's checkpoint is there before its evaluation, which no `every_steps` asked for."""
    with scripted(curve_of(0, 1, 2, 3, 4, 5, 6)):
        result = train(recipe(bench, "end", "eval.every_steps=4"), report=False)
    assert checkpoints(result.folder) == [6]
    assert "at step 6, the last: " in capsys.readouterr().out
    assert digest(result.folder / "best") == digest(result.folder)


def test_a_plateau_ends_the_run_as_if_it_were_planned(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(curve_of(0.1, 0.5, 0.5, 0.4)):
        result = train(recipe(bench, "plateau", "eval.patience=2", "train.logging_steps=2"), report=False)
    assert result.steps == 3
    assert checkpoints(result.folder) == [1, 3]
    assert told(result.folder)["stopped_early"] is True
    said = capsys.readouterr().out
    assert "stopped early after step 3: 2 evaluations without a gain in eval_score" in said
    assert [record["step"] for record in read_metrics(result.folder) if "loss" in record] == [2, 3]
    assert weight_difference(result.folder, result.folder / "checkpoint-3") == 0


def test_a_plateau_up_to_the_planned_end_stops_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(curve_of(9, 1, 1, 1, 1, 1, 1)):
        result = train(recipe(bench, "to-the-end", "eval.patience=6"), report=False)
    assert result.steps == STEPS
    assert told(result.folder)["stopped_early"] is False
    assert "stopped early" not in capsys.readouterr().out


def test_nan_is_said_and_never_the_best(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(curve_of(0.1, 0.2, nan, 0.1, nan)):
        result = train(recipe(bench, "nan", "eval.patience=3"), report=False)
    assert (result.steps, told(result.folder)["step"]) == (4, 1)
    assert "evaluation at step 2: eval_score is nan; left out of metrics.jsonl" in capsys.readouterr().out
    values = [record.get("eval_score") for record in read_metrics(result.folder) if "loss" not in record]
    assert values == [0.1, 0.2, 0.1]


def test_never_a_number_leaves_no_best(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(dict.fromkeys(range(STEPS + 1), nan)):
        result = train(recipe(bench, "never"), report=False)
    assert result.best is None
    assert not (result.folder / "best").exists()
    assert "eval_score never was a number, so there is no best" in capsys.readouterr().out


def assert_equal_ends(found: Path, whole: Path) -> None:
    assert digest(found) == digest(whole)
    assert digest(found / "best") == digest(whole / "best")
    assert told(found) == told(whole)
    assert checkpoints(found) == checkpoints(whole)
    assert comparable_metrics(found) == comparable_metrics(whole)
    assert not list(found.glob(".writing-*"))


KILLED_CURVE = curve_of(0.1, 0.2, 0.6, 0.55, 0.65, 0.6, 0.3)
KILLED = ("eval.patience=3", "eval.min_delta=0.1", "train.max_steps=9")
"""Best at step 4 by less than `min_delta`; the gain that counts is of step 2, so the run stops after step 5."""


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Path:
    with scripted(KILLED_CURVE):
        folder = train(recipe(bench, "whole", *KILLED), quiet=True, report=False).folder
    assert told(folder) == {
        "metric": "eval_score",
        "mode": "max",
        "value": 0.65,
        "step": 4,
        "last_step": 5,
        "stopped_early": True,
    }
    assert checkpoints(folder) == [4, 5]
    return folder


def test_killed_in_a_step_and_resumed_equals_unbroken(bench: Bench, whole: Path) -> None:
    asked = recipe(bench, "killed", *KILLED)
    with scripted(KILLED_CURVE):
        with killed_at(4), pytest.raises(Killed):
            train(asked, quiet=True, report=False)
        resume(asked.output_dir, quiet=True, report=False)
    assert_equal_ends(Path(asked.output_dir), whole)


@contextmanager
def killed_around_save(step: int, *, after: bool) -> Iterator[None]:
    """Die right before or right after the checkpoint of this step."""
    save = Trainer.save

    def dying(self: Trainer) -> None:
        if self.progress.step == step and not after:
            raise Killed
        save(self)
        if self.progress.step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", dying)
        yield


@pytest.mark.parametrize(("step", "after"), [(0, True), (4, False), (4, True), (5, False), (5, True)])
def test_killed_around_a_checkpoint_and_resumed_equals_unbroken(
    bench: Bench, whole: Path, step: int, after: bool
) -> None:
    """Step 0 and 4 are checkpoints of a best, 5 is the one that ends the run: resumed, it must not train on."""
    asked = recipe(bench, f"saved-{step}-{after}", *KILLED)
    with scripted(KILLED_CURVE):
        with killed_around_save(step, after=after), pytest.raises(Killed):
            train(asked, quiet=True, report=False)
        assert resume(asked.output_dir, quiet=True, report=False).steps == 5
    assert_equal_ends(Path(asked.output_dir), whole)


def test_a_best_that_uses_patience_up_is_remembered_as_the_end(bench: Bench) -> None:
    """One evaluation may be the best, by too little, and the last that patience allows."""
    curve, asked = curve_of(0.1, 0.2, 0.3), recipe(bench, "both", "eval.patience=2", "eval.min_delta=1")
    with scripted(curve):
        with killed_around_save(2, after=True), pytest.raises(Killed):
            train(asked, quiet=True, report=False)
        result = resume(asked.output_dir, quiet=True, report=False)
    assert result.steps == 2
    assert told(result.folder) == {
        "metric": "eval_score",
        "mode": "max",
        "value": 0.3,
        "step": 2,
        "last_step": 2,
        "stopped_early": True,
    }


def test_a_damaged_best_is_not_passed_off_as_whole(bench: Bench) -> None:
    asked = recipe(bench, "damaged")
    with scripted(curve_of(1, 2, 3, 1, 1, 1, 1)), pytest.MonkeyPatch.context() as patch:
        run = Trainer.run

        def damaged(self: Trainer) -> None:
            run(self)
            (self.checkpoints.path(2) / "config.json").write_text("{}")

        patch.setattr(Trainer, "run", damaged)
        with pytest.raises(RunFailed, match=r"checkpoint-2 was the best by eval_score, but is not whole any more"):
            train(asked, quiet=True, report=False)
    assert not (Path(asked.output_dir) / "best").exists()
    assert (Path(asked.output_dir) / "model.safetensors").is_file()


def test_an_unknown_metric_is_refused_before_the_first_step(bench: Bench) -> None:
    asked = recipe(bench, "unknown", "eval.best_metric=eval_entrpy")
    with pytest.raises(RecipeError) as caught:
        train(asked, quiet=True, report=False)
    said = str(caught.value)
    assert "do not measure 'eval_entrpy'; did you mean 'eval_entropy'? They measure eval_" in said
    assert ", eval_loss, eval_mean_token_accuracy" in said
    assert read_metrics(Path(asked.output_dir)) == []
    assert checkpoints(Path(asked.output_dir)) == []


def test_the_value_and_the_weights_are_of_one_step(bench: Bench) -> None:
    """Measured again by another run, the exported weights have the value that made them the best."""
    settings = ("eval.best_metric=eval_loss", "train.learning_rate=0.3")
    first = train(recipe(bench, "first", *settings), quiet=True, report=False)
    losses = {r["step"]: r["eval_loss"] for r in read_metrics(first.folder) if "eval_loss" in r}
    step = told(first.folder)["step"]
    assert losses[step] == told(first.folder)["value"] == min(losses.values()) < losses[STEPS]
    start = recipe(bench, "again", *settings, f"model.name_or_path={first.best}", "train.max_steps=0")
    again = train(start, quiet=True, report=False)
    assert read_metrics(again.folder)[0]["eval_loss"] == pytest.approx(losses[step], abs=1e-6)


def test_an_adapter_is_exported_as_an_adapter(bench: Bench) -> None:
    with scripted(curve_of(0, 1, 9, 1, 1, 1, 1)):
        result = train(recipe(bench, "lora", "model.lora.r=4"), quiet=True, report=False)
    assert result.best is not None
    best, kept, last = (
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (result.best, result.folder / "checkpoint-2", result.folder)
    )
    assert best == kept != last
    AutoPeftModelForCausalLM.from_pretrained(result.best)


def test_overwriting_a_run_takes_its_best_away(bench: Bench) -> None:
    with scripted(curve_of(0, 1, 2, 3, 4, 5, 6)):
        folder = train(recipe(bench, "twice"), quiet=True, report=False).folder
    assert (folder / "best").is_dir()
    train(
        recipe(bench, "twice", "eval.best_metric=null", "train.max_steps=0"), overwrite=True, quiet=True, report=False
    )
    assert not (folder / "best").exists()
    assert not (folder / "best.json").exists()


def test_checkpoints_keep_the_best_beside_the_newest(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, 2, LocalWorld())
    seen = []
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 5), (6, 5), (7, 5), (8, 5), (8, 8)]:
        kept.save(step, {}, {}, lambda folder: None, best)
        seen.append(kept.steps())
    assert seen == [[1], [2, 1], [3, 2, 1], [4, 3, 1], [5, 4], [6, 5], [7, 6, 5], [8, 7, 5], [8, 7]]
