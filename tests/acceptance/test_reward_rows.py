"""The rows of the reward models' experiments are what they say."""

import pytest

from tests.acceptance import reward_model as task


@pytest.mark.parametrize("turned", [0.0, 0.4])
def test_an_exact_share_of_pairs_is_turned(turned):
    worth = task.letter_worth(0)
    for row in task.worth_pairs(0, "pairs", 50, turned=turned):
        chosen, rejected = (sum(worth[letter] for letter in str(row[side])) for side in ("chosen", "rejected"))
        assert (chosen < rejected) is row["is_noisy"]
        assert abs(chosen - rejected) >= task.CLEARLY
    assert sum(bool(row["is_noisy"]) for row in task.worth_pairs(0, "pairs", 50, turned=turned)) == round(50 * turned)


def test_a_third_of_the_graded_words_lack_a_grade():
    rows = task.graded_words(0, "graded", 30)
    assert [sum(row[name] is None for row in rows) for name in ("log_length", "worth")] == [5, 5]


def test_a_chain_is_right_up_to_its_first_false_sum():
    rows = task.chains(0, "chains", 50)
    for row in rows:
        value, right = int(str(row["prompt"])), []
        for step in row["completions"]:
            terms, result = step.split("=")
            start, added = map(int, terms.split("+"))
            assert start == value
            right.append((start + added) % 10 == int(result))
            value = int(result)
        assert row["labels"] == [all(right[: t + 1]) for t in range(len(right))]
    assert sum(all(row["labels"]) for row in rows) == 10
