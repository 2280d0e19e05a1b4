"""SCIR on T5: two internal reward models that come to agree, beside self-rewarding by one of them, and no penalty."""

from pathlib import Path
from statistics import fmean
from string import digits
from typing import Any

from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.judge_task import NUM_EXAMPLES, JudgeTask
from tests.acceptance.self_rewarding import TRUTH

NUM_UPDATES, NUM_PAIRS, NUM_PROMPTS, COPIES, LAST = 200, 32, 320, 48, 25
"""Updates, pairs of one, prompts of a round, rows of each digit; updates that the mean of a logged number is over."""
BETA = 0.5
SCIR = {"name": "scir", "beta": BETA, "anchor_weight": 0.5, "orders": "apart", "warmup_steps": 20}
IMPLICIT = {"name": "implicit", "args": {"previous": None}}


def learn(
    task: JudgeTask, name: str, algorithm: dict[str, Any], reward: dict[str, Any], max_steps: int = NUM_UPDATES
) -> Path:
    """Updates of 32 pairs; to `scir` the pairs that the judge learned from before are rows too."""
    rows: list[dict[str, Any]] = [{"prompt": digit} for digit in digits for _ in range(COPIES)]
    if algorithm["name"] == "scir":
        rows += toys.judge_pairs(task.seed, "examples", NUM_EXAMPLES)
        algorithm = {**algorithm, "template": str(task.template)}
    return task.train(
        name,
        {"prompts_per_round": NUM_PROMPTS, **algorithm},
        rewards=[reward, TRUTH],
        data=rows,
        models=task.models,
        rollout={"num_generations": 4},
        max_steps=max_steps,
        batch_size=NUM_PAIRS,
        lr_scheduler="cosine",
    )


@method("scir")
def measure(bench: Bench) -> list[Figure]:
    """Plain self-rewarding learns from as many pairs as `scir` selects, or a few more: all of its pairs count."""
    task = JudgeTask(bench)
    run = learn(task, "scir", SCIR, IMPLICIT)
    free = learn(task, "scir-free", {**SCIR, "consistency_weight": 0.0}, IMPLICIT)
    log = task.log(run)
    as_many = round(sum(record.get("scir/selected", 0.0) for record in log))
    plain = learn(task, "scir-plain", {"name": "self_rewarding", "beta": BETA}, task.judge, max_steps=as_many)

    def late(run: Path) -> float:
        return task.around(run, NUM_UPDATES, "scir/consistency", LAST)

    before, after = (task.opinions(model, beta=BETA) for model in (task.start, run))
    reward = task.reward(run)
    return [
        Figure("T5: judge's accuracy at the start", before.judge, at_least=0.6, at_most=0.7),
        Figure("T5: implicit reward's accuracy at the start", before.implicit, at_least=0.6, at_most=0.7),
        Figure("T5: consistency at the start", before.consistency, at_least=0.5, at_most=0.65),
        Figure("T5: consistency on its own pairs, updates 1–25", fmean(r["scir/consistency"] for r in log[:LAST])),
        Figure("T5: consistency on its own pairs, updates 176–200", late(run), at_least=0.8),
        Figure("T5: the same − without the penalty", late(run) - late(free), at_least=0.0),
        Figure("T5: consistency on held-out pairs", after.consistency, start=before.consistency),
        Figure("T5: consensus' accuracy − at the start", after.consensus - before.consensus, at_least=0.08),
        Figure("T5: flips at the start", before.flips),
        Figure("T5: flips", after.flips, at_most=0.1),
        Figure("T5: reward", reward, start=task.reward(task.start)),
        Figure("T5: reward − plain self-rewarding's", reward - task.reward(plain), at_least=0.0),
    ]
