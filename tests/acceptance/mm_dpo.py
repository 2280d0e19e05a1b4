"""MM-DPO on T2's lists, ranked by somebody who confuses answers that are nearly as good, against plain DPO."""

from collections.abc import Sequence
from typing import Any

from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.count import CountTask

PAIRS, STEPS, RATE = 32, 150, 2e-4
ROW = {"name": "mm_dpo", "beta": 0.1, "k": 0.3}
"""k so that a gap of one symbol is a small margin and one of four a large one."""


@method("mm_dpo")
def measure(bench: Bench) -> list[Figure]:
    task = CountTask(bench)
    ours, held_out = ([toys.counted(row) for row in rows] for rows in task.lists)
    noisy = toys.misranked(bench.seed, ours)
    settings = {"max_steps": STEPS, "batch_size": PAIRS, "learning_rate": RATE}
    # w = 0 is dpo to the last bit, which tests hold, and counts pairs by their margins too
    plain, scaled = (task.train(f"mm-dpo-w-{w:g}", {**ROW, "w": w}, noisy, held_out, **settings) for w in (0.0, 2.0))
    accuracy, ratio = ([number(bench.evaluation(run)) for run in (plain, scaled)] for number in (_accuracy, _ratio))
    return [
        Figure("T2, share of pairs ranked wrongly", _turned(noisy), at_least=0.27, at_most=0.33),
        Figure("T2, dpo: held-out accuracy on true ranks", accuracy[0]),
        Figure("T2, w = 2: held-out accuracy on true ranks", accuracy[1]),
        Figure("T2: accuracy of w = 2 − of dpo", accuracy[1] - accuracy[0], at_least=0.0),
        Figure("T2, dpo: mean margin of large gaps ÷ of small ones", ratio[0]),
        Figure("T2, w = 2: mean margin of large gaps ÷ of small ones", ratio[1]),
        Figure("T2: this ratio of w = 2 − of dpo", ratio[1] - ratio[0], at_least=0.0),
    ]


def _accuracy(evaluation: dict[str, float]) -> float:
    return evaluation["eval_rewards/accuracies"]


def _ratio(evaluation: dict[str, float]) -> float:
    return evaluation["eval_mm_dpo/margin_large"] / evaluation["eval_mm_dpo/margin_small"]


def _turned(rows: Sequence[dict[str, Any]]) -> float:
    """Share of the pairs with different scores whose ranks say the opposite."""
    gaps = [
        (row["scores"][i] - row["scores"][j]) * (row["ranks"][j] - row["ranks"][i])
        for row in rows
        for i in range(len(row["scores"]))
        for j in range(i)
        if row["scores"][i] != row["scores"][j]
    ]
    return sum(gap < 0 for gap in gaps) / len(gaps)
