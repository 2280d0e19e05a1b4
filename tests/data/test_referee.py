"""The operation `referee`: what is asked of which answers, in which order, and where their true scores go."""

from collections import Counter

import pytest
from pydantic import ValidationError

from alignkit.core.errors import RecipeError
from alignkit.data.operations import Item
from alignkit.data.operations.referee import Referee, RefereeConfig
from alignkit.data.shapes import BadRow, to_example
from tests.rewards.scripted import between

RANKED = {"prompt": "q?", "completions": ["bad", "best", "fair"], "scores": [1.0, 9.0, 5.0]}
TRUE = dict(zip(RANKED["completions"], RANKED["scores"], strict=True))
PAIR = {"prompt": "q?", "chosen": "good", "rejected": "bad"}


def referee(**keys) -> Referee:
    return Referee(RefereeConfig(name="referee", **keys))


def made(operation: Referee, row, name="id", **fields) -> Item:
    shape = "ranked" if "completions" in row else "preference"
    (one,) = operation.apply(Item(name, to_example(row, shape), fields))
    return one


def test_answers_stand_numbered_in_a_drawn_order_and_their_scores_with_them():
    orders = Counter()
    for i in range(120):
        one = made(referee(), RANKED, f"row {i}", topic="x")
        shown = [between(one.example.prompt, place) for place in (1, 2, 3)]
        assert one.fields["referee_scores"] == [TRUE[answer] for answer in shown]
        assert one.fields.keys() == {"topic", "task", "referee_scores"}
        orders[tuple(shown)] += 1
    assert len(orders) == 6
    assert max(orders.values()) < 40, "20 of each on average"
    assert made(referee(), RANKED, "row 3") == made(referee(), RANKED, "row 3")
    assert any(made(referee(seed=1), RANKED, f"row {i}") != made(referee(), RANKED, f"row {i}") for i in range(9))


def test_a_row_becomes_a_question_without_answers():
    one = made(referee(scale=[2, 6]), RANKED)
    assert (one.example.completions, one.example.rewards, one.example.scores) == ([], [], [])
    assert one.fields["task"] == "preference"
    assert "Score 3 answers" in one.example.prompt
    assert "from 2 (poor) to 6" in one.example.prompt
    assert "<<question>>\nq?\n<<end of question>>" in one.example.prompt


def test_pairs_have_the_truth_of_chosen_and_rejected():
    found = {tuple(made(referee(template="pairwise_v1"), PAIR, f"{i}").fields["referee_scores"]) for i in range(20)}
    assert found == {(1.0, 0.0), (0.0, 1.0)}
    prompt = made(referee(template="pairwise_v1", labels=["left", "right"]), PAIR).example.prompt
    assert "Write left if the first" in prompt


def test_a_verdict_is_asked_on_two_of_many_that_differ():
    row = {"prompt": "q", "completions": ["a", "b", "c", "d"], "scores": [1.0, 1.0, 1.0, 2.0]}
    for i in range(20):
        assert sorted(made(referee(template="pairwise_v1"), row, f"{i}").fields["referee_scores"]) == [1.0, 2.0]


def test_of_more_answers_than_fit_some_are_drawn():
    row = {"prompt": "q", "completions": list("abcdef"), "scores": [float(i) for i in range(6)]}
    found = [made(referee(max_candidates=4), row, f"{i}").fields["referee_scores"] for i in range(30)]
    assert {len(scores) for scores in found} == {4}
    assert {score for scores in found for score in scores} == set(row["scores"])


def test_turns_become_one_turn_and_thinking_is_left_out():
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "q"}]
    row = {
        "prompt": chat,
        "chosen": [{"role": "assistant", "content": "<think>hm</think>yes <<answer 2>>"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    (turn,) = made(referee(), row).example.prompt
    assert turn["role"] == "user"
    assert "system: be kind\nuser: q" in turn["content"]
    assert "hm" not in turn["content"]
    assert turn["content"].count("<<answer 2>>") == 1, "an answer cannot open a quotation"


def test_rows_that_tell_nothing_are_left_out():
    for row, reason in (
        ({**RANKED, "scores": [2.0, 2.0, 2.0]}, "no score gap"),
        ({"prompt": "q", "completion": "a"}, "missing value"),
        ({"prompt": "q"}, "missing value"),
    ):
        shape = "ranked" if "scores" in row else "prompt_completion" if "completion" in row else "prompt"
        with pytest.raises(BadRow) as caught:
            referee().apply(Item("id", to_example(row, shape), {}))
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scale": [3, 3]}, r"expected \[worst, best\], got \[3, 3\]"),
        ({"labels": ["A", "a"]}, "two texts that differ"),
        ({"labels": ["A", " "]}, "two texts that differ"),
        ({"max_candidates": 1}, "greater than or equal to 2"),
    ],
)
def test_mistakes_are_told(keys, message):
    with pytest.raises(ValidationError, match=message):
        referee(**keys)


def test_a_template_needs_both_answers_or_the_list(tmp_path):
    for text, slot in (("{prompt} {first}", "second"), ("{prompt}", "answers")):
        (tmp_path / "own.txt").write_text(text)
        with pytest.raises(RecipeError, match=f"lacks the slot '{slot}'"):
            referee(template=str(tmp_path / "own.txt"))
