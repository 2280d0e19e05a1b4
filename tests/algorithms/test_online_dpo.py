"""Online DPO: its pairs, its losses, and rounds of a step each."""

import pytest

from alignkit import testing
from alignkit.algorithms.online_dpo import OnlineDPO, OnlineDPOConfig
from tests.algorithms.test_self_rewarding import group


@pytest.mark.parametrize("count", [2, 4])
def test_its_pair_is_the_best_and_the_worst(count):
    algorithm = OnlineDPO(OnlineDPOConfig(name="online_dpo"))
    pairs = algorithm.build([group([0.0, 2.0, 1.0, -1.0][:count]), group([1.0] * count)])
    assert [[row.tokens[-1] - 2 for row in pair] for pair in pairs] == [[1, 0 if count == 2 else 3]]


def test_any_loss_of_pairs_will_do(tmp_path):
    """ipo starts at 1/(4β²), the logistic loss at log 2."""
    bench = testing.Bench("online_dpo", folder=tmp_path, config={"loss_type": "ipo", "beta": 0.5})
    records = testing.read_metrics(testing.train(bench.recipe("run", max_steps=2), quiet=True, report=False).folder)
    assert records[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    assert [("reward" in record) for record in records] == [True, True]  # a round is a step
