"""Task T2 on a bench: the warmed-up start model, lists of its own samples with their rewards, and runs on them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from string import digits
from typing import Any

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench

NUM_WARM_UP, LIST_LENGTH, NUM_LISTS, NUM_HELD_OUT = 6_400, 4, 512, 80
SAMPLES_A_DIGIT = 100


class CountTask:
    """Answer a digit with eight of the same."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seed = bench, bench.seed

    @cached_property
    def start(self) -> Path:
        """SFT from random weights on answers that hold the digit too seldom: 500 steps of 64."""
        model = toys.write_model(self.bench.folder / "count-random", self.seed, digits)
        rows = toys.count_warm_up(self.seed, NUM_WARM_UP)
        data = toys.write_rows(self.bench.folder / "count-warm-up.jsonl", rows)
        recipe = self._recipe(model, data, {"name": "sft"}, max_steps=500, batch_size=64, learning_rate=3e-3)
        return self.bench.train("count-warm-up", recipe)

    @cached_property
    def lists(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Ranked rows for training and held-out ones: four samples of the start model each, scored by the task."""
        wanted = NUM_LISTS + NUM_HELD_OUT
        samples = self.samples(self.start, LIST_LENGTH * -(-wanted // len(digits)))
        rows = []
        for digit, answers in samples.items():
            for first in range(0, len(answers), LIST_LENGTH):
                some = answers[first : first + LIST_LENGTH]
                scores = [toys.count_reward(digit, answer) for answer in some]
                rows.append({"prompt": digit, "completions": some, "scores": scores})
        generator(self.seed, "count", "lists").shuffle(rows)
        return rows[NUM_HELD_OUT:wanted], rows[:NUM_HELD_OUT]

    def shuffled_lists(self) -> list[dict[str, Any]]:
        """The training rows with the scores of others: the same numbers, which say nothing any more."""
        rows, _ = self.lists
        order = list(range(len(rows)))
        generator(self.seed, "count", "shuffled scores").shuffle(order)
        return [{**row, "scores": rows[i]["scores"]} for row, i in zip(rows, order, strict=True)]

    def train(
        self,
        name: str,
        algorithm: dict[str, Any],
        rows: Sequence[dict[str, Any]] | None = None,
        held_out: Sequence[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> Path:
        """150 steps of 16 lists at 1e-3 unless `settings` say otherwise, evaluated on held-out lists."""
        ours, theirs = self.lists
        data = toys.write_rows(self.bench.folder / f"{name}.jsonl", ours if rows is None else rows)
        clean = toys.write_rows(self.bench.folder / f"{name}-held-out.jsonl", theirs if held_out is None else held_out)
        usual = {"max_steps": 150, "batch_size": 16, "learning_rate": 1e-3}
        recipe = self._recipe(self.start, data, algorithm, **{**usual, **settings})
        return self.bench.train(name, {**recipe, "eval": {"data": [{"path": str(clean)}]}})

    def samples(self, run: Path, num: int) -> dict[str, list[str]]:
        """`num` answers a digit at temperature 1."""
        from alignkit.run import sample

        drawn = sample(run, list(digits), num=num, temperature=1.0, max_tokens=12)
        return {digit: [one["completion"] for one in drawn if one["prompt"] == digit] for digit in digits}

    def reward(self, run: Path) -> float:
        """Mean reward of its samples."""
        samples = self.samples(run, SAMPLES_A_DIGIT)
        rewards = [toys.count_reward(digit, answer) for digit, answers in samples.items() for answer in answers]
        return sum(rewards) / len(rewards)

    def _recipe(self, model: Path, data: Path, algorithm: dict[str, Any], **train: Any) -> dict[str, Any]:
        usual = {"lr_scheduler": "constant", "max_length": 64, "save_steps": 0, "logging_steps": 50}
        return {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": [{"path": str(data)}],
            "algorithm": algorithm,
            "train": {**usual, **train},
        }
