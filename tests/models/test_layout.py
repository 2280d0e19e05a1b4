"""Rows ↔ streams: worked by hand, and for any batch by rebuilding every row from what the stream says."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.core.types import Batch, Row
from alignkit.data.collate import BLANK, collate, cut, select_units, unit_lengths
from alignkit.models.layout import Inputs, Segments, cut_batch, lay_out

CPU = torch.device("cpu")
STREAMS = ("packed", "prefix_shared")


def row(prompt: list[int], answer: list[int], trained: str = "") -> Row:
    """`trained` marks the answer's tokens with 1 and 0; all of them without it."""
    marks = [mark == "1" for mark in trained] if trained else [True] * len(answer)
    return Row([*prompt, *answer], [*[False] * len(prompt), *marks])


def rows(*rows: Row) -> Batch:
    return collate([(row,) for row in rows])


def told(inputs: Inputs) -> dict[str, list[int] | tuple[int, ...]]:
    """All that a stream says."""
    assert inputs.segments is not None
    assert inputs.positions is not None
    return {
        "tokens": inputs.tokens[0].tolist(),
        "positions": inputs.positions[0].tolist(),
        "lengths": inputs.segments.lengths,
        "branches": inputs.segments.branches,
        "longest": inputs.segments.longest,
        "scored": inputs.scored.tolist(),
    }


PAIR = (row([1, 2, 3], [4, 5, 6]), row([1, 2, 3], [7, 8]))


def test_padded_rows_are_fed_without_the_last_column_which_predicts_nothing() -> None:
    batch = rows(*PAIR)
    inputs = lay_out(batch, "padded", CPU)
    assert inputs.positions is None
    assert inputs.segments is None
    assert torch.equal(inputs.tokens, batch.inputs["tokens"][:, :-1])
    assert inputs.scored.tolist() == [2, 3, 4, 5 + 2, 5 + 3]


def test_packed_rows_stand_one_after_the_other_without_their_last_token() -> None:
    assert told(lay_out(rows(*PAIR), "packed", CPU)) == {
        "tokens": [1, 2, 3, 4, 5, 1, 2, 3, 7],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3],
        "lengths": (5, 4),
        "branches": (),
        "longest": 5,
        "scored": [2, 3, 4, 7, 8],
    }


def test_a_shared_prompt_stands_once_and_its_last_token_scores_both_branches() -> None:
    assert told(lay_out(rows(*PAIR), "prefix_shared", CPU)) == {
        "tokens": [1, 2, 3, 4, 5, 7],
        "positions": [0, 1, 2, 3, 4, 3],
        "lengths": (3, 2, 1),
        "branches": (2,),
        "longest": 5,
        "scored": [2, 3, 4, 2, 5],
    }


def test_prompts_first_then_their_branches_then_rows_that_share_nothing() -> None:
    batch = rows(row([1], [2, 3]), row([5, 6], [7]), row([1], [4, 9]), row([8], [2, 2]), row([8], [4, 4]))
    assert told(lay_out(batch, "prefix_shared", CPU)) == {
        "tokens": [1, 8, 2, 4, 2, 4, 5, 6],
        "positions": [0, 0, 1, 1, 1, 1, 0, 1],
        "lengths": (1, 1, 1, 1, 1, 1, 2),
        "branches": (2, 2),
        "longest": 2,
        "scored": [0, 2, 7, 0, 3, 1, 4, 1, 5],
    }


def test_answers_that_begin_alike_share_their_beginning_too() -> None:
    batch = rows(row([1, 2], [3, 4, 5, 6]), row([1, 2], [3, 4, 9, 9]))
    assert told(lay_out(batch, "prefix_shared", CPU)) == {
        "tokens": [1, 2, 3, 4, 5, 9],
        "positions": [0, 1, 2, 3, 4, 4],
        "lengths": (4, 1, 1),
        "branches": (2,),
        "longest": 5,
        "scored": [1, 2, 3, 4, 1, 2, 3, 5],
    }


def test_an_answer_that_is_the_beginning_of_another_adds_nothing() -> None:
    batch = rows(row([1, 2], [3, 4]), row([1, 2], [3, 4, 5, 6]))
    assert told(lay_out(batch, "prefix_shared", CPU)) == {
        "tokens": [1, 2, 3, 4, 5],
        "positions": [0, 1, 2, 3, 4],
        "lengths": (3, 0, 2),
        "branches": (2,),
        "longest": 5,
        "scored": [1, 2, 1, 2, 3, 4],
    }


def test_answers_of_one_token_are_all_scored_by_the_prompt() -> None:
    batch = rows(*(row([1, 2], [answer]) for answer in (3, 4, 5)))
    assert told(lay_out(batch, "prefix_shared", CPU)) == {
        "tokens": [1, 2],
        "positions": [0, 1],
        "lengths": (2,),
        "branches": (),
        "longest": 2,
        "scored": [1, 1, 1],
    }


def test_equal_rows_stand_once() -> None:
    assert told(lay_out(rows(PAIR[0], PAIR[0]), "prefix_shared", CPU)) == {
        "tokens": [1, 2, 3, 4, 5],
        "positions": [0, 1, 2, 3, 4],
        "lengths": (5,),
        "branches": (),
        "longest": 5,
        "scored": [2, 3, 4, 2, 3, 4],
    }


def test_three_rows_on_one_prompt() -> None:
    batch = collate([(row([1, 2], [3, 4, 5]), row([1, 2], [6, 7]), row([1, 2], [8]))])
    assert told(lay_out(batch, "prefix_shared", CPU)) == {
        "tokens": [1, 2, 3, 4, 6],
        "positions": [0, 1, 2, 3, 2],
        "lengths": (2, 2, 1, 0),
        "branches": (3,),
        "longest": 4,
        "scored": [1, 2, 3, 1, 4, 1],
    }


@pytest.mark.parametrize("layout", STREAMS)
def test_rows_without_a_trained_token_are_not_fed(layout) -> None:
    batch = rows(row([1, 2, 3], []), PAIR[0], row([1, 2, 3], [9, 9], "00"))
    assert told(lay_out(batch, layout, CPU)) == told(lay_out(rows(PAIR[0]), layout, CPU))


@pytest.mark.parametrize("layout", STREAMS)
@pytest.mark.parametrize("batch", [rows(row([1, 2, 3], [])), rows(), collate([])], ids=["untrained", "no row", "blank"])
def test_where_nothing_is_trained_one_token_is_still_fed(layout, batch) -> None:
    """Other processes wait for gradients of every weight."""
    said = told(lay_out(batch, layout, CPU))
    assert said["lengths"] == (1,)
    assert said["scored"] == []
    assert said["tokens"] == batch.inputs["tokens"][0, :1].tolist()
    assert lay_out(batch, "padded", CPU).scored.tolist() == []


@pytest.mark.parametrize(("answer", "tokens"), [(1, 3), (7, 1 + 2 * 7), (8, 2 * 9), (40, 2 * 41)])
def test_a_prompt_is_shared_where_that_is_worth_its_price(answer, tokens) -> None:
    """One token is worth saving of 16, and not of 18."""
    batch = rows(*(row([1], [n, *[5] * answer]) for n in (2, 3)))
    fed = lay_out(batch, "prefix_shared", CPU).tokens.shape[1]
    assert fed == tokens


def test_a_mask_with_holes() -> None:
    """The prompt ends at the first trained token; what lies between trained tokens is fed and not scored."""
    batch = rows(row([1, 2], [3, 4, 5, 6, 7], "10010"), row([1, 2], [3, 8, 9], "101"))
    assert told(lay_out(batch, "prefix_shared", CPU)) == {
        "tokens": [1, 2, 3, 4, 5, 8],
        "positions": [0, 1, 2, 3, 4, 3],
        "lengths": (3, 2, 1),
        "branches": (2,),
        "longest": 5,
        "scored": [1, 4, 1, 5],
    }
    assert told(lay_out(batch, "packed", CPU))["scored"] == [1, 4, 6, 8]


def test_a_prompt_that_is_the_beginning_of_another_is_another_prompt() -> None:
    batch = rows(row([1, 2], [3, 4]), row([1, 2, 3], [4, 5]))
    said = told(lay_out(batch, "prefix_shared", CPU))
    assert said["lengths"] == (3, 4)
    assert said["branches"] == ()


@pytest.mark.parametrize("window", [None, 1, 2, 3, 9])
def test_who_sees_whom(window) -> None:
    """Prompt 0 1, branches 2 3 and 4, a row of its own 5 6."""
    segments = Segments((2, 2, 1, 2), (2,), longest=4, device=CPU)
    seen = segments.whole_mask(window)
    assert seen.shape == (7, 7)
    position = [0, 1, 2, 3, 2, 0, 1]
    visible = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 4], 5: [5], 6: [5, 6]}
    for token, other in product(range(7), repeat=2):
        near = window is None or position[token] - position[other] < window
        assert bool(seen[token, other]) == (other in visible[token] and near)


def test_what_a_segment_sees_of_its_prompt_and_of_itself() -> None:
    """Prompts 0 and 1 2, branches 3, none, 4 and 5, a row 6 7."""
    segments = Segments((1, 2, 1, 0, 1, 1, 2), (2, 2), longest=3, device=CPU)
    assert segments.num_prompts == 2
    assert segments.readers == ((0, 1, 0, 0), (1, 3, 0, 0), (3, 4, 0, 1), (4, 5, 1, 3), (5, 6, 1, 3), (6, 8, 0, 0))
    assert segments.own_mask(2, 0, None).int().tolist() == [[1, 0], [1, 1]]
    assert segments.own_mask(2, 2, None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert segments.own_mask(2, 2, 2).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_offsets_of_every_part() -> None:
    """Prompts of 2 and 1, branches of 3, 0 and 1, 2, a row of 4."""
    segments = Segments((2, 1, 3, 0, 1, 2, 4), (2, 2), longest=5, device=CPU)
    assert segments.causal == ((0, 2), (2, 3), (3, 6), (6, 7), (7, 9), (9, 13))
    assert segments.crossing == ((3, 6, 0, 2), (6, 9, 2, 3))
    own, branches, prompts = segments.offsets
    assert own.tolist() == [0, 2, 3, 6, 7, 9, 13]
    assert branches.tolist() == [0, 3, 6]
    assert prompts.tolist() == [0, 2, 3]
    assert {x.dtype for x in (own, branches, prompts)} == {torch.int32}


@st.composite
def batches(draw: st.DrawFn, shortest: int = 1) -> Batch:
    """Few tokens and few prompts, so that rows share beginnings of every kind."""
    token = st.integers(1, 2)
    prompts = draw(st.lists(st.lists(token, min_size=shortest, max_size=3), min_size=1, max_size=3))
    k = draw(st.integers(1, 3))
    units = []
    for _ in range(draw(st.integers(1, 4))):
        unit = []
        for _ in range(k):
            prompt = draw(st.sampled_from(prompts))
            answer = draw(st.lists(token, max_size=5))
            marks = draw(st.lists(st.booleans(), min_size=len(answer), max_size=len(answer)))
            unit.append(Row([*prompt, *answer], [*[False] * len(prompt), *marks]))
        units.append(tuple(unit))
    return collate(units)


def states(inputs: Inputs) -> list[frozenset[tuple[int, int]]]:
    """What a model knows at each token of a stream: which tokens it sees, and at which positions."""
    segments = inputs.segments
    assert segments is not None
    assert inputs.positions is not None
    tokens, positions = inputs.tokens[0].tolist(), inputs.positions[0].tolist()
    known = []
    for sees in segments.whole_mask(None):
        places = sees.nonzero().flatten().tolist()
        known.append(frozenset((positions[i], tokens[i]) for i in places))
        assert len(known[-1]) == len(places)  # no position twice
    assert len(known) == len(tokens)
    return known


@settings(max_examples=60, deadline=None)
@given(batches())
def test_every_scored_state_has_seen_its_row_and_nothing_else(batch) -> None:
    tokens, mask = batch.inputs["tokens"], batch["mask"]
    expected = [frozenset(enumerate(tokens[n, :t].tolist())) for n, t in mask.nonzero().tolist()]
    lengths = {}
    for layout in STREAMS:
        inputs = lay_out(batch, layout, CPU)
        known = states(inputs)
        assert [known[i] for i in inputs.scored.tolist()] == expected
        assert inputs.segments.longest == max(map(len, known))
        assert sum(inputs.segments.lengths) == inputs.tokens.shape[1]
        lengths[layout] = inputs.tokens.shape[1]
    assert lengths["prefix_shared"] <= lengths["packed"]


@settings(max_examples=40, deadline=None)
@given(batches())
def test_all_ways_to_say_who_sees_whom_agree(batch) -> None:
    segments = lay_out(batch, "prefix_shared", CPU).segments
    size = sum(segments.lengths)
    by_reader, parts = (torch.zeros(size, size, dtype=torch.bool) for _ in range(2))
    for a, b, c, d in segments.readers:
        by_reader[a:b, [*range(c, d), *range(a, b)]] = segments.own_mask(b - a, d - c, None)
    for a, b in segments.causal:
        parts[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
    for a, b, c, d in segments.crossing:
        assert not parts[a:b, c:d].any()
        parts[a:b, c:d] = True
    assert torch.equal(by_reader, segments.whole_mask(None))
    assert torch.equal(by_reader, parts)


@settings(max_examples=60, deadline=None)
@given(batches(shortest=2), st.integers(1, 30), st.none() | st.integers(1, 3), st.randoms())
def test_micro_batches_hold_every_unit_once_and_keep_the_budget(batch, budget, most, random) -> None:
    index = random.sample(range(batch.num_units), random.randint(1, batch.num_units))
    for layout in ("padded", *STREAMS):
        micros = cut_batch(batch, index, layout, budget, most)
        assert sorted(i for micro in micros for i in micro) == sorted(index)
        for micro in micros:
            assert most is None or len(micro) <= most
            fed = lay_out(select_units(batch, micro), layout, CPU).tokens.numel()
            assert len(micro) == 1 or fed <= budget


def test_padded_micro_batches_are_cut_by_padded_tokens() -> None:
    batch = rows(*(row([1], [2] * n) for n in (3, 9, 5, 1)))
    assert cut_batch(batch, [3, 1, 0, 2], "padded", 12) == [[1], [2, 0], [3]]
    lengths = unit_lengths(batch)
    assert cut_batch(batch, range(4), "padded", 12) == cut(lengths, 1, 12)
    assert cut_batch(batch, range(4), "padded", 1000, 3) == cut(lengths, 1, 1000, 3)


def test_packed_micro_batches_are_cut_by_the_tokens_that_are_fed_largest_first() -> None:
    batch = rows(*(row([1], [2] * n) for n in (3, 9, 5, 1)))
    assert cut_batch(batch, range(4), "packed", 9) == [[1], [2, 0, 3]]
    assert cut_batch(batch, range(4), "packed", 8) == [[1], [2, 0], [3]]
    assert cut_batch(batch, [0, 3, 2], "packed", 1000) == [[2, 0, 3]]
    assert cut_batch(batch, range(4), "packed", 1000, 3) == [[1, 2, 0], [3]]


def test_a_prompt_costs_once_a_micro_batch() -> None:
    """Ten tokens of prompt, four answers that feed three each: 22 together, 13 each."""
    batch = rows(*(row([1] * 10, [n, n, n, n]) for n in (2, 3, 4, 5)))
    assert cut_batch(batch, range(4), "prefix_shared", 22) == [[0, 1, 2, 3]]
    assert cut_batch(batch, range(4), "packed", 22) == [[0], [1], [2], [3]]


def test_a_group_over_the_budget_is_split_and_its_prompt_repeated() -> None:
    batch = rows(*(row([1] * 10, [n, n, n, n]) for n in range(2, 8)))
    micros = cut_batch(batch, range(6), "prefix_shared", 18)
    assert micros == [[0, 1], [2, 3], [4, 5]]
    for micro in micros:
        assert lay_out(select_units(batch, micro), "prefix_shared", CPU).segments.lengths == (10, 3, 3)


def test_a_repeated_prompt_counts_in_the_micro_batch_that_repeats_it() -> None:
    batch = rows(*(row([1] * 10, [n, n, n, n]) for n in (2, 3, 4)), row([9] * 8, [2, 2]))
    assert cut_batch(batch, range(4), "prefix_shared", 18) == [[0, 1], [2], [3]]
    assert cut_batch(batch, range(4), "prefix_shared", 22) == [[0, 1, 2], [3]]


def test_units_that_share_a_prompt_stand_together() -> None:
    one, other = [1] * 6, [2] * 6
    batch = rows(*(row(prompt, [n, n, n]) for n, prompt in enumerate((one, other, one, other), start=3)))
    assert cut_batch(batch, range(4), "prefix_shared", 10) == [[0, 2], [1, 3]]
    assert cut_batch(batch, [3, 2, 1, 0], "prefix_shared", 1000, 3) == [[2, 0, 3], [1]]


def test_a_unit_over_the_budget_goes_alone_and_is_never_split() -> None:
    long = (row([1] * 30, [2, 3]), row([1] * 30, [4, 5]))
    batch = collate([PAIR, long, PAIR])
    for layout in ("padded", *STREAMS):
        assert [1] in cut_batch(batch, range(3), layout, 12)


def test_a_unit_without_trained_tokens_finds_a_place() -> None:
    batch = rows(row([1, 2], []), PAIR[0], row([1, 2, 3], [9, 9], "00"))
    for layout in STREAMS:
        assert cut_batch(batch, range(3), layout, 5) == [[1, 0, 2]]
        assert cut_batch(batch, [0], layout, 5) == [[0]]
    assert cut_batch(batch, [], "prefix_shared", 5) == []


def test_the_blank_unit_is_cut_like_any_other() -> None:
    assert cut_batch(collate([BLANK]), [0], "prefix_shared", 5) == [[0]]
