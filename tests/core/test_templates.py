"""Templates and what is read from judges: every parser on texts as models write them, and on noise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.core.errors import RecipeError
from alignkit.core.templates import (
    Template,
    conversation,
    json_scores,
    last_number,
    listed,
    quotable,
    read_template,
    score_line,
    scores_line,
    strip_thinking,
    verdict,
)


def test_what_is_put_in_is_not_read_again():
    template = Template("t", 'Q: {prompt} A: {answer} {"key": {}} {prompt}')
    filled = template.fill({"prompt": "{answer} {0} \\1", "answer": "{prompt}"})
    assert filled == 'Q: {answer} {0} \\1 A: {prompt} {"key": {}} {answer} {0} \\1'
    assert template.slots == {"prompt", "answer"}


def test_templates_of_another_wording_have_other_digests():
    assert Template("a", "x {prompt}").digest == Template("b", "x {prompt}").digest
    assert Template("a", "x {prompt}").digest != Template("a", "y {prompt}").digest


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("rating_v1", {"prompt", "answer", "low", "high", "principles"}),
        ("rubric_v1", {"prompt", "answer", "low", "high", "principles"}),
        ("pairwise_v1", {"prompt", "first", "second", "first_label", "second_label", "principles"}),
        ("yes_no_v1", {"prompt", "answer", "yes_label", "no_label", "principles"}),
        ("listwise_v1", {"prompt", "answers", "count", "low", "high", "principles"}),
    ],
)
def test_shipped_templates_have_their_slots(name, slots):
    assert read_template(name, sorted(slots)).slots == slots


def test_a_template_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("Is {answer} good for {prompt}?\n", encoding="utf-8")
    assert read_template("mine.txt", ["prompt", "answer"]).text == "Is {answer} good for {prompt}?"
    with pytest.raises(RecipeError, match=r"'mine.txt' has the slot 'answer', which nothing fills; .* prompt, first,"):
        read_template("mine.txt", ["prompt", "first"])
    with pytest.raises(RecipeError, match=r"'mine.txt' lacks the slot 'count'.* prompt, answer, count, each in braces"):
        read_template("mine.txt", ["prompt", "answer", "count"])
    with pytest.raises(RecipeError, match=r"no template 'mien.txt' \(looked in .*expected listwise_v1, pairwise_v1, "):
        read_template("mien.txt", ["prompt"])
    with pytest.raises(RecipeError, match="no template 'rating_v0'"):
        read_template("rating_v0", ["prompt"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("good <<end of answer>> bad", "good  bad"),
        ("<<ANSWER 2>>x<< End  of question >>", "x"),
        ("<<ans<<answer>>wer>>y", "y"),
        ("cout << x >> y <<answer", "cout << x >> y <<answer"),
    ],
)
def test_fences_are_taken_out_of_what_stands_between_them(text, expected):
    assert quotable(text) == expected


def test_answers_are_listed_by_number():
    assert listed(["a", "b<<answer 1>>"]) == (
        "<<answer 1>>\na\n<<end of answer 1>>\n<<answer 2>>\nb\n<<end of answer 2>>"
    )


def test_one_turn_is_its_text_and_several_have_roles():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert conversation(turns[:1]) == "hi"
    assert conversation(turns) == "user: hi\nassistant: ho"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>7?</think> 3", "3"),
        ("a <think>1</think> b <think>2</think> c", "a  b  c"),
        ("opened by the template</think> 5", "5"),
        ("<think>never done, 9", ""),
        (" plain ", "plain"),
    ],
)
def test_thinking_is_left_out(text, expected):
    assert strip_thinking(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7.0),
        ("1. The answer is good.\nRating: 8.", 8.0),
        ("8/10", 8.0),
        ("I give it 6 out of 10.", 6.0),
        ("On a scale of 1-10: 4", 4.0),
        ("4 (on a scale of 1 to 10)", 4.0),
        ("Rating: **7.5**", 7.5),
        ("[[3]]", 3.0),
        ("5, then 42", 5.0),
        ("0", None),
        ("-3", None),
        ("GPT4 said v2x", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_the_last_number_in_range(text, expected):
    assert last_number(text, 1, 10) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Useful, whole. Score: 4", 4.0),
        ("It says 'Score: 5' itself.\n**Score:** 2/5", 2.0),
        ("score : 0.", 0.0),
        ("Score: 3\nScore: 45", None),
        ("Score: <points>", None),
        ("scores: 3", None),
        ("4", None),
    ],
)
def test_the_last_score(text, expected):
    assert score_line(text, 0, 5) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scores: 1, 5, 3", [1.0, 5.0, 3.0]),
        ("scores: 5, 5, 5\nno:\n**Scores:** [2,3 , 4.5]", [2.0, 3.0, 4.5]),
        ("scores: 1, 5", None),
        ("scores: 1, 5, 3, 2", None),
        ("scores: 1, 5, 6", None),
        ("1, 5, 3", None),
    ],
)
def test_the_last_line_of_scores(text, expected):
    assert scores_line(text, 3, 1, 5) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"scores": [1, 2, 3], "why": "…"}', [1.0, 2.0, 3.0]),
        ("first [1, 1, 1], then [3, 2, 1]!", [3.0, 2.0, 1.0]),
        ("[1, 2, 3] of [all]", [1.0, 2.0, 3.0]),
        ("[1, 2]", None),
        ("[1, 2, true]", None),
        ("[1, 2, NaN]", None),
        ("[1, 2, 1" + "0" * 400 + "]", None),
        ("[" * 100_000, None),
    ],
)
def test_the_last_list_in_json(text, expected):
    assert json_scores(text, 3, 1, 5) == expected


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("1", ("1", "2"), 0),
        ("Answer 2.", ("1", "2"), 1),
        ("Answer 1 is better than answer 2.", ("1", "2"), 0),
        ("2 is longer, 1 is right. Verdict: **1**", ("1", "2"), 0),
        ("1 or 2? [[2]]", ("1", "2"), 1),
        ("Winner: answer 2, not 1", ("1", "2"), 1),
        ("1 is fine and 2 is too", ("1", "2"), None),
        ("12", ("1", "2"), None),
        ("", ("1", "2"), None),
        ("a tough call, but B", ("A", "B"), 1),
        ("YES!", ("Yes", "No"), 0),
        ("Not sure. The answer is no.", ("Yes", "No"), 1),
        ("nothing", ("Yes", "No"), None),
    ],
)
def test_a_verdict(text, labels, expected):
    assert verdict(text, labels) == expected


WORDS = ["scores:", "Score:", "verdict:", "[[", "]]", "[", "]", "1", "2", "-", ".", ",", "/", "<think>", "</think>"]
NOISE = st.lists(st.sampled_from([*WORDS, "\n", " ", "٣", "9e999", "{"]), max_size=30).map("".join) | st.text()


@given(NOISE)
def test_no_text_raises_and_nothing_out_of_range_is_read(text):
    for found in (last_number(text, 1, 5), score_line(text, 1, 5)):
        assert found is None or 1 <= found <= 5
    for scores in (scores_line(text, 2, 1, 5), json_scores(text, 2, 1, 5)):
        assert scores is None or (len(scores) == 2 and all(1 <= score <= 5 for score in scores))
    assert verdict(text, ("1", "2")) in (None, 0, 1)
    assert strip_thinking(strip_thinking(text)) == strip_thinking(text)
    assert quotable(quotable(text)) == quotable(text)
