"""Self-rewarding on T5: a judge that is right of two pairs in three, one that always is, and one that guesses."""

from pathlib import Path
from string import digits
from typing import Any

from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.judge_task import JudgeTask

ROUNDS, COPIES, NUM_GENERATIONS = 3, 48, 4
"""Rounds; how often each digit is asked in one; answers each time."""
TRUTH = {"name": "tests.acceptance.online:count", "weight": 0.0}
"""What answers are really worth, logged of every round and never learned from."""


def guess(completions: list[str], ids: Any = None, **_: Any) -> list[float]:
    """Scores that have nothing to do with the digit."""
    return [float(sum((i + 1) * ord(symbol) for i, symbol in enumerate(text)) * 7919 % 1009) for text in completions]


def learn(
    task: JudgeTask, name: str, rewards: list[dict[str, Any]], algorithm: dict[str, Any] | None = None, **blocks: Any
) -> Path:
    """Three rounds of 480 prompts with four answers, one pass in steps of 16 pairs; all runs meet the same prompts."""
    config = {"name": "self_rewarding", "rounds": ROUNDS, **(algorithm or {})}
    digit_of = [digit for digit in digits for _ in range(COPIES * config["rounds"])]
    rows = [{"id": f"row-{i}", "prompt": digit} for i, digit in enumerate(digit_of)]
    usual = {"max_steps": None, "batch_size": 16, "learning_rate": 2e-4}
    settings = {"rollout": {"num_generations": NUM_GENERATIONS}, "models": task.models, **blocks}
    return task.train(name, config, rewards=[*rewards, TRUTH], data=rows, **{**usual, **settings})


def by_round(task: JudgeTask, run: Path, name: str = "rewards/count/mean") -> list[float]:
    """A logged number at the first step of every round."""
    return [record[name] for record in task.log(run) if name in record and "reward" in record]


@method("self_rewarding")
def measure(bench: Bench) -> list[Figure]:
    task = JudgeTask(bench)
    own = learn(task, "self-rewarding", [task.judge], learning_rate=4e-4)  # what so weak a judge says is learned slowly
    oracle = learn(task, "self-rewarding-oracle", [{"name": "tests.acceptance.online:count", "label": "oracle"}])
    guessed = learn(task, "self-rewarding-guess", [{"name": f"{__name__}:guess"}])
    start, curve = task.reward(task.start), by_round(task, own)
    return [
        Figure("T5: judge's accuracy at the start", task.opinions(task.start).judge, at_least=0.6, at_most=0.7),
        Figure("T5: reward after round 1 − start", curve[1] - curve[0], at_least=0.1),
        Figure("T5: reward after round 2", curve[2]),
        Figure("T5: reward after round 3", task.reward(own), start=start),
        Figure("T5: judge's accuracy after round 3", task.opinions(own).judge),
        Figure("T5, a judge that is right: reward after round 3", task.reward(oracle), at_least=0.8),
        Figure("T5, a judge that guesses: reward − start", task.reward(guessed) - start, at_least=-0.05, at_most=0.05),
    ]
