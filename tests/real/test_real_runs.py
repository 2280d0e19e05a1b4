"""Real models on real data, through shipped recipes: what a user would see."""

import gzip
import hashlib
import json

import pytest

from alignkit import load_recipe, train
from tests.shared import shared_path

pytestmark = pytest.mark.slow


def split_by_prompt(folder, rows):
    """A fifth of the rows set aside by a hash of the prompt: no prompt is on both sides."""
    aside = [row for row in rows if int(hashlib.sha256(row["prompt"].encode()).hexdigest(), 16) % 5 == 0]
    kept = [row for row in rows if row not in aside]
    for name, part in (("train", kept), ("held_out", aside)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def test_dpo_of_the_story_model_prefers_and_writes_cheerful_stories(tmp_path):
    with gzip.open(shared_path("data/story_prefs/pairs.jsonl.gz"), "rt", encoding="utf-8") as file:
        split_by_prompt(tmp_path, [json.loads(line) for line in file])
    lexicon = shared_path("data/rewards/vader_words.tsv")
    recipe = load_recipe(
        "dpo/stories",
        [
            f"model.name_or_path={shared_path('models/stories260K')}",
            f"data.0.path={tmp_path / 'train.jsonl'}",
            f"eval.data.0.path={tmp_path / 'held_out.jsonl'}",
            f"output_dir={tmp_path / 'run'}",
            "eval.num_samples=80",
            "eval.sampling.max_completion_length=48",
            f"eval.rewards=[{{name: word_valence, args: {{lexicon: {lexicon}}}}}]",
        ],
    )
    found = train(recipe, quiet=True).metrics
    assert found["eval_rewards/accuracies"] >= 0.78
    assert found["eval_win_rate"] >= 0.95


@pytest.mark.parametrize("name", ["hh_harmless/pairs", "hh_harmless/plain", "ultrafeedback/pairs", "multiturn/pairs"])
def test_real_preference_data_trains(name, tmp_path):
    recipe = load_recipe(
        "dpo/stories",
        [
            f"model.name_or_path={shared_path('models/stories260K')}",
            f"model.chat_template={shared_path('models/chat_templates/plain.jinja')}",
            f"data.0.path={shared_path(f'data/{name}.jsonl.gz')}",
            "data.0.limit=48",
            "train.batch_size=8",
            "train.num_epochs=1",
            f"output_dir={tmp_path / 'run'}",
        ],
    )
    result = train(recipe, quiet=True)
    report = json.loads((result.folder / "data_report.json").read_text(encoding="utf-8"))[0]
    assert report["rows"] == 48
    assert report["kept"] + sum(tally["count"] for tally in report["dropped"].values()) == 48
    assert result.steps == -(-report["kept"] // 8)
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
