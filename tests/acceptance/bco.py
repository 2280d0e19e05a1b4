"""BCO on T1 with labels: both kinds of shift, and prompts that differ between good and bad answers."""

import json
import statistics
from pathlib import Path

from alignkit.algorithms.bco import BCO, BCOConfig
from alignkit.core import Completion, Group
from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.labelled import NUM_ROWS, LabelTask, labelled_row

RECENT_STEPS = 3
"""About the last hundred answers."""


@method("bco")
def measure(bench: Bench) -> list[Figure]:
    task = LabelTask(bench)
    start_upper, _ = task.shares(task.start)

    running = task.learn("bco", {"name": "bco", "beta": 0.1}, task.rows())
    upper, valid = task.shares(running)
    delta, rewards = shift(running)
    balancing = {"name": "bco", "beta": 0.1, "delta_mode": "class_balanced"}
    balanced = task.learn("bco-class-balanced", balancing, task.rows())
    balanced_upper, balanced_valid = task.shares(balanced)
    balanced_delta, balanced_rewards = shift(balanced)

    rows = shifted_rows(bench.seed)
    plain_upper, _ = task.shares(task.learn("bco-shifted", {"name": "bco", "beta": 0.1}, rows))
    matching = {"name": "bco", "beta": 0.1, "match_underlying_distribution": True}
    matched_upper, _ = task.shares(task.learn("bco-matched", matching, rows))
    recent, balanced_recent = (statistics.mean(x[-RECENT_STEPS:]) for x in (rewards, balanced_rewards))
    return [
        Figure("T1: P(U)", upper, at_least=0.85, start=start_upper),
        Figure("T1: valid", valid, at_least=0.8),
        Figure("T1: distance of δ from the mean of all rewards", abs(delta - statistics.mean(rewards)), at_most=1e-4),
        Figure("T1: δ − recent rewards", delta - recent, at_least=0.0),
        Figure("T1, class_balanced: P(U)", balanced_upper, at_least=0.85, start=start_upper),
        Figure("T1, class_balanced: valid", balanced_valid),
        Figure(
            "T1, class_balanced: distance of δ from recent rewards", abs(balanced_delta - balanced_recent), at_most=1
        ),
        Figure("T1, shifted prompts: weight of shared ÷ of foreign ones", weight_ratio(rows), at_least=1.5),
        Figure("T1, shifted prompts: P(U) of matched − of plain", matched_upper - plain_upper, at_least=-0.02),
    ]


def shift(run: Path) -> tuple[float, list[float]]:
    """The last δ, and the mean reward of every step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    return steps[-1]["delta"], [step["rewards/mean"] for step in steps]


def shifted_rows(seed: int) -> list[dict[str, object]]:
    """Good answers to prompts of the letters A to F, bad ones to prompts of C to H."""
    rng, rows = generator(seed, "style", "shifted"), []
    for i in range(NUM_ROWS):
        upper = i % 2 == 0
        prompt = "".join(rng.choices("abcdef" if upper else "cdefgh", k=4)) + ":"
        rows.append(labelled_row(prompt, upper, False))
    return rows


def weight_ratio(rows: list[dict[str, object]]) -> float:
    """Mean weight of bad answers to prompts that good answers have too, over that of those with a G or an H."""
    tokenizer = toys.tiny_tokenizer()
    groups = [
        Group(
            str(i),
            [],
            tokenizer(row["prompt"])["input_ids"],
            [Completion(str(row["completion"]), tokenizer(row["completion"])["input_ids"])],
            {"label": row["label"]},
        )
        for i, row in enumerate(rows)
    ]
    algorithm = BCO(BCOConfig(name="bco", match_underlying_distribution=True))
    algorithm.prepare(groups)
    weights: dict[bool, list[float]] = {True: [], False: []}
    for row, weight in zip(rows, algorithm.density_ratios(groups), strict=True):
        if not row["label"]:
            weights[not set("gh") & set(str(row["prompt"]))].append(weight)
    return statistics.mean(weights[True]) / statistics.mean(weights[False])
