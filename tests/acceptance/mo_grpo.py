"""Three attributes that a reward model learns from noisy labels with gaps, one of them in units 50 times as large."""

from pathlib import Path
from statistics import correlation, fmean, stdev
from typing import Any

import torch

from alignkit.core.rng import generator
from alignkit.core.types import RewardBatch
from alignkit.rewards.scorers import RewardModelSource, RewardModelSourceConfig
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.objectives import (
    PROMPTS,
    WordTask,
    drawn_words,
    exclamations,
    gain_in_errors,
    length,
    vowel_share,
)

LABELS = {"exclamations": exclamations, "vowel_share": vowel_share, "length": length}
LOUD, SCALE = "exclamations", 50.0
NOISE, MISSING = 0.2, 0.3
"""Of the labels: deviation beside their own of 1, and the share that is not known."""
NUM_ROWS, NUM_HELD_OUT, NUM_UPDATES = 3_072, 300, 100
RANGE = 2.0
"""Deviations from the mean up to which a label is believed: beyond, the reward model was hardly taught anything."""


def labelled(seed: int, words: list[str]) -> list[dict[str, object]]:
    """Words with their standardised labels, noisy and with gaps, but never without any."""
    draw, known = generator(seed, "labels"), [{name: of(word) for name, of in LABELS.items()} for word in words]
    moments = {name: (fmean(row[name] for row in known), stdev(row[name] for row in known)) for name in LABELS}
    rows: list[dict[str, object]] = []
    for i, (word, row) in enumerate(zip(words, known, strict=True)):
        kept = draw.choice(list(LABELS))
        labels = {
            name: (row[name] - mean) / deviation + draw.gauss(0, NOISE)
            if name == kept or draw.random() >= MISSING
            else None
            for name, (mean, deviation) in moments.items()
        }
        rows.append({"prompt": f"{PROMPTS[i % len(PROMPTS)]}:", "completion": word, **labels})
    return rows


def judge(task: WordTask) -> Path:
    """The reward model, from the start model's weights."""
    bench = task.bench
    rows = labelled(bench.seed, drawn_words(bench.seed, "labelled", NUM_ROWS))
    data = toys.write_rows(bench.folder / "attributes.jsonl", rows)
    train = {"num_epochs": 4, "batch_size": 32, "learning_rate": 2e-3, "max_length": 64}
    return bench.train(
        "attributes",
        {
            "model": {"name_or_path": str(task.start), "dtype": "float32"},
            "data": [{"path": str(data)}],
            "algorithm": {"name": "reward_model", "kind": "attribute_regression", "attributes": list(LABELS)},
            "train": {**train, "save_steps": 0, "logging_steps": 50},
        },
    )


def correlations(seed: int, run: Path) -> dict[str, float]:
    """Of what the reward model says of new words with what they are."""
    words = drawn_words(seed, "aside", NUM_HELD_OUT)
    source = RewardModelSource(RewardModelSourceConfig(model=str(run), goal=dict.fromkeys(LABELS, 1.0)))
    count = len(words)
    rows = RewardBatch(
        prompts=[[{"role": "user", "content": f"{PROMPTS[i % len(PROMPTS)]}:"}] for i in range(count)],
        completions=words,
        completion_ids=None,
        completion_mask=None,
        group=torch.arange(count),
        columns={},
        step=0,
        ended=torch.ones(count, dtype=torch.bool),
    )
    said = source.score(rows, None).components
    return {name: correlation(said[name].tolist(), [of(word) for word in words]) for name, of in LABELS.items()}


@method("mo_grpo")
def measure(bench: Bench) -> list[Figure]:
    task = WordTask(bench)
    run = judge(task)
    rewards: list[dict[str, Any]] = []
    for name in LABELS:
        scale = SCALE if name == LOUD else 1.0
        clip = {"name": "clip", "low": -RANGE * scale, "high": RANGE * scale}
        args = {"model": str(run), "goal": {name: scale}}
        rewards.append({"name": "reward_model", "label": name, "args": args, "transforms": [clip]})
    apart = {"level": "advantage", "mode": "sum"}
    ours = task.train("mo-grpo", {"name": "mo_grpo"}, rewards, combine=apart, max_steps=NUM_UPDATES)
    theirs = task.train("mo-grpo-summed", {"name": "grpo"}, rewards, max_steps=NUM_UPDATES)
    start, apart_words, summed = (task.words(r) for r in (task.start, ours, theirs))
    found = correlations(bench.seed, run)
    return [
        *(Figure(f"words: reward model's correlation, {name}", r, at_least=0.9) for name, r in found.items()),
        *(
            Figure(f"words: gain in {name}, standard errors", gain_in_errors(start, apart_words, of), at_least=2)
            for name, of in LABELS.items()
        ),
        *(
            Figure(f"words: gain in {name} of a sum with {LOUD} × {SCALE:g}", gain_in_errors(start, summed, of))
            for name, of in LABELS.items()
        ),
    ]
