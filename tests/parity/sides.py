"""The same steps by TRL's own trainers and by alignkit: equal batches, model, optimizer and rate."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from string import ascii_letters, ascii_lowercase, ascii_uppercase
from typing import Any

from alignkit import load_recipe, train
from alignkit.core.rng import generator, permutation
from tests.acceptance import toys

SEED, BATCH = 3, 8
LEARNING_RATE, MAX_GRAD_NORM = 5e-4, 1.0
TOLERANCE = 5e-5


def word(rng: Random, symbols: str, longest: int = 20) -> str:
    """Some letters, from two on."""
    return "".join(rng.choices(symbols, k=rng.randint(2, longest)))


def pair_rows(steps: int, *, prompts: int, longest: int) -> toys.Rows:
    """Texts of many lengths, so that every batch is padded differently; upper case is preferred, which is learned.

    Prompts are so few that several pairs of every batch share one.
    """
    rng = generator(SEED, "parity pairs")
    asked = [word(rng, ascii_letters, longest) for _ in range(prompts)]
    return [
        {"prompt": rng.choice(asked), "chosen": word(rng, ascii_uppercase), "rejected": word(rng, ascii_lowercase)}
        for _ in range(steps * BATCH)
    ]


def in_order(rows: Sequence[Any]) -> list[Any]:
    """The rows in the order of alignkit's first epoch; batches are consecutive slices of it."""
    return [rows[i] for i in permutation(len(rows), SEED, "shuffle", 0)]


def trl_steps(
    trainer: Any,
    config: Any,
    folder: Path,
    rows: Sequence[Any],
    model: Any,
    tokenizer: Any,
    trainer_keys: Mapping[str, Any] | None = None,
    **keys: Any,
):
    """What TRL's trainer logs of one step for each `BATCH` of rows, in their order. `keys` are of its config."""
    from datasets import Dataset

    arguments = {
        "output_dir": str(folder),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "per_device_train_batch_size": BATCH,
        "max_steps": len(rows) // BATCH,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    run = trainer(
        model=model,
        args=config(**{**arguments, **keys}),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        **(trainer_keys or {}),
    )
    run.train()
    return [record for record in run.state.log_history if "loss" in record]


def our_steps(
    algorithm: dict[str, Any],
    model: Path,
    rows: Sequence[Any],
    folder: Path,
    *,
    layout: str = "auto",
    **train_keys: Any,
) -> list[dict[str, Any]]:
    """What alignkit logs of the same steps. `algorithm` is the recipe's block."""
    recipe = {
        "seed": SEED,
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(model), "dtype": "float32", "layout": layout},
        "data": [{"path": str(toys.write_rows(folder / "rows.jsonl", rows))}],
        "algorithm": algorithm,
        "train": {
            "num_epochs": 1,
            "batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "max_length": 64,
            "save_steps": 0,
            **train_keys,
        },
    }
    train(load_recipe(recipe), quiet=True, report=False)
    return records(folder / "run")


def records(run: Path) -> list[dict[str, Any]]:
    """What was logged of every step of a run of alignkit."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in logged if "loss" in record]


def losses(records: Sequence[dict[str, Any]]) -> list[float]:
    """The loss of every step."""
    return [record["loss"] for record in records]
