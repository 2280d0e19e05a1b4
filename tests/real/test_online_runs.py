"""The story model learns a word from its own stories, through the shipped recipe."""

import gzip
import json

import pytest

from alignkit import load_recipe, train
from tests.real.test_real_runs import split_by_prompt
from tests.shared import shared_path

pytestmark = pytest.mark.slow


def test_grpo_of_the_story_model_writes_of_happy_people(tmp_path):
    with gzip.open(shared_path("data/tinystories/prompts.jsonl.gz"), "rt", encoding="utf-8") as file:
        split_by_prompt(tmp_path, [json.loads(line) for line in file])
    recipe = load_recipe(
        "grpo/stories",
        [
            f"model.name_or_path={shared_path('models/stories260K')}",
            f"data.0.path={tmp_path / 'train.jsonl'}",
            f"eval.data.0.path={tmp_path / 'held_out.jsonl'}",
            f"output_dir={tmp_path / 'run'}",
            "eval.num_samples=87",
        ],
    )
    result = train(recipe, quiet=True)
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert next(record["eval_reward"] for record in records if "eval_reward" in record) < 0.15
    assert result.metrics["eval_reward"] >= 0.9
    written = [record["completions/distinct_trigrams"] for record in records if "loss" in record]
    assert sum(written[-5:]) / 5 >= 0.75
