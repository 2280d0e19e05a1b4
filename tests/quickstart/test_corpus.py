"""The generated stories: repeatable, grammatical by construction, moods apart, held-out prompts kept back."""

import json
import re

import pytest

from alignkit.quickstart.corpus import NUM_EVENTS, Story, pairs, texts, write_corpus
from alignkit.rewards.rules import read_lexicon, word_valence


def test_stories_repeat_by_key_and_differ_by_index():
    assert texts(20, seed=0) == texts(20, seed=0)
    assert texts(20, seed=0) != texts(20, seed=1)
    assert len({row["text"] for row in texts(200, seed=0)}) == 200
    assert texts(5, seed=0) == texts(20, seed=0)[:5]


def test_every_sentence_is_filled_and_ends():
    for row in texts(300, seed=0):
        assert not re.search(r"[{}]|  | a [aeiou]", row["text"])
        assert row["text"].count(".") == 1 + NUM_EVENTS + 1
        assert re.fullmatch(r"([A-Z][A-Za-z, ]+\. )+[A-Z][A-Za-z, ]+\.", row["text"])


def test_chosen_is_cheerful_and_rejected_gloomy():
    lexicon = read_lexicon(None)
    for row in pairs(300, 0, "pairs"):
        assert word_valence(row["chosen"], lexicon) > 0.1
        assert word_valence(row["rejected"], lexicon) < -0.1


def test_text_leans_to_neither_mood():
    lexicon = read_lexicon(None)
    valences = [word_valence(row["text"], lexicon) for row in texts(500, seed=0)]
    assert sum(valences) / len(valences) == pytest.approx(0.0, abs=0.05)
    moods = [mood for index in range(500) for mood in Story(0, "test", index).tossed_moods()]
    assert moods.count("cheerful") / len(moods) == pytest.approx(0.5, abs=0.05)


def test_no_event_comes_twice():
    for index in range(100):
        sentences = Story(0, "test", index).continuation(["cheerful"] * (NUM_EVENTS + 1)).split(". ")
        assert len(set(sentences)) == NUM_EVENTS + 1


def test_held_out_prompts_are_nowhere_else(tmp_path):
    write_corpus(tmp_path, num_texts=400, num_pairs=100, num_held_out=50, seed=0)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pretrain", "pairs", "held_out")
    }
    kept_back = {row["prompt"] for row in rows["held_out"]}
    assert (len(rows["pairs"]), len(kept_back)) == (100, 50)
    assert not kept_back & {row["prompt"] for row in rows["pairs"]}
    assert not any(row["text"].startswith(prompt) for row in rows["pretrain"] for prompt in kept_back)
    assert pairs(5, 0, "held_out", without=frozenset({rows["held_out"][0]["prompt"]}))[0] == {**rows["held_out"][1]}
