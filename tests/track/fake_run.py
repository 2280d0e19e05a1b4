"""A run folder as training leaves it, made up."""

import json
from math import exp
from pathlib import Path

RECIPE = """\
seed: 0
output_dir: runs/dpo-test
model:
  name_or_path: acme/tiny
data:
- path: pairs.jsonl
algorithm:
  name: dpo
  beta: {beta}
train:
  learning_rate: 0.0005
"""


def train_record(step, speed=0.1):
    share = 1 - exp(-speed * (step - 1))
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 0.6931 - 0.5 * share,
        "grad_norm": 2.0 - share,
        "learning_rate": 5e-4,
        "rewards/chosen": 0.8 * share,
        "rewards/rejected": -1.2 * share,
        "rewards/margins": 2.0 * share,
        "rewards/accuracies": 0.5 + 0.45 * share,
        "logps/chosen": -120.0 + 8 * share,
        "logps/rejected": -118.0 - 12 * share,
        "completions/mean_length": 41.5,
        "num_tokens": 1000 * step,
        "step_time": 0.25,
        "perf/tokens_per_second": 4000.0,
    }


def eval_record(step, speed=0.1):
    share = 1 - exp(-speed * step)
    return {
        "step": step,
        "epoch": step / 10,
        "eval_loss": 0.6931 - 0.4 * share,
        "eval_rewards/accuracies": 0.52 + 0.45 * share,
        "eval_win_rate": 0.5 + 0.43 * share,
    }


def samples(step, rewards):
    return [
        {
            "step": step,
            "id": f"pairs:{index}",
            "prompt": f"Once upon a time, there was a <b>dog</b> number {index}.",
            "completion": f"It ran home & slept, says step {step}.\n" + "The sun was warm and all were glad. " * 4,
            "scores": {"valence": reward},
            "reward": reward,
        }
        for index, reward in enumerate(rewards)
    ]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(path: Path, speed: float = 0.1, beta: float = 0.1) -> Path:
    """A run folder of 30 steps with four evaluations and samples of 16 prompts before and after."""
    path.mkdir(parents=True)
    (path / "recipe.resolved.yaml").write_text(RECIPE.format(beta=beta))
    (path / "departures.yaml").write_text("train.learning_rate: 0.0005\ntrain.lr_scheduler: constant\n")
    records = []
    for step in range(31):
        if step:
            records.append(train_record(step, speed))
        if step % 10 == 0:
            records.append(eval_record(step, speed))
    write_lines(path / "metrics.jsonl", records)
    # By prompt: 12 wins, 2 ties, 2 losses.
    write_lines(path / "samples.jsonl", samples(0, [0.0] * 16) + samples(30, [1.0] * 12 + [0.0] * 2 + [-1.0] * 2))
    report = {
        "path": "pairs.jsonl",
        "rows": 414,
        "kept": 410,
        "dropped": {"empty": {"count": 4, "examples": ["row 7"]}},
    }
    (path / "data_report.json").write_text(json.dumps([report]))
    lock = {"alignkit": "0.1.0", "packages": {"torch": "2.13.0"}, "seed": 0, "data_sha256": "ab12"}
    (path / "run.lock").write_text(json.dumps(lock))
    return path
