"""BLEU as BLEUBERI defines it, by hand."""

import math

import pytest

from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.rewards.bleu import Bleu, BleuConfig, counter, sentence_bleu
from tests.rewards.test_rules import answers


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("alignkit.rewards.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"'bleu' needs sacrebleu.*pip install 'alignkit\[rewards\]'"):
        Bleu(BleuConfig())


@pytest.fixture(scope="module")
def words():
    pytest.importorskip("sacrebleu")
    return counter("none", 4)


def dog_ran():
    """`a dog ran` and `the cat sat on the mat` share nothing: p = 1/4, 1/3, 1/2, 1; e^(1 − 6/3)."""
    return math.exp(-1) * (1 / 4 * 1 / 3 * 1 / 2) ** 0.25


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        ("the cat sat on the mat", ["the cat sat on the mat"], 1.0),
        ("the cat sat", ["the cat sat on the mat"], 0.3679),
        ("a dog ran", ["the cat sat on the mat"], 0.1662),
        ("the cat sat on a mat", ["the cat sat on a dog"], 0.8091),
        ("the cat sat on a mat", ["the cat sat on a dog", "sat on a mat"], 1.0),
        ("", ["the cat"], 0.0),
        ("  ", ["the cat"], 0.0),
    ],
)
def test_sentences_by_hand(words, text, references, expected):
    assert sentence_bleu(words, text, references, smooth=True) == pytest.approx(expected, abs=5e-5)


def test_the_hand_worked_one_exactly(words):
    assert sentence_bleu(words, "a dog ran", ["the cat sat on the mat"], True) == pytest.approx(dog_ran(), rel=1e-12)


def test_without_smoothing_a_missing_order_is_zero(words):
    assert sentence_bleu(words, "the cat sat", ["the cat sat on the mat"], smooth=False) == 0.0
    assert sentence_bleu(words, "a b c d", ["a b c d"], smooth=False) == pytest.approx(1.0)


def test_scores_read_the_answer_and_split_punctuation():
    pytest.importorskip("sacrebleu")
    source = Bleu(BleuConfig(references="reference"))
    texts = ["<think>x</think><answer>It is a cat.</answer>", "It is a cat .", "no", "It"]
    found = answers(source, *texts, reference=["It is a cat.", ["It is a cat."], None, []])
    assert found == [pytest.approx(1.0), pytest.approx(1.0), None, None]
    with pytest.raises(RunFailed, match=r"column 'reference' of row 0"):
        answers(source, "a", reference=[[1]])
