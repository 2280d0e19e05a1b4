"""Labels of single answers: what is read of a row, and how both classes are compared."""

import pytest
import torch

from alignkit.core import Batch, Completion, DataError, Group
from alignkit.core.labels import contrast, is_desirable, label_metrics, labelled
from alignkit.dist.world import LocalWorld


def group(label: object, completions: int = 1) -> Group:
    return Group("r7", [], [3, 4], [Completion("", [5, 6])] * completions, {"label": label})


def batch(labels: list[float], row: list[bool]) -> Batch:
    return Batch(
        inputs={},
        columns={
            "label": torch.tensor(labels),
            "row": torch.tensor(row),
            "mask": torch.ones(len(labels), 2, dtype=torch.bool),
        },
        k=1,
    )


@pytest.mark.parametrize(("label", "expected"), [(True, True), (False, False), (1, True), (0.0, False)])
def test_labels(label, expected):
    assert is_desirable(group(label)) is expected
    row = labelled(group(label))
    assert (row.tokens, row.trained) == ([3, 4, 5, 6], [False, False, True, True])
    assert row.scalar == {"label": float(expected)}


@pytest.mark.parametrize("label", ["false", None, 0.5, [True]])
def test_other_labels_are_refused(label):
    with pytest.raises(DataError, match=r"'r7': label is .*expected true or false"):
        labelled(group(label))


def test_one_label_of_several_answers_is_refused():
    with pytest.raises(DataError, match="'r7' has 2 completions and one label"):
        labelled(group(True, completions=2))


def test_contrast_is_the_difference_of_class_means():
    given = batch([1.0, 1.0, 0.0, 1.0, 1.0], [True, True, True, True, False])
    weights = contrast(given, LocalWorld())
    torch.testing.assert_close(weights, torch.tensor([4 / 3, 4 / 3, -4.0, 4 / 3, 0.0]))
    rewards = torch.tensor([3.0, 6.0, -2.0, 0.0, 99.0])
    logged = label_metrics(given.with_columns({"contrast": weights}), rewards, torch.zeros(5), 0.5)
    found = {name: float(metric.sum) / float(metric.count) for name, metric in logged.items()}
    assert found == pytest.approx(
        {
            "rewards/chosen": 1.5,
            "rewards/rejected": -1.0,
            "rewards/margins": 2.5,
            "logps/chosen": 3.0,
            "logps/rejected": -2.0,
            "completions/mean_length": 2.0,
        }
    )


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_contrast(label):
    given = batch([label, label], [True, True])
    weights = contrast(given, LocalWorld())
    assert weights.tolist() == [0.0, 0.0]
    logged = label_metrics(given.with_columns({"contrast": weights}), torch.ones(2), torch.zeros(2), 0.5)
    assert float(logged["rewards/margins"].count) == 0
