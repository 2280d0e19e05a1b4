"""Units → tensors → micro-batches: hand-made units, hand-written tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.core.types import Row
from alignkit.data.collate import collate, cut, select_units, unit_lengths


def row(prompt: int, completion: int, **scalar: float) -> Row:
    """A row of `prompt` untrained and `completion` trained tokens, numbered from 1."""
    length = prompt + completion
    return Row(
        tokens=list(range(1, length + 1)), trained=[False] * prompt + [True] * completion, scalar=scalar, group="g"
    )


def test_rows_are_padded_on_the_right_and_units_stay_adjacent():
    batch = collate([(row(1, 2), row(1, 1)), (row(2, 2), row(1, 0))])
    assert batch.k == 2
    assert batch.inputs["tokens"].tolist() == [[1, 2, 3, 0], [1, 2, 0, 0], [1, 2, 3, 4], [1, 0, 0, 0]]
    assert batch.inputs["attention"].sum(-1).tolist() == [3, 2, 4, 1]
    assert batch["mask"].int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch["row"].tolist() == [True] * 4
    assert batch["unit"].tolist() == [True] * 2
    assert unit_lengths(batch) == [3, 4]


def test_facts_become_columns_and_are_zero_where_a_row_has_none():
    first, second = row(1, 1, weight=2.0), row(1, 2)
    second.token["place"] = [0.5, 1.5, 2.5]
    second.inputs["head"] = 3.0
    batch = collate([(first,), (second,)])
    assert batch["weight"].tolist() == [2.0, 0.0]
    assert batch["place"].tolist() == [[0.0, 0.0, 0.0], [0.5, 1.5, 2.5]]
    assert batch.inputs["head"].tolist() == [0.0, 3.0]


def test_no_units_make_one_that_nothing_counts():
    blank = Row(tokens=[0, 0], trained=[False, False], scalar={"weight": 0.0}, token={"place": [0.0, 0.0]})
    batch = collate([], (blank, blank))
    assert (batch.num_rows, batch.num_units, batch.k) == (2, 1, 2)
    for name in ("mask", "row", "unit", "weight", "place"):
        assert not batch[name].any()


def test_facts_only_another_rank_has_are_zero_here():
    blank = Row(tokens=[0, 0], trained=[False, False], scalar={"weight": 0.0})
    batch = collate([(row(1, 1),)], (blank,))
    assert batch["weight"].tolist() == [0.0]
    assert batch["row"].tolist() == [True]


def test_units_of_different_size_are_refused():
    with pytest.raises(ValueError, match=r"got sizes \[1, 2\]"):
        collate([(row(1, 1),), (row(1, 1), row(1, 1))])


def test_trained_first_token_is_refused():
    with pytest.raises(ValueError, match="row of group 'g': its first token"):
        collate([(row(0, 2),)])


def test_selected_units_are_cut_to_their_own_width():
    batch = collate([(row(1, 6), row(1, 1)), (row(1, 2), row(1, 1)), (row(1, 1), row(1, 3))])
    batch = batch.with_columns({"of_unit": torch.tensor([10.0, 11.0, 12.0])})
    picked = select_units(batch, [2, 1])
    assert picked.inputs["tokens"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4], [1, 2, 3, 0], [1, 2, 0, 0]]
    assert picked["mask"].shape == (4, 4)
    assert picked["of_unit"].tolist() == [12.0, 11.0]


def test_batch_of_one_unit_keeps_two_columns():
    """A single token would leave nothing to predict and no shape to work on."""
    assert select_units(collate([(row(1, 0),), (row(1, 3),)]), [0])["mask"].shape == (1, 2)


def test_micro_batches_fill_the_budget_longest_first():
    # k = 2: a unit of 4 costs 8 tokens alone; two units of 3 cost 12
    assert cut([3, 4, 3], k=2, max_tokens=12) == [[1], [0, 2]]
    assert cut([3, 4, 3], k=2, max_tokens=24) == [[1, 0, 2]]
    assert cut([3, 4, 3], k=2, max_tokens=24, max_units=2) == [[1, 0], [2]]
    assert cut([], k=2, max_tokens=1) == []


def test_unit_larger_than_the_budget_goes_alone():
    assert cut([9, 1, 1], k=1, max_tokens=4) == [[0], [1, 2]]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 3), st.integers(1, 100), st.none() | st.integers(1, 4))
def test_cut_keeps_every_unit_once_and_every_budget(lengths, k, max_tokens, max_units):
    micros = cut(lengths, k, max_tokens, max_units)
    assert sorted(i for micro in micros for i in micro) == list(range(len(lengths)))
    for micro in micros:
        padded = max(lengths[i] for i in micro) * k * len(micro)
        assert padded <= max_tokens or len(micro) == 1
        assert max_units is None or len(micro) <= max_units
