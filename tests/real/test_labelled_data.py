"""Labelled answers of real models to real questions: both methods learn to tell unseen ones apart."""

import gzip
import json

import pytest

from alignkit import load_recipe, train
from tests.real.test_real_runs import split_by_prompt
from tests.shared import shared_path

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "keys", "margin"), [("kto", ["algorithm.desirable_weight=1.6"], 1.0), ("bco", [], 0.25)]
)
def test_answers_that_a_judge_prefers_part_from_the_others(name, keys, margin, tmp_path):
    with gzip.open(shared_path("data/alpaca_eval/binary.jsonl.gz"), "rt", encoding="utf-8") as file:
        split_by_prompt(tmp_path, [json.loads(line) for line in file])
    held_out = f"{{path: {tmp_path / 'held_out.jsonl'}, overlong: cut, max_bad_fraction: 1}}"
    recipe = load_recipe(
        f"{name}/stories",
        [
            f"model.name_or_path={shared_path('models/stories260K')}",
            f"data.0.path={tmp_path / 'train.jsonl'}",
            "data.0.overlong=cut",
            "data.0.max_bad_fraction=1",
            f"eval.data=[{held_out}]",
            "eval.every_steps=0",
            f"output_dir={tmp_path / 'run'}",
            "train.max_steps=40",
            "train.batch_size=8",
            "train.learning_rate=1e-4",
            "train.max_length=160",
            *keys,
        ],
    )
    found = train(recipe, quiet=True).metrics
    assert found["eval_rewards/margins"] >= margin
