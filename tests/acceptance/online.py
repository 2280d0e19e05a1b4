"""Task T2 for methods that write their own answers, and the rewards of its recipes."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from string import digits
from typing import Any

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench
from tests.acceptance.count import CountTask

COPIES = 40
"""Rows of each prompt, so that few rounds are short."""
NUM_PROMPTS, NUM_GENERATIONS, LONGEST, ENOUGH = 8, 8, 12, 5


def count(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward of the task."""
    return [toys.count_reward(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def shuffled(prompts: list[str], completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """The same numbers on other answers: they say nothing any more."""
    return toys.shuffled(count(prompts, completions), generator(0, "shuffled rewards", trainer_state.global_step))


def enough(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for five such digits, whatever else is written: longer answers hold them sooner."""
    return [float(answer.count(prompt) >= ENOUGH) for prompt, answer in zip(prompts, completions, strict=True)]


class OnlineTask:
    """Answer a digit with eight of the same, of samples and rewards alone."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seed = bench, bench.seed
        self._offline = CountTask(bench)

    @property
    def start(self) -> Path:
        """The warmed-up model that offline methods begin with too."""
        return self._offline.start

    def train(
        self,
        name: str,
        algorithm: dict[str, Any],
        *,
        reward: str = "count",
        rollout: dict[str, Any] | None = None,
        combine: dict[str, Any] | None = None,
        rewards: Sequence[dict[str, Any]] | None = None,
        data: Sequence[dict[str, Any]] | None = None,
        start: Path | None = None,
        models: dict[str, Any] | None = None,
        drift: dict[str, Any] | None = None,
        **train: Any,
    ) -> Path:
        """60 updates of 8 prompts with 8 answers each at 1e-3, each logged, unless told otherwise.

        `reward` is a function of this file, or "module:function"; `rewards` stands for the whole list.
        """
        rows = [{"prompt": digit} for digit in digits for _ in range(COPIES)] if data is None else data
        path = toys.write_rows(self.bench.folder / f"{name}.jsonl", rows)
        source = reward if ":" in reward else f"{__name__}:{reward}"
        usual = {
            "max_steps": 60,
            "batch_size": NUM_PROMPTS * NUM_GENERATIONS,
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "max_length": 64,
            "save_steps": 0,
            "logging_steps": 1,
        }
        recipe: dict[str, Any] = {
            "model": {"name_or_path": str(self.start if start is None else start), "dtype": "float32"},
            "data": [{"path": str(path)}],
            "algorithm": algorithm,
            "rewards": [{"name": source}] if rewards is None else list(rewards),
            "rollout": {
                "num_generations": NUM_GENERATIONS,
                "max_completion_length": LONGEST,
                **({} if rollout is None else rollout),
            },
            "train": {**usual, **train},
        }
        blocks = {"combine": combine, "models": models, "drift": drift}
        return self.bench.train(name, recipe | {key: block for key, block in blocks.items() if block is not None})

    def reward(self, run: Path) -> float:
        """Mean reward of 100 samples a digit."""
        return self._offline.reward(run)

    def log(self, run: Path) -> list[dict[str, Any]]:
        """What was logged of every update, in order."""
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [record for record in records if "loss" in record]

    def around(self, run: Path, step: int, name: str = "reward", width: int = 5) -> float:
        """The mean of a logged number over the `width` updates up to `step`."""
        near = [record[name] for record in self.log(run) if step - width < record["step"] <= step and name in record]
        return fmean(near)
