"""SELM on T2: rounds on pairs and an answer of the policy's own, with more and with less optimism."""

from pathlib import Path
from statistics import fmean

from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.count import CountTask
from tests.acceptance.online import OnlineTask

BETA, ROUNDS, PASSES = 0.5, 3, 2


def learn(bench: Bench, alpha: float) -> Path:
    """Three rounds on a third of 512 pairs each, each met twice; ids key what is written, the same for any α."""
    rows, _ = CountTask(bench).lists
    pairs = []
    for i, row in enumerate(rows):
        ranked = [answer for _, answer in sorted(zip(row["scores"], row["completions"], strict=True))]
        pairs.append({"id": str(i), "prompt": row["prompt"], "chosen": ranked[-1], "rejected": ranked[0]})
    algorithm = {"name": "selm", "beta": BETA, "alpha": alpha, "rounds": ROUNDS}
    settings = {"max_steps": None, "batch_size": 32, "epochs_per_round": PASSES, "learning_rate": 5e-4}
    return OnlineTask(bench).train(f"selm-{alpha:g}", algorithm, data=pairs, rollout={"num_generations": 1}, **settings)


def optimism(bench: Bench, run: Path) -> float:
    """Mean log-ratio of what the policy wrote in the first round, in the last pass over it: the same for any α."""
    records = OnlineTask(bench).log(run)
    (_, second, *_) = [i for i, record in enumerate(records) if "reward" in record]
    last = records[second // PASSES : second]
    return fmean(record["selm/optimism"] for record in last)


@method("selm")
def measure(bench: Bench) -> list[Figure]:
    task = OnlineTask(bench)
    runs = {alpha: learn(bench, alpha) for alpha in (0.0, 0.001, 0.1, 0.5)}
    plain, start = task.reward(runs[0.0]), task.reward(task.start)
    figures = [Figure("T2, α = 0: mean reward after 3 rounds", plain, start=start)]
    for alpha in (0.1, 0.5):
        lower = optimism(bench, runs[alpha]) - optimism(bench, runs[0.0])
        figures += [
            Figure(f"T2, α = {alpha:g}, round 1: Δ of its samples − at α = 0, nats", lower, at_most=0.0),
            Figure(f"T2, α = {alpha:g}: mean reward after 3 rounds", task.reward(runs[alpha])),
        ]
    little = task.reward(runs[0.001]) - plain
    return [*figures, Figure("T2, α = 0.001: mean reward − at α = 0", little, at_least=-0.05, at_most=0.05)]
