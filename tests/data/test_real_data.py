"""Figures of real data sets with the stories tokenizer, 512 tokens long; skipped without ALIGNKIT_SHARED."""

import pytest

from alignkit.data.config import DataConfig
from alignkit.data.groups import load_groups
from alignkit.data.render import Renderer


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
