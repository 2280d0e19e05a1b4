"""Rule rewards, by hand."""

import pytest

from alignkit.core.errors import RecipeError
from alignkit.rewards.rules import (
    Length,
    LengthConfig,
    WordValence,
    WordValenceConfig,
    read_lexicon,
    word_valence,
)
from tests.rewards.test_functions import rows

LEXICON = {"happy": 2.5, "sad": -2.5, "don't": -0.5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Happy, happy dog!", 5.0 / 3),
        ("sad HAPPY", 0.0),
        ("a dog", 0.0),
        ("", 0.0),
        ("123 …", 0.0),
        ("I don't go", -0.5 / 3),
        ("unhappy happyness", 0.0),
    ],
)
def test_word_valence_is_the_sum_over_all_words(text, expected):
    assert word_valence(text, LEXICON) == pytest.approx(expected)


def test_lexicon_file_with_and_without_header(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("word\tvalence\nFine\t1.5\nbad\t-2\n")
    assert read_lexicon(str(path)) == {"fine": 1.5, "bad": -2.0}
    path.write_text("fine\t1.5\n")
    assert read_lexicon(str(path)) == {"fine": 1.5}


def test_lexicon_mistakes_are_located(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("word\tvalence\nfine\t1.5\nbad -2\n")
    with pytest.raises(RecipeError, match=r"words.tsv:3 is 'bad -2'; expected word<TAB>valence"):
        read_lexicon(str(path))
    with pytest.raises(RecipeError, match=r"no lexicon file '.*missing.tsv'"):
        read_lexicon(str(tmp_path / "missing.tsv"))


def test_built_in_lexicon_has_both_sides_and_stays_in_range():
    lexicon = read_lexicon(None)
    assert len(lexicon) >= 60
    assert all(-3 <= valence <= 3 and valence != 0 for valence in lexicon.values())
    assert min(sum(v > 0 for v in lexicon.values()), sum(v < 0 for v in lexicon.values())) >= 25
    assert lexicon["happy"] > 0 > lexicon["sad"]


def test_sources_score_every_completion(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("bb\t2\n")
    output = WordValence(WordValenceConfig(lexicon=str(path))).score(rows(), None)
    assert output.score.tolist() == [0.0, 2.0, 0.0]
    assert output.valid.all()
    assert Length(LengthConfig()).score(rows(), None).score.tolist() == [1.0, 1.0, 1.0]
    assert Length(LengthConfig(unit="characters")).score(rows(), None).score.tolist() == [1.0, 2.0, 3.0]
