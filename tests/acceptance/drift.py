"""Drift control on T5: a judge that goes wrong in the third of five rounds, with labelled pairs to tell and without."""

from pathlib import Path
from typing import Any

import torch

from alignkit.core.config import Config
from alignkit.core.types import RewardBatch, RewardOutput
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.judge_task import JudgeTask
from tests.acceptance.self_rewarding import by_round, learn

ROUNDS = 5
SOUND_STEPS = 50
"""Steps after which the judge is bent: early in the second of five rounds of 30 steps, so before the third."""
NUM_LABELS = 200


class Bent(Config):
    """Keys of `BentJudge`."""


class BentJudge:
    """Counts the digit, as the task does; later on the one after it, as a judge does that has learned its own taste."""

    config_type = Bent
    requires: tuple[str, ...] = ()

    def __init__(self, config: Bent) -> None:
        del config

    def score(self, rows: RewardBatch, models: Any) -> RewardOutput:
        """Always valid."""
        del models
        wanted = [str(prompt[0]["content"]) for prompt in rows.prompts]
        if rows.step > SOUND_STEPS:
            wanted = [str((int(digit) + 1) % 10) for digit in wanted]
        told = [toys.count_reward(digit, text) for digit, text in zip(wanted, rows.completions, strict=True)]
        return RewardOutput(score=torch.tensor(told), valid=torch.ones(len(told), dtype=torch.bool))


def rounds(task: JudgeTask, name: str, **blocks: Any) -> Path:
    """Five rounds by that judge."""
    judge = {"name": f"{__name__}:BentJudge", "label": "judge"}
    return learn(task, name, [judge], {"rounds": ROUNDS}, **blocks)


@method("drift")
def measure(bench: Bench) -> list[Figure]:
    task = JudgeTask(bench)
    rows = [
        {"prompt": pair["prompt"], "chosen": good, "rejected": bad}
        for pair in toys.judge_pairs(task.seed, "labels", NUM_LABELS)
        for good, bad in [sorted(pair["completions"], key=lambda text: -text.count(pair["prompt"]))]
    ]
    labels = toys.write_rows(bench.folder / "drift-labels.jsonl", rows)
    rule = {"metric": "drift/judge_accuracy", "falls_by": 0.1}
    held = {"labels": [{"path": str(labels)}], "num_labels": NUM_LABELS}
    free = rounds(task, "drift-free")
    stopped = rounds(task, "drift-stopped", drift={**held, "rules": [{**rule, "action": "stop"}]})
    back = rounds(task, "drift-back", drift={**held, "rules": [{**rule, "action": "rollback"}]})
    best, ends = max(by_round(task, free)), {run: task.reward(run) for run in (free, stopped, back)}
    return [
        Figure("T5, a judge that goes wrong: reward at the end − at its best", ends[free] - best, at_most=-0.2),
        Figure("T5, stopped: reward at the end − at its best", ends[stopped] - best, at_least=-0.05),
        Figure("T5, rolled back: reward at the end − start", ends[back] - task.reward(task.start), at_least=0.1),
        Figure("T5, stopped: rounds judged", float(len(by_round(task, stopped))), at_most=3.0),
    ]
