"""SCIR on T5: two internal reward models that come to agree, beside self-rewarding by one of them, and no penalty."""

from functools import cached_property
from pathlib import Path
from statistics import fmean
from string import digits
from typing import Any

from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.judge_task import NUM_WARM_UP, JudgeTask
from tests.acceptance.self_rewarding import TRUTH

NUM_UPDATES, NUM_PAIRS, NUM_PROMPTS, COPIES, LAST = 200, 64, 320, 48, 25
"""Updates, pairs of one, prompts of a round, rows of each digit; updates that the mean of a logged number is over."""
BETA = 0.5
PLAIN_RATE = 4e-4
"""Learning rate of plain self-rewarding, as in its own experiment: at the 1e-3 of `scir` it ends below its start."""
SCIR = {"name": "scir", "beta": BETA, "anchor_weight": 1.0, "orders": "apart", "warmup_steps": 20}
IMPLICIT = {"name": "implicit", "args": {"previous": None}}


class DoubtfulTask(JudgeTask):
    """T5 with a judge that has met many pairs, each seldom, so that it doubts and can learn; one that knows few by
    heart hears nothing new. With a third layer it tells answers apart that differ in one symbol, in either order."""

    layers = 3

    @cached_property
    def start(self) -> Path:
        """SFT of the base on answers of T2 and, half as often, on verdicts on other pairs each time: 300 steps."""
        answers = toys.count_warm_up(self.seed, NUM_WARM_UP)
        verdicts = toys.judge_rows(toys.judge_pairs(self.seed, "examples", NUM_WARM_UP // 2))
        return self._sft(
            "doubtful-warm-up", self.base, [(answers, 1), (verdicts, 0.5)], max_steps=300, lr_scheduler="cosine"
        )


def learn(
    task: JudgeTask,
    name: str,
    algorithm: dict[str, Any],
    reward: dict[str, Any],
    max_steps: int = NUM_UPDATES,
    learning_rate: float = 1e-3,
) -> Path:
    """Updates of 64 pairs that the model writes; to `scir` every prompt comes with a pair of the data, none twice."""
    rows: list[dict[str, Any]] = [{"prompt": digit} for digit in digits for _ in range(COPIES)]
    batch_size = NUM_PAIRS
    if algorithm["name"] == "scir":
        rows = toys.judge_pairs(task.seed, "anchors", NUM_UPDATES * NUM_PAIRS)
        algorithm = {**algorithm, "template": str(task.template)}
        batch_size = 2 * NUM_PAIRS
    return task.train(
        name,
        {"prompts_per_round": NUM_PROMPTS, **algorithm},
        rewards=[reward, TRUTH],
        data=rows,
        models=task.models,
        rollout={"num_generations": 4},
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler="cosine",
    )


@method("scir")
def measure(bench: Bench) -> list[Figure]:
    """Plain self-rewarding learns from as many pairs as `scir` selects, or a few more: all of its pairs count."""
    task = DoubtfulTask(bench)
    run = learn(task, "scir", SCIR, IMPLICIT)
    free = learn(task, "scir-free", {**SCIR, "consistency_weight": 0.0}, IMPLICIT)
    log = task.log(run)
    as_many = round(sum(record.get("scir/selected", 0.0) for record in log))
    algorithm = {"name": "self_rewarding", "beta": BETA}
    plain = learn(task, "scir-plain", algorithm, task.judge, max_steps=as_many, learning_rate=PLAIN_RATE)

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
