"""Unreduced terms and global counts become one loss."""

import pytest
import torch

from alignkit.core.types import Forward, Row, Term
from alignkit.data.collate import collate, select_units
from alignkit.dist.world import LocalWorld
from alignkit.loop.reduction import combine, common_metrics, emptied, global_counts

UNITS = [
    (Row([1, 2, 3], [False, True, True]), Row([1, 2], [False, True])),
    (Row([1, 2, 3, 4], [False, True, True, True]), Row([1, 2], [False, True])),
]


@pytest.fixture
def batch():
    return collate(UNITS)


def test_each_column_is_counted_over_the_chosen_units(batch) -> None:
    assert global_counts(batch, [0, 1], LocalWorld()) == {"mask": 7, "row": 4, "unit": 2}
    assert global_counts(batch, [1], LocalWorld()) == {"mask": 4, "row": 2, "unit": 1}
    assert global_counts(batch, [], LocalWorld()) == {"mask": 0, "row": 0, "unit": 0}


def test_sum_over_the_column_divided_by_the_global_count_times_the_weight(batch) -> None:
    counts = {"mask": 14.0, "row": 8.0, "unit": 4.0}
    terms = {
        "policy": Term(torch.tensor([1.0, 3.0]), over="unit"),
        "likelihood": Term(torch.full((4, 4), 2.0), weight=0.5),
    }
    loss, logged = combine(terms, batch, counts)
    assert float(loss) == (1 + 3) / 4 + 0.5 * (7 * 2) / 14
    assert float(logged["loss/policy"].sum) == 1.0
    assert float(logged["loss/likelihood"].sum) == 1.0  # before its weight
    assert float(logged["loss"].sum) == 1.5


def test_micro_batches_add_up_to_the_whole(batch) -> None:
    counts = global_counts(batch, [0, 1], LocalWorld())
    whole, _ = combine({"x": Term(batch.inputs["tokens"].double())}, batch, counts)
    parts = [select_units(batch, [i]) for i in range(2)] + [emptied(batch)]
    shares = [float(combine({"x": Term(part.inputs["tokens"].double())}, part, counts)[0]) for part in parts]
    assert shares == pytest.approx([(2 + 3 + 2) / 7, (2 + 3 + 4 + 2) / 7, 0])
    assert sum(shares) == pytest.approx(float(whole))


def test_infinity_outside_the_column_counts_nothing_and_has_no_gradient(batch) -> None:
    leaf = torch.ones(4, 4, requires_grad=True)
    value = leaf.masked_fill(~batch["mask"], float("inf"))
    loss, _ = combine({"x": Term(value)}, batch, {"mask": 7.0})
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert torch.equal(leaf.grad, batch["mask"] / 7)


def test_infinity_inside_the_column_is_not_hidden(batch) -> None:
    loss, _ = combine({"x": Term(torch.tensor([1.0, float("inf")]), over="unit")}, batch, {"unit": 2.0})
    assert float(loss) == float("inf")


def test_a_column_true_nowhere_gives_zero(batch) -> None:
    one = emptied(batch)
    loss, _ = combine({"x": Term(torch.ones(1), over="unit")}, one, {"unit": 0.0})
    assert float(loss) == 0.0


def test_mistakes_of_a_loss_are_named(batch) -> None:
    counts = {"mask": 7.0, "unit": 2.0}
    with pytest.raises(ValueError, match=r"term 'x' is over the column 'units', .* it has mask, unit"):
        combine({"x": Term(torch.ones(2), over="units")}, batch, counts)
    with pytest.raises(
        ValueError, match=r"term 'x' has shape \(\), its column 'unit' \(2,\): a loss returns unreduced"
    ):
        combine({"x": Term(torch.tensor(1.0), over="unit")}, batch, counts)
    with pytest.raises(ValueError, match="the loss returned no term"):
        combine({}, batch, counts)


def test_tokens_are_counted_without_padding_and_metrics_where_trained(batch) -> None:
    ones = torch.ones(4, 4)
    found = common_metrics(Forward(logps=ones, entropy=ones * 2, correct=batch["mask"].float()), batch)
    assert float(found["num_input_tokens"].sum) == 3 + 2 + 4 + 2
    assert (float(found["entropy"].sum), float(found["entropy"].count)) == (14, 7)
    assert float(found["mean_token_accuracy"].sum) == 7
    assert float(common_metrics(Forward(logps=ones), emptied(batch))["num_input_tokens"].sum) == 0
