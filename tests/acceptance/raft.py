"""RAFT, RAFT++ and Reinforce-Rej on T2: rounds of 64 prompts with eight answers each."""

from pathlib import Path
from statistics import fmean
from string import digits
from typing import Any

from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.online import OnlineTask

ROUNDS, NUM_PROMPTS, ALL_ANSWERS = 8, 64, 128
"""Rounds, prompts of one, and answers a step where all of them are in the mean."""
SIGNED = {"rounds": 50, "selection": "threshold", "beta": 0.02}
"""Right and wrong say less of an answer than a share does. A digit all of whose answers turn wrong teaches nothing any
more; only its divergence from the start brings it back, and at the default β of 0.001 some digits stay there."""
PASSING, BOTH = 0.75, 0.1
"""The share of the digit that is right, and how near rewards of two runs are that are compared."""


def right(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for three quarters of the reward or more, else −1."""
    pairs = zip(prompts, completions, strict=True)
    return [1.0 if toys.count_reward(prompt, answer) >= PASSING else -1.0 for prompt, answer in pairs]


def learn(task: OnlineTask, name: str, algorithm: dict[str, Any], **settings: Any) -> Path:
    """Two passes over each round, none of which is short. The reward itself says what an endless answer is worth."""
    rows = [{"prompt": digit} for digit in digits for _ in range(NUM_PROMPTS)]
    config = {"rounds": ROUNDS, "prompts_per_round": NUM_PROMPTS, "drop_truncated": False, **algorithm}
    usual = {"epochs_per_round": 2, "max_steps": None, "batch_size": 16}
    return task.train(name, config, data=rows, **{**usual, **settings})


def by_round(task: OnlineTask, run: Path, name: str = "reward") -> list[float]:
    """A logged number at the first step of every round."""
    return [record[name] for record in task.log(run) if "reward" in record]


def entropy_beside(task: OnlineTask, run: Path, other: Path) -> float:
    """Mean difference of entropies, nats a token, over pairs of rounds with about the same reward."""
    ours, theirs = (list(zip(by_round(task, r), by_round(task, r, "entropy"), strict=True)) for r in (run, other))
    return fmean(a - b for x, a in ours for y, b in theirs if abs(x - y) < BOTH)


@method("raft")
def measure_raft(bench: Bench) -> list[Figure]:
    task = OnlineTask(bench)
    run = learn(task, "raft", {"name": "raft"})
    alone = learn(task, "raft-alone", {"name": "raft"}, rollout={"num_generations": 1})
    start = task.reward(task.start)
    gap = by_round(task, run, "raft/gap")[0]
    return [
        Figure("T2: mean reward after 8 rounds", task.reward(run), at_least=0.85, start=start),
        Figure("T2, round 1: reward kept − reward of all", gap, at_least=0.15),
        Figure("T2, one answer a prompt: reward − start", task.reward(alone) - start, at_least=-0.08, at_most=0.08),
    ]


@method("raft_pp")
def measure_raft_pp(bench: Bench) -> list[Figure]:
    task = OnlineTask(bench)
    run = learn(task, "raft-pp", {"name": "raft_pp"}, batch_size=ALL_ANSWERS)
    return [Figure("T2: mean reward after 8 rounds", task.reward(run), at_least=0.85, start=task.reward(task.start))]


@method("reinforce_rej")
def measure_reinforce_rej(bench: Bench) -> list[Figure]:
    task = OnlineTask(bench)
    settings = {"reward": f"{__name__}:right", "batch_size": ALL_ANSWERS, "learning_rate": 5e-4}
    run = learn(task, "reinforce-rej", {"name": "reinforce_rej", **SIGNED}, **settings)
    other = learn(task, "raft-pp-signed", {"name": "raft_pp", **SIGNED}, **settings)
    share = fmean(by_round(task, run)[-3:]) / 2 + 0.5
    return [
        Figure("T2, right or wrong: share right, last 3 rounds", share, at_least=0.8),
        Figure("T2: entropy − raft_pp's at equal reward, nats", entropy_beside(task, run, other)),
    ]
