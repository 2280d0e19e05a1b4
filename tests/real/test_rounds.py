"""Three rounds of a story model on its own judgement, anchored by pairs it learned before: CREAM and the plain way."""

import gzip
import json

import pytest

from alignkit import load_recipe, train
from tests.real.test_real_runs import split_by_prompt
from tests.shared import shared_path

pytestmark = pytest.mark.slow


def split(folder, file):
    """train.jsonl and held_out.jsonl of a file of rows."""
    folder.mkdir()
    with gzip.open(shared_path(file), "rt", encoding="utf-8") as rows:
        split_by_prompt(folder, [json.loads(line) for line in rows])
    return folder / "train.jsonl", folder / "held_out.jsonl"


def test_rounds_are_measured_beside_each_other(tmp_path):
    pairs, labels = split(tmp_path / "pairs", "data/story_prefs/pairs.jsonl.gz")
    prompts, held_out = split(tmp_path / "prompts", "data/tinystories/prompts.jsonl.gz")
    base = shared_path("models/stories260K")
    keys = [f"model.name_or_path={base}", f"data.0.path={pairs}", f"output_dir={tmp_path / 'anchor'}"]
    train(load_recipe("dpo/stories", keys), quiet=True)
    found = {}
    for name in ("cream", "self_rewarding"):
        recipe = load_recipe(
            f"{name}/stories",
            [
                f"model.name_or_path={tmp_path / 'anchor'}",
                f"models.base.from={base}",
                f"data.0.path={prompts}",
                f"eval.data=[{{path: {held_out}}}]",
                "eval.num_samples=87",
                "eval.rewards=[{name: word_valence}]",
                f"drift.labels=[{{path: {labels}}}]",
                f"output_dir={tmp_path / name}",
            ],
        )
        run = train(recipe, quiet=True)
        lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
        found[name] = [line["metrics"] for line in lines if "metrics" in line], run.metrics
        assert "after step" in (run.folder / "report.html").read_text()
    for rounds, _ in found.values():
        assert len(rounds) == 3
        assert rounds[0]["drift/judge_accuracy"] >= 0.75  # of held-out pairs, by what it learned to prefer
    assert found["cream"][1]["eval_win_rate"] >= 0.6  # of pleasanter words, against the start's
    assert found["cream"][1]["eval_win_rate"] > found["self_rewarding"][1]["eval_win_rate"]
