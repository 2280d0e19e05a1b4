"""The embedded default: a tiny model, its text and its preferences, all made here, and aligned without any download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_TEXTS = 8000
NUM_PAIRS = 512
NUM_HELD_OUT = 128
VOCAB_SIZE = 800
SEED = 0
NUM_SHOWN = 3


def main(output_dir: Path) -> Path:
    """Make model and data in `output_dir`, pre-train, align with DPO, print what changed; returns the report's path.

    Runs of an earlier quickstart in the same folder are replaced.
    """
    from alignkit.recipe import load_recipe
    from alignkit.run import train

    data = output_dir / "data"
    print("1/3  writing stories, preferences, a tokenizer and an untrained model")
    prepare(output_dir)
    print("2/3  pre-training on the stories (recipes/quickstart/pretrain.yaml)")
    pretrain = load_recipe(
        "quickstart/pretrain",
        [
            f"output_dir={output_dir / 'pretrain'}",
            f"model.name_or_path={output_dir / 'untrained'}",
            f"data.0.path={data / 'pretrain.jsonl'}",
        ],
    )
    train(pretrain, overwrite=True)
    print("3/3  aligning with DPO (recipes/quickstart/dpo.yaml)")
    dpo = load_recipe(
        "quickstart/dpo",
        [
            f"output_dir={output_dir / 'dpo'}",
            f"model.name_or_path={output_dir / 'pretrain'}",
            f"data.0.path={data / 'pairs.jsonl'}",
            f"eval.data.0.path={data / 'held_out.jsonl'}",
        ],
    )
    result = train(dpo, overwrite=True)
    report = result.folder / "report.html"
    print("\n".join(summary(result.folder, result.metrics)))
    print(f"\nreport: {report.resolve()}")
    return report


def prepare(output_dir: Path) -> None:
    """Write `data/` and the folder `untrained/` of the model."""
    from alignkit.quickstart.build import write_model
    from alignkit.quickstart.corpus import write_corpus

    data = output_dir / "data"
    write_corpus(data, num_texts=NUM_TEXTS, num_pairs=NUM_PAIRS, num_held_out=NUM_HELD_OUT, seed=SEED)
    stories = [row["text"] for row in read_jsonl(data / "pretrain.jsonl")]
    write_model(output_dir / "untrained", stories, vocab_size=VOCAB_SIZE, seed=SEED)


def summary(run: Path, metrics: dict[str, float]) -> list[str]:
    """The figures of the aligned model and its first samples beside those of the start model, as lines to print."""
    samples = read_jsonl(run / "samples.jsonl")
    first, last = min(sample["step"] for sample in samples), max(sample["step"] for sample in samples)
    after = {sample["id"]: sample["completion"] for sample in samples if sample["step"] == last}
    lines = [
        "",
        f"held-out preference accuracy {metrics['eval_rewards/accuracies']:.3f}, "
        f"win rate of samples by word valence {metrics['eval_win_rate']:.3f}",
    ]
    for sample in [sample for sample in samples if sample["step"] == first][:NUM_SHOWN]:
        lines += ["", sample["prompt"], f"  before: {sample['completion']}", f"  after:  {after[sample['id']]}"]
    return lines


def read_jsonl(path: Path) -> Sequence[dict[str, Any]]:
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
