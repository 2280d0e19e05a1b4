"""Rule rewards, by hand."""

import pytest
import torch
from pydantic import ValidationError

from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.types import RewardBatch
from alignkit.rewards.rules import (
    Choice,
    ChoiceConfig,
    Exact,
    ExactConfig,
    FormatJson,
    FormatJsonConfig,
    FormatTags,
    FormatTagsConfig,
    Length,
    LengthConfig,
    Regex,
    RegexConfig,
    Repetition,
    RepetitionConfig,
    WordValence,
    WordValenceConfig,
    chosen_letter,
    distinct_ratio,
    length_score,
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


def batch(*texts, **columns):
    """Completions of one prompt."""
    return RewardBatch(
        prompts=[[{"role": "user", "content": "p"}]] * len(texts),
        completions=list(texts),
        completion_ids=None,
        completion_mask=None,
        group=torch.zeros(len(texts), dtype=torch.long),
        columns=columns,
        step=0,
        ended=torch.ones(len(texts), dtype=torch.bool),
        plain=[True] * len(texts),
    )


def answers(source, *texts, **columns):
    """Scores, None where they are not valid."""
    output = source.score(batch(*texts, **columns), None)
    return [score if ok else None for score, ok in zip(output.score.tolist(), output.valid.tolist(), strict=True)]


@pytest.mark.parametrize(("length", "expected"), [(6, 0.0), (8, -0.5), (10, -1.0), (12, -1.0)])
def test_overlong_answers_pay_within_the_buffer(length, expected):
    config = LengthConfig(form="overlong_soft", maximum=10, buffer=4)
    assert length_score(length, 1.0, config) == expected


def test_an_answer_of_just_the_maximum_is_not_punished_without_a_buffer():
    config = LengthConfig(form="overlong_soft", maximum=10)
    assert [length_score(n, 1.0, config) for n in (10, 11)] == [0.0, -1.0]


@pytest.mark.parametrize(
    ("keys", "length", "expected"),
    [
        ({"form": "salmon_bonus", "maximum": 100}, 40, 2.0),
        ({"form": "salmon_bonus", "maximum": 100}, 90, 4.0),
        ({"form": "linear", "maximum": 100, "alpha": 0.5}, 40, -0.2),
        ({"form": "target_band", "target": 100.0}, 110, 0.0),
        ({"form": "target_band", "target": 100.0}, 130, -0.2),
        ({"form": "target_band", "target": 100.0, "power": 2.0}, 130, -0.04),
        ({"form": "target_band", "target": 100.0}, 70, -0.2),
        ({"form": "target_band", "target": 100.0, "side": "over"}, 70, 0.0),
        ({"form": "target_band", "target": 100.0, "side": "under"}, 130, 0.0),
        ({"form": "target_band", "target": 100.0}, 500, -1.0),
    ],
)
def test_length_forms_by_hand(keys, length, expected):
    config = LengthConfig(**keys)
    assert length_score(length, config.target or 1.0, config) == pytest.approx(expected)


def test_length_counts_tokens_and_takes_its_target_from_data_or_group():
    assert Length(LengthConfig(unit="tokens")).score(rows(), None).score.tolist() == [1.0, 2.0, 3.0]
    of_data = Length(LengthConfig(form="target_band", target="column:want", tolerance=0.0))
    assert of_data.requires == ("want",)
    assert answers(of_data, "a b", "a b", "a", want=[4, 2, None]) == [-0.5, 0.0, None]
    of_group = Length(LengthConfig(form="target_band", target="median", tolerance=0.0))
    assert answers(of_group, "a", "a b", "a b c") == [-0.5, 0.0, -0.5]
    with pytest.raises(RunFailed, match="come without tokens"):
        answers(Length(LengthConfig(unit="tokens")), "a")


@pytest.mark.parametrize(
    "keys",
    [
        {"form": "linear"},
        {"form": "target_band"},
        {"form": "target_band", "target": "mean"},
        {"form": "target_band", "target": 0.0},
        {"form": "overlong_soft", "maximum": 4, "buffer": 5},
    ],
)
def test_lengths_without_their_bounds_are_refused(keys):
    with pytest.raises(ValidationError):
        LengthConfig(**keys)


def test_repeating_a_sentence_costs_more_every_time():
    ratios = [distinct_ratio("the cat sat on the mat . " * times, 3) for times in (1, 2, 4)]
    assert ratios[0] == 1.0
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 3
    # a a a a: two phrases of three words, one of them distinct
    assert answers(Repetition(RepetitionConfig(penalty=-2.0)), "a a a a", "a b", "") == [-1.0, 0.0, 0.0]


def test_exact_ignores_what_it_is_told_to():
    assert answers(Exact(ExactConfig()), " Paris. ", "london", "x", answer=["paris", "Paris", None]) == [1.0, 0.0, None]
    strict = ExactConfig(strip=False, casefold=False, punctuation=True)
    assert answers(Exact(strict), "Paris.", "Paris", answer=["Paris", "Paris"]) == [0.0, 1.0]


def test_regex_of_the_recipe_and_of_the_data():
    assert answers(Regex(RegexConfig(pattern=r"\d+")), "a 12", "a") == [1.0, 0.0]
    assert answers(Regex(RegexConfig(pattern=r"\d+", mode="fullmatch")), "a 12", "12") == [0.0, 1.0]
    assert answers(Regex(RegexConfig(ignore_case=True)), "A", "b", "c", pattern=["a", "c", None]) == [1.0, 0.0, None]
    with pytest.raises(ValidationError, match="no regular expression"):
        RegexConfig(pattern="(")
    with pytest.raises(RunFailed, match=r"column 'pattern': '\(' is no regular expression"):
        answers(Regex(RegexConfig()), "a", pattern=["("])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"),
        ("B.", "B"),
        ("answer: B", "B"),
        ("B", "B"),
        ("The answer is (C).", "C"),
        ("(A) is wrong, so the answer is D", "D"),
        ("I think A. No, B) it is", "B"),
        ("A dog. Bananas.", None),
        ("", None),
        ("answer is Z", None),
    ],
)
def test_the_last_letter_chosen_counts(text, letter):
    assert chosen_letter(text, "ABCD") == letter


def test_choice_looks_behind_the_thinking():
    given = ["<think>A.</think> (B)", "(A)", "none", "B"]
    assert answers(Choice(ChoiceConfig()), *given, answer=["B", "B", "B", None]) == [1.0, 0.0, 0.0, None]


@pytest.mark.parametrize(
    ("text", "strict", "gradual"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        (" <think>a</think> so <answer>b</answer> end", 1.0, 1.0),
        ("x<think>a</think><answer>b</answer>", 0.0, 5 / 6),
        ("<think>a</think><answer> </answer>", 0.0, 5 / 6),
        ("<answer>b</answer><think>a</think>", 0.0, 4 / 6),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0, 5 / 6),
        ("", 0.0, 0.0),
    ],
)
def test_tags_by_their_conditions(text, strict, gradual):
    assert answers(FormatTags(FormatTagsConfig()), text) == [strict]
    assert answers(FormatTags(FormatTagsConfig(gradual=True)), text) == [pytest.approx(gradual)]


def test_json_objects_with_their_keys():
    source = FormatJson(FormatJsonConfig(keys=["a"]))
    texts = ['{"a": 1}', '<think>{</think> {"a": null, "b": 2}', '{"b": 1}', "[1]", "{", "[" * 100_000]
    assert answers(source, *texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
