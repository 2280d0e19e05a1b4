"""Labelled answers: pairs taken apart, and the foreign answer that every prompt of a round is scored with."""

from collections import Counter

import pytest

from alignkit.core import Completion, Group
from alignkit.data.groups import label_pairs
from alignkit.data.stream import Stream, with_partners

NUM_GROUPS, ROUND = 7, 3


def group(name: int, prompt: list[int], answer: list[int], trained: list[bool] | None = None) -> Group:
    return Group(f"g{name}", [], prompt, [Completion(f"answer {name}", answer, trained)])


def stream(rank: int = 0, size: int = 1, answers: int = NUM_GROUPS) -> Stream:
    """Prompts all differ; answers repeat where there are fewer of them."""
    source = [group(i, [7, 30 + i], [10 + i % answers, 2]) for i in range(NUM_GROUPS)]
    return Stream(
        [source[:4], source[4:]], [1.0, 1.0], seed=3, groups_per_round=ROUND, rank=rank, size=size, partners=9
    )


def partner_tokens(groups: list[Group]) -> list[list[int] | None]:
    return [one.partner and one.partner.tokens for one in groups]


def test_a_pair_becomes_a_good_and_a_bad_answer():
    pair = Group("p", [], [7], [Completion("", [1], reward=1.0), Completion("", [2], reward=0.0)], {"source": "s"})
    good, bad = label_pairs([pair])
    assert (good.id, good.completions[0].tokens, good.fields) == ("p/chosen", [1], {"source": "s", "label": True})
    assert (bad.id, bad.completions[0].tokens, bad.fields) == ("p/rejected", [2], {"source": "s", "label": False})


def test_every_prompt_meets_the_answer_before_it():
    groups = [group(0, [7], [10]), group(1, [8], [11]), group(2, [9], [12])]
    found = with_partners(groups, 9)
    assert partner_tokens(found) == [[12], [10], [11]]
    assert [one.completions for one in found] == [one.completions for one in groups]
    assert partner_tokens(groups) == [None] * 3, "the data stays as it was"


def test_no_prompt_meets_an_answer_of_its_own():
    both_to_one = [group(0, [7], [10]), group(1, [7], [11]), group(2, [9], [12])]
    assert partner_tokens(with_partners(both_to_one, 9)) == [[12], None, [11]]
    one_to_both = [group(0, [7], [10]), group(1, [8], [10]), group(2, [9], [12])]
    assert partner_tokens(with_partners(one_to_both, 9)) == [[12], None, [10]]
    further_on = [
        group(0, [7], [10]),
        group(1, [8], [11]),
        group(2, [9], [10]),
        group(3, [7], [13]),
        group(4, [6], [14]),
    ]
    assert partner_tokens(with_partners(further_on, 9)) == [[14], [10], [11], None, [13]], "g0 has the answer of g2 too"
    assert partner_tokens(with_partners(further_on[:1], 9)) == [None]
    assert with_partners([], 9) == []


def test_a_foreign_answer_loses_the_end_that_does_not_fit():
    long = group(1, [8], [11, 12, 13, 2], [False, True, True, True])
    first, second = with_partners([group(0, [7, 8], [10, 2]), long], 5)
    assert first.partner == Completion("answer 1", [11, 12, 13], [False, True, True])
    assert second.partner is not None
    assert second.partner.tokens == [10, 2]
    assert long.completions[0].tokens == [11, 12, 13, 2]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_partners_rotate_over_all_ranks(size):
    whole, parts = stream(), [stream(rank, size) for rank in range(size)]
    for _ in range(2 * whole.rounds_per_epoch):
        taken = whole.take()
        answers = [one.completions[0].tokens for one in taken]
        expected = [*answers[-1:], *answers[:-1]] if len(taken) > 1 else [None]
        assert partner_tokens(taken) == expected
        assert [part.take() for part in parts] == [taken[rank::size] for rank in range(size)]


@pytest.mark.parametrize("done", range(7))
def test_a_resumed_stream_deals_the_same_partners(done):
    before = stream()
    for _ in range(done):
        before.take()
    after = stream()
    after.load_state_dict(before.state_dict())
    assert [after.take() for _ in range(5)] == [before.take() for _ in range(5)]


@pytest.mark.parametrize("answers", [NUM_GROUPS, 3])
def test_a_preview_knows_every_partner_of_the_rounds(answers):
    def met(found: list[Group]) -> Counter[tuple[str, tuple[int, ...] | None]]:
        return Counter((one.id, one.partner and tuple(one.partner.tokens)) for one in found)

    for rounds in range(8):
        fresh = stream(answers=answers)
        taken = met([one for _ in range(rounds) for one in fresh.take()])
        seen = met(fresh.preview(rounds))
        assert seen.keys() == taken.keys()
        if answers == NUM_GROUPS:
            assert set(seen.values()) <= {1}, "nothing is scored twice"
