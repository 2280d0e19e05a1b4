"""PPO on T2: 60 rounds of 64 answers; on a tight leash, and with scores that say nothing."""

from pathlib import Path
from statistics import fmean
from typing import Any

from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.online import OnlineTask

ROUNDS, NUM_PROMPTS, LAST = 60, 64, 10


def learn(task: OnlineTask, name: str, reward: str = "count", **config: Any) -> Path:
    """One answer a prompt; four passes over each round in steps of 16.

    κ is 0.02: at 0.05 an answer is not worth the last nats it takes, and 60 rounds end near 0.7. The critic is not
    clipped: held to ±0.2 a round, of rewards up to 1, it falls behind what answers have come to be worth.
    """
    usual = {"rounds": ROUNDS, "prompts_per_round": NUM_PROMPTS, "kl_coef": 0.02, "value_clip": None}
    algorithm = {"name": "ppo", **usual, **config}
    settings = {"epochs_per_round": 4, "batch_size": 16, "learning_rate": 5e-4, "critic_learning_rate": 1e-3}
    return task.train(name, algorithm, reward=reward, rollout={"num_generations": 1}, max_steps=None, **settings)


def last(task: OnlineTask, run: Path, name: str) -> float:
    """The mean of what was logged first of each of the last rounds."""
    return fmean([record[name] for record in task.log(run) if "reward" in record][-LAST:])


@method("ppo")
def measure(bench: Bench) -> list[Figure]:
    task = OnlineTask(bench)
    start = task.reward(task.start)
    run = learn(task, "ppo")
    leashed, permuted = learn(task, "ppo-leash", kl_coef=1.0), learn(task, "ppo-permuted", "shuffled")
    return [
        Figure("T2: mean reward after 60 rounds", task.reward(run), at_least=0.8, start=start),
        Figure("T2: nats from the start, last 10 rounds", last(task, run, "objective/kl"), at_most=15.0),
        Figure("T2: explained variance, last 10 rounds", last(task, run, "val/explained_variance"), at_least=0.3),
        Figure("T2: ratio at the first step", task.log(run)[0]["val/ratio"], at_least=0.999, at_most=1.001),
        Figure("T2, κ = 1: reward − start", task.reward(leashed) - start, at_least=-0.15, at_most=0.15),
        Figure("T2, scores of other answers: reward − start", task.reward(permuted) - start, at_most=0.05),
    ]
