"""The rewards of player and referee: what a verdict is worth, what is asked of a group, and what cannot be won."""

import re
from itertools import permutations
from math import exp

import pytest
from pydantic import ValidationError

from alignkit.core.errors import DataError, RecipeError
from alignkit.rewards.referee import RefereeRank, RefereeRankConfig, SelfReferee, SelfRefereeConfig
from tests.rewards.scripted import Scripted, between, rows
from tests.shared import golden_case

TRUE = [3.0, 1.0, 4.0, 2.0]


def said(scores) -> str:
    return "I compared them.\nscores: " + ", ".join(f"{score:g}" for score in scores)


def rank(*completions, true=TRUE, **keys):
    """One group of completions to one question."""
    return RefereeRank(RefereeRankConfig(**keys)).score(rows(list(completions), referee_scores=[true]), None)


def self_scores(models, *answers, step=0, **keys):
    return SelfReferee(SelfRefereeConfig(**keys)).score(rows(list(answers), step=step), models)


def listed(prompt) -> list[str]:
    return [between(prompt, place + 1) for place in range(prompt.count("<<end of answer"))]


def by_length(prompt) -> str:
    """A referee for whom longer is better, 1 to 10."""
    return said([min(10, len(answer)) for answer in listed(prompt)])


# Questions about answers of the data


@pytest.mark.parametrize("name", ["four", "pair", "many", "ties_in_prediction", "constant_prediction"])
def test_golden_rewards(name):
    case = golden_case("urpo.json", f"kendall_{name}")
    text, true = said(case["inputs"]["predicted_scores"]), case["inputs"]["true_scores"]
    keys = {"true": true, "scale": [0, 10]}
    assert float(rank(text, **keys).score[0]) == pytest.approx(case["outputs"]["tau_a"], abs=1e-7)
    unit = rank(text, **keys, reward="unit")
    assert float(unit.score[0]) == pytest.approx(case["outputs"]["reward_tau_a_01"], abs=1e-7)


def test_what_is_right_wrong_silent_and_unreadable():
    output = rank(said(TRUE), said([2, 4, 1, 3]), said([5] * 4), "who knows", said([1, 2, 3]), said([0, 1, 2, 3]))
    assert output.score.tolist() == [1, -1, 0, -1, -1, -1]
    assert output.components["accuracy"].tolist() == [1, 0, 0.5, 0, 0, 0]
    assert output.components["parsed"].tolist() == [1, 1, 1, 0, 0, 0]
    assert output.valid.all()
    assert rank("who knows", reward="unit").score.tolist() == [0]


def test_of_two_the_reward_is_none_half_or_all_and_turns_with_the_truth():
    texts = [said([7, 2]), said([4, 4]), said([2, 7])]
    found = rank(*texts, true=[1.0, 0.0], reward="unit").score
    assert found.tolist() == [1, 0.5, 0]
    assert rank(*texts, true=[0.0, 1.0], reward="unit").score.tolist() == (1 - found).tolist()


def test_only_the_order_of_scores_counts_and_not_that_of_the_answers():
    given, squeezed = said([4, 2, 9, 7]), said([2, 1, 10, 3])
    assert rank(given).score.tolist() == rank(squeezed).score.tolist() == pytest.approx([2 / 3])
    for order in permutations(range(4)):
        true = [TRUE[i] for i in order]
        assert rank(said(true), true=true).score.tolist() == [1]


def test_equal_true_scores_count_for_no_accuracy():
    output = rank(said([9, 5, 5]), said([5, 9, 1]), true=[2.0, 1.0, 1.0])
    assert output.score.tolist() == pytest.approx([2 / 3, 0])
    assert output.components["accuracy"].tolist() == pytest.approx([1, 0.5])


def test_a_verdict_on_two(tmp_path):
    output = rank("1", "it is long. 2", "2\n[[1]]", "11", "", true=[1.0, 0.0], template="pairwise_v1")
    assert output.score.tolist() == [1, -1, 1, -1, -1]
    assert output.components["parsed"].tolist() == [1, 1, 1, 0, 0]


def test_only_the_last_line_behind_thinking_and_quotation_counts():
    right, wrong = said(TRUE).splitlines()[-1], said([2, 4, 1, 3]).splitlines()[-1]
    assert rank(f"{wrong}\n{right}\n").score.tolist() == [1]
    assert rank(f"{right}\nthat is all").score.tolist() == [-1], "not the last line"
    assert rank(f"{wrong}<think>{right}").score.tolist() == [1 - 2], "thinking is no verdict"
    assert rank(f"<think>{wrong}</think>{right}").score.tolist() == [1]
    assert rank(f"It says <<answer 1>>\n{right} <<end of answer 1>>").score.tolist() == [-1], "a quotation"


@pytest.mark.parametrize("true", [None, [], [1.0, 1.0], ["a", "b"], 3.0, [1.0, 2.0, 3.0]])
def test_true_scores_must_be_a_ranking(true):
    with pytest.raises(DataError, match="expected two numbers that differ; the operation `referee` writes them"):
        rank("1", true=true, template="pairwise_v1")


# What the model thinks of its own answers


def test_scores_of_a_list_are_scaled_and_averaged_over_orders():
    models = Scripted(by_length)
    output = self_scores(models, "a", "bbbb", "c" * 10, scale=[1, 10])
    assert output.score.tolist() == pytest.approx([0, 1 / 3, 1])
    assert len(models.asked) == len({prompt for _, prompt in models.asked}) == 3, "three votes, three orders"
    assert models.sampling["temperature"] == 0.7
    assert output.components["parsed"].tolist() == [1, 1, 1]
    assert len(output.info[0]["judge"]) == 3


def test_orders_change_with_the_version_and_not_with_the_order_of_the_answers():
    answers = list("abcdef")

    def asked(*answers, step):
        models = Scripted(by_length)
        self_scores(models, *answers, step=step)
        return [prompt for _, prompt in models.asked]

    assert asked(*answers, step=1) == asked(*reversed(answers), step=1)
    assert asked(*answers, step=1) != asked(*answers, step=2)


def test_a_referee_that_goes_by_place_gives_nothing_away():
    models = Scripted(lambda prompt: said([10 - place for place in range(len(listed(prompt)))]))
    output = self_scores(models, *"abcd", votes=200)
    assert output.score.tolist() == pytest.approx([0.5 + 3 / 9] * 4, abs=0.07)
    assert output.components["position_bias"].tolist() == [1] * 4
    last = self_scores(Scripted(lambda prompt: said([1, 2, 3, 4])), *"abcd", votes=1)
    assert last.components["position_bias"].tolist() == [-1] * 4


def test_a_constant_referee_and_equal_answers_leave_no_difference():
    assert len(set(self_scores(Scripted(lambda prompt: said([7] * 4)), *"abcd").score.tolist())) == 1
    models = Scripted(by_length)
    assert self_scores(models, "a", "a", "a").score.tolist() == [0.5] * 3
    assert not models.asked


def test_long_groups_are_listed_in_overlapping_parts():
    models = Scripted(by_length)
    answers = ["x" * length for length in range(1, 11)]
    output = self_scores(models, *answers, votes=1, max_candidates=4, overlap=1)
    assert [len(listed(prompt)) for _, prompt in models.asked] == [4, 4, 4]
    shown = [answer for _, prompt in models.asked for answer in listed(prompt)]
    assert set(shown) == set(answers)
    assert len(shown) == 12
    assert output.score.tolist() == pytest.approx([place / 9 for place in range(10)])


def test_each_group_is_judged_by_itself_and_without_thinking():
    models = Scripted(by_length)
    batch = rows(["<think>long thoughts</think>a", "bb"], ["scores: 10, 1", "<<end of answer 1>>dd"])
    output = SelfReferee(SelfRefereeConfig(votes=1)).score(batch, models)
    first, second = (prompt for _, prompt in models.asked)
    assert "question 0" in first
    assert sorted(listed(first)) == ["a", "bb"]
    assert sorted(listed(second)) == ["dd", "scores: 10, 1"]
    assert output.score.tolist() == pytest.approx([0, 1 / 9, 1, 1 / 9])


def test_what_cannot_be_read_is_not_valid():
    output = self_scores(Scripted(lambda prompt: "hm"), *"ab")
    assert output.valid.tolist() == [False, False]
    texts = iter(["hm", *[said([1, 2, 3])] * 2])
    half = self_scores(Scripted(lambda prompt: next(texts)), *"abc")
    assert half.valid.all()
    assert half.components["parsed"].tolist() == pytest.approx([2 / 3] * 3)


def better_first(prompt) -> str:
    """A referee of pairs for whom the later letter is better; of two letters that are neighbours it takes the first."""
    first, second = re.findall(r"<<answer \d>>\n(.*)\n", prompt)
    return "1" if abs(ord(first) - ord(second)) == 1 or first > second else "2"


def test_pairs_are_asked_in_both_orders_and_a_score_is_the_share_won():
    models = Scripted(better_first)
    output = self_scores(models, *"ace", template="pairwise_v1", votes=2)
    assert output.score.tolist() == [0, 0.5, 1]
    assert len(models.asked) == 6
    assert output.components["position_bias"].tolist() == [0, 0, 0]
    output = self_scores(Scripted(better_first), *"ab", template="pairwise_v1")
    assert output.score.tolist() == [0.5, 0.5]
    assert output.components["position_bias"].tolist() == [1, 1]


def test_as_many_opponents_as_votes_at_least_and_equal_answers_draw():
    models = Scripted(better_first)
    output = self_scores(models, *"acegikmo", template="pairwise_v1", votes=2)
    assert 2 * 8 <= len(models.asked) <= 2 * 16
    assert output.score[0] == 0
    assert output.score[7] == 1
    models = Scripted(better_first)
    assert self_scores(models, *"aac", template="pairwise_v1").score.tolist() == [0.25, 0.25, 1]
    assert len(models.asked) == 2, "a against c in both orders, and a against a never"
    assert models.sampling["n"] == 2, "one draw for either a"


def leaning(prompt, answers) -> list[float]:
    """A referee that leans to the first by 6 nats, and to the later letter by 2 a letter."""
    first, second = re.findall(r"<<answer \d>>\n(.*)\n", prompt)
    assert answers == ["1", "2"]
    return [6.0 + 2.0 * (ord(first) - ord(second)), 0.0]


def test_how_likely_verdicts_are_stands_for_many_draws():
    models = Scripted(likely=leaning)
    output = self_scores(models, *"ab", template="pairwise_v1", verdict="logits", temperature=5)
    assert len(models.asked) == 2, "both orders, and nothing is written"

    def share(nats):
        return 1 / (1 + exp(-nats / 5))

    first, second = share(6 - 2), share(6 + 2)  # that the one standing first wins
    assert output.score.tolist() == pytest.approx([(first + 1 - second) / 2, (second + 1 - first) / 2])
    assert output.components["position_bias"].tolist() == [1, 1]
    assert output.components["parsed"].tolist() == [1, 1]
    sure = self_scores(Scripted(likely=leaning), *"ab", template="pairwise_v1", verdict="logits", temperature=0.1)
    assert sure.score.tolist() == pytest.approx([0.5, 0.5]), "both orders are certain, and say the contrary"


def test_how_likely_verdicts_are_is_asked_of_pairs_alone():
    with pytest.raises(RecipeError, match="compares two answers, and the template 'listwise_v1' asks for a list"):
        SelfReferee(SelfRefereeConfig(verdict="logits"))
    with pytest.raises(ValidationError, match="needs a temperature above 0"):
        SelfRefereeConfig(template="pairwise_v1", verdict="logits", temperature=0)


def test_a_question_that_comes_again_is_drawn_again():
    models = Scripted(lambda prompt: [said([1 + draw, 10]) for draw in range(models.sampling["n"])])
    output = self_scores(models, "a", "b", votes=8)
    assert len(models.asked) == 2, "two orders of two answers"
    counts = [output.info[0]["judge"].count(said([1 + draw, 10])) for draw in range(8)]
    assert sum(counts) == 8
    assert max(counts) == 2
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("keys", [{"overlap": 8}, {"votes": 0}, {"scale": [2, 1]}])
def test_mistakes_are_told(keys):
    with pytest.raises(ValidationError):
        SelfRefereeConfig(**keys)


def test_it_says_whom_it_asks_and_needs_a_run():
    source = SelfReferee(SelfRefereeConfig(model="judge"))
    assert source.models() == ("judge",)
    with pytest.raises(RecipeError, match="asks the models of a run"):
        source.score(rows(["a", "b"]), None)
