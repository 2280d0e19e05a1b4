"""The whole command: it must end with a model that visibly changed and still writes stories."""

import re

import pytest

from alignkit.quickstart import main, read_jsonl, summary
from alignkit.quickstart.corpus import ENDINGS, EVENTS


def is_from_a_template(sentence):
    templates = [template for moods in (EVENTS, ENDINGS) for mood in moods.values() for template in mood]
    return any(re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template)), sentence) for template in templates)


def test_summary_sets_the_same_prompts_side_by_side(tmp_path):
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 0, "id": "a", "prompt": "P.", "completion": "sad"}\n'
        '{"step": 0, "id": "b", "prompt": "Q.", "completion": "dull"}\n'
        '{"step": 9, "id": "b", "prompt": "Q.", "completion": "bright"}\n'
        '{"step": 9, "id": "a", "prompt": "P.", "completion": "glad"}\n'
    )
    lines = summary(tmp_path, {"eval_rewards/accuracies": 0.96875, "eval_win_rate": 0.75})
    assert lines[1] == "held-out preference accuracy 0.969, win rate of samples by word valence 0.750"
    assert lines[3:] == ["P.", "  before: sad", "  after:  glad", "", "Q.", "  before: dull", "  after:  bright"]


@pytest.mark.slow
def test_quickstart_makes_the_samples_cheerful(tmp_path, capsys):
    report = main(tmp_path)
    assert str(report.resolve()) in capsys.readouterr().out
    assert report.is_file()
    metrics = {}
    for record in read_jsonl(report.parent / "metrics.jsonl"):
        metrics |= record
    assert metrics["eval_rewards/accuracies"] >= 0.95
    assert metrics["eval_win_rate"] >= 0.9
    samples = read_jsonl(report.parent / "samples.jsonl")
    last = max(sample["step"] for sample in samples)
    aligned = [sample["completion"] for sample in samples if sample["step"] == last]
    sentences = [sentence.strip() for text in aligned for sentence in re.findall(r"[^.]+\.", text)]
    assert sum(map(is_from_a_template, sentences)) / len(sentences) > 0.8
