"""Figures of real data sets with the stories tokenizer, 512 tokens long; skipped without ALIGNKIT_SHARED."""

import pytest

from alignkit.data.config import DataConfig
from alignkit.data.convert import convert
from alignkit.data.groups import load_groups
from alignkit.data.lint import lint
from alignkit.data.render import Renderer
from alignkit.data.sources import read_rows


@pytest.fixture(scope="module")
def renderer(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    template = (shared / "models" / "chat_templates" / "plain.jinja").read_text()
    return Renderer(tokenizer, [1], template, 1, 1)


@pytest.mark.parametrize(
    ("name", "format_", "rows", "kept", "dropped", "changed"),
    [
        ("story_prefs/pairs", "preference", 414, 414, {}, {"boundary merged": 3}),
        ("hh_harmless/pairs", "preference", 1400, 1372, {"overlong": 28}, {"prompt cut": 395}),
        (
            "hh_harmless/plain",
            "preference",
            1401,
            1372,
            {"overlong": 28, "empty completion": 1},
            {"prompt cut": 400},
        ),
        ("ultrafeedback/pairs", "preference", 715, 257, {"overlong": 458}, {"prompt cut": 147}),
        ("multiturn/pairs", "preference", 176, 32, {"overlong": 144}, {"prompt cut": 22}),
        ("multiturn/binary", "unpaired", 185, 78, {"overlong": 107}, {"prompt cut": 36}),
        ("tinystories/stories", "text", 511, 413, {"overlong": 98}, {}),
        ("tinystories/prompts", "prompt", 419, 419, {}, {}),
    ],
)
def test_figures(shared, renderer, name, format_, rows, kept, dropped, changed):
    groups, report = load_groups(DataConfig(path=str(shared / "data" / f"{name}.jsonl.gz")), renderer, max_length=512)
    assert (report.format, report.rows, report.kept) == (format_, rows, kept)
    assert {reason: tally.count for reason, tally in report.dropped.items()} == dropped
    assert {kind: tally.count for kind, tally in report.changed.items()} == changed
    for group in groups:
        for completion in group.completions:
            assert len(group.prompt) + len(completion.tokens) <= 512
            assert completion.tokens[-1] == 1


def test_story_pairs_are_tokenised_as_text_is(shared, renderer):
    path = shared / "data" / "story_prefs" / "pairs.jsonl.gz"
    groups, _ = load_groups(DataConfig(path=str(path)), renderer, max_length=512)
    encode = renderer.tokenizer
    for group in groups:
        for completion in group.completions:
            whole = encode(group.messages[0]["content"] + completion.text)["input_ids"]
            assert group.prompt + completion.tokens == [*whole, 1]


def rows(path, **options):
    return read_rows(DataConfig(path=str(path), **options)).rows


def test_transcripts_are_the_conversations_that_others_parsed(shared, tmp_path):
    folder = shared / "data" / "hh_harmless"
    convert(
        DataConfig(path=str(folder / "plain.jsonl.gz"), format="transcripts"), tmp_path / "hh.jsonl.gz", "preference"
    )
    ours = {row["id"]: row for row in rows(tmp_path / "hh.jsonl.gz")}
    parsed = {row["id"]: row for row in rows(folder / "pairs.jsonl.gz")}
    assert len(parsed) == 1400
    assert ours == parsed


@pytest.mark.parametrize(
    ("name", "there", "threshold"),
    [
        ("ultrafeedback/pairs", "unpaired", None),
        ("alpaca_eval/chosen_rejected", "ranked", None),
        ("alpaca_eval/ranked", "unpaired", 0.5),
    ],
)
def test_real_files_survive_a_round_trip(shared, tmp_path, name, there, threshold):
    source = DataConfig(path=str(shared / "data" / f"{name}.jsonl.gz"))
    account = convert(source, tmp_path / "there.parquet", there, threshold=threshold)
    assert account.lost == {}
    back = "ranked" if "ranked" in name else "preference"
    convert(DataConfig(path=str(tmp_path / "there.parquet")), tmp_path / "back.jsonl", back)
    assert rows(tmp_path / "back.jsonl") == read_rows(source).rows


@pytest.mark.parametrize(
    ("name", "check", "count", "numbers"),
    [
        ("alpaca_eval/chosen_rejected", "length bias", 247, {"cohens_d": 1.33, "longer_wins": 0.95}),
        ("hh_helpful/pairs", "length bias", 1170, {"cohens_d": 0.27, "longer_wins": 0.60}),
        ("hh_harmless/pairs", "length bias", 1400, {"cohens_d": -0.22, "longer_wins": 0.45}),
        ("alpaca_eval/binary", "label imbalance", 398, {"share_true": 0.37}),
        ("alpaca_eval/binary", "duplicate rows", 18, {}),
        ("multiturn/pairs", "duplicate rows", 4, {}),
        ("ultrafeedback/pairs", "scores against order", 78, {}),
    ],
)
def test_what_lint_finds(shared, name, check, count, numbers):
    report = lint(DataConfig(path=str(shared / "data" / f"{name}.jsonl.gz")))
    [finding] = [finding for finding in report.findings if finding.check == check]
    assert finding.count == count
    assert finding.numbers == pytest.approx(numbers, abs=0.005)
