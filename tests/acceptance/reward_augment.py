"""Task R: DPO on reward-augmented pairs answers as well as it is asked to; plain DPO unlearns what was rejected."""

from functools import cached_property
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from string import digits
from typing import Any

from alignkit.testing import read_metrics
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method

NUM_WARM_UP, NUM_PAIRS, NUM_HELD_OUT, STEPS = 12_800, 2_000, 200, 120
GOALS, SAMPLES_A_LETTER = (2, 4, 6, 8), 40
DPO = {"name": "dpo", "beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
"""Of both runs. A difference alone, smoothed or not, makes all of these short answers unlikely in the end, under a goal
too: then the best goal stays behind plain DPO."""
OPERATION = {
    "name": "reward_augment",
    "placement": "user_prefix",
    "text": "{goal}",
    "separator": ";",
    "lowest": 0,
    "highest": 8,
    "round_to": 1,
}


class GoalTask:
    """Eight symbols after a letter; the score is how many of them are `1`. A goal stands before the letter."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seed = bench, bench.seed

    @cached_property
    def start(self) -> Path:
        """SFT from random weights, half of the prompts under a goal that says nothing of the answer."""
        model = toys.write_model(self.bench.folder / "goal-random", self.seed, [*digits, *toys.GOAL_LETTERS, ":", ";"])
        rows = toys.goal_rows(self.seed, "warm-up", NUM_WARM_UP)
        rows = [{**row, "prompt": f"{i % 9};{row['prompt']}"} if i % 2 else row for i, row in enumerate(rows)]
        data = toys.write_rows(self.bench.folder / "goal-warm-up.jsonl", rows)
        recipe = self._recipe(
            model, {"path": str(data)}, {"name": "sft"}, max_steps=600, batch_size=64, learning_rate=3e-3
        )
        return self.bench.train("goal-warm-up", recipe)

    def prefer(self, name: str, operations: list[dict[str, Any]]) -> Path:
        """DPO on 2,000 pairs; what it thinks of rejected answers is looked at under the goal that asks for them."""
        pairs, held_out = (
            toys.goal_pairs(self.seed, purpose, count)
            for purpose, count in (("pairs", NUM_PAIRS), ("held-out", NUM_HELD_OUT))
        )
        data = toys.write_rows(self.bench.folder / "goal-pairs.jsonl", pairs)
        if operations:
            held_out = [
                {
                    "prompt": f"{pair['score_rejected']};{pair['prompt']}",
                    "chosen": pair["chosen"],
                    "rejected": pair["rejected"],
                }
                for pair in held_out
            ]
        clean = toys.write_rows(self.bench.folder / f"{name}-held-out.jsonl", held_out)
        entry = {"path": str(data), "operations": operations}
        recipe = self._recipe(self.start, entry, DPO, max_steps=STEPS, batch_size=32, learning_rate=5e-4)
        return self.bench.train(name, {**recipe, "eval": {"data": [{"path": str(clean)}]}})

    def scores(self, run: Path, goal: int | None = None) -> list[int]:
        """How many `1` its samples have, under a goal or without one."""
        from alignkit.run import sample

        prompts = [f"{'' if goal is None else f'{goal};'}{letter}:" for letter in toys.GOAL_LETTERS]
        drawn = sample(run, prompts, num=SAMPLES_A_LETTER, temperature=1.0, max_tokens=12)
        return [one["completion"].count("1") for one in drawn]

    def _recipe(self, model: Path, data: dict[str, Any], algorithm: dict[str, Any], **train: Any) -> dict[str, Any]:
        usual = {"lr_scheduler": "constant", "max_length": 64, "save_steps": 0, "logging_steps": 50}
        return {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": [data],
            "algorithm": algorithm,
            "train": {**usual, **train},
        }


@method("reward_augmented_dpo")
def measure(bench: Bench) -> list[Figure]:
    task = GoalTask(bench)
    plain, augmented = task.prefer("goal-dpo", []), task.prefer("goal-augmented", [OPERATION])
    unasked, asked = task.scores(plain), {goal: task.scores(augmented, goal) for goal in GOALS}
    means = {goal: fmean(scores) for goal, scores in asked.items()}
    error = sqrt(sum(stdev(scores) ** 2 / len(scores) for scores in (unasked, asked[8])))
    return [
        Figure("R, dpo: mean score of samples", fmean(unasked), start=fmean(task.scores(task.start))),
        *(Figure(f"R, goal {goal}: mean score of samples", mean) for goal, mean in means.items()),
        Figure(
            "R: least rise of the mean score from goal to goal", min(b - a for a, b in pairwise(means.values())), 0.0
        ),
        Figure("R, goal 8: mean score − of dpo, in standard errors", (means[8] - fmean(unasked)) / error, -1.0),
        Figure("R, dpo: held-out log π(rejected) − its start", _moved(plain), at_most=0.0),
        Figure("R: held-out log π(rejected | its goal) − its start", _moved(augmented), 0.0),
    ]


def _moved(run: Path) -> float:
    records = [record["eval_logps/rejected"] for record in read_metrics(run) if "eval_loss" in record]
    return records[-1] - records[0]
