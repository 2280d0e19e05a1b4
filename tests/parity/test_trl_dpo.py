"""Ten steps of DPO by TRL's own trainer, by the flat script and by alignkit: same batches, model and optimizer."""

import json
import math
from pathlib import Path
from random import Random
from string import ascii_letters, ascii_lowercase, ascii_uppercase

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import load_recipe, train
from alignkit.core.rng import generator, permutation
from alignkit.testing import engine_sizes
from tests.acceptance import toys
from tests.parity.flat_script import tiny_dpo

pytestmark = pytest.mark.xdist_group("trl")  # one worker: the runs of TRL and of the flat script are shared

SEED, STEPS, PAIRS_PER_STEP = 3, 10, 8
PROMPTS = 5
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 5e-4, 1.0
TOLERANCE = 5e-5


def word(rng: Random, symbols: str, longest: int = 20) -> str:
    return "".join(rng.choices(symbols, k=rng.randint(2, longest)))


@pytest.fixture(scope="module")
def rows() -> toys.Rows:
    """Texts of many lengths, so that every batch is padded differently; upper case is preferred, which is learned.

    Prompts are longer than answers, and so few that several pairs of every batch share one.
    """
    rng = generator(SEED, "parity pairs")
    prompts = [word(rng, ascii_letters, longest=40) for _ in range(PROMPTS)]
    return [
        {"prompt": rng.choice(prompts), "chosen": word(rng, ascii_uppercase), "rejected": word(rng, ascii_lowercase)}
        for _ in range(STEPS * PAIRS_PER_STEP)
    ]


@pytest.fixture(scope="module")
def in_order(rows) -> toys.Rows:
    """The rows in the order of alignkit's first epoch; batches are consecutive slices of it."""
    return [rows[i] for i in permutation(len(rows), SEED, "shuffle", 0)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return toys.write_model(tmp_path_factory.mktemp("model"), SEED)


@pytest.fixture(scope="module")
def tiny_losses(model_folder, in_order) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    pairs = [tiny_dpo.tokenize(row, tokenizer) for row in in_order]
    batches = [pairs[i : i + PAIRS_PER_STEP] for i in range(0, len(pairs), PAIRS_PER_STEP)]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return tiny_dpo.run(model, batches, BETA, LEARNING_RATE, MAX_GRAD_NORM)


@pytest.fixture(scope="module")
def trl_losses(model_folder, in_order, tmp_path_factory) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        weight_decay=0.0,
        optim="adamw_torch",
        per_device_train_batch_size=PAIRS_PER_STEP,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(in_order),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def recipe(model_folder: Path, data: Path, output_dir: Path, layout: str, **train_keys) -> dict:
    return {
        "seed": SEED,
        "output_dir": str(output_dir),
        "model": {"name_or_path": str(model_folder), "dtype": "float32", "layout": layout},
        "data": [{"path": str(data)}],
        "algorithm": {"name": "dpo", "beta": BETA},
        "train": {
            "num_epochs": 1,
            "batch_size": PAIRS_PER_STEP,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "max_length": 64,
            "save_steps": 0,
            **train_keys,
        },
    }


def alignkit_losses(
    model_folder: Path, rows: toys.Rows, folder: Path, layout: str = "auto", **train_keys
) -> list[float]:
    data = toys.write_rows(folder / "pairs.jsonl", rows)
    train(load_recipe(recipe(model_folder, data, folder / "run", layout, **train_keys)), quiet=True)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_the_flat_script_agrees_with_trl(tiny_losses, trl_losses):
    assert len(trl_losses) == STEPS
    assert tiny_losses == pytest.approx(trl_losses, rel=0, abs=TOLERANCE)


def test_the_run_is_not_trivial(trl_losses):
    assert trl_losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trl_losses[-1] < math.log(2) - 0.05


@pytest.mark.parametrize("train_keys", [{}, {"micro_batch_size": 3}], ids=["one micro-batch", "micro-batches of 3"])
def test_alignkit_agrees_with_both(model_folder, rows, tiny_losses, trl_losses, tmp_path, train_keys):
    losses = alignkit_losses(model_folder, rows, tmp_path, **train_keys)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses == pytest.approx(trl_losses, rel=0, abs=TOLERANCE)
    assert losses == pytest.approx(tiny_losses, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("padded", {}),
        ("packed", {"dense_tokens": 0}),
        ("prefix_shared", {"dense_tokens": 10**6}),
        ("prefix_shared", {"dense_tokens": 0}),
        ("prefix_shared", {"chunk_bytes": 1}),
        ("prefix_shared", {"chunk_bytes": 1000, "max_chunk_bytes": 1}),
    ],
    ids=["padded", "packed", "shared by a mask", "shared in the cascade", "a chunk a pair", "pairs in pieces"],
)
def test_layouts_and_chunks_agree_with_trl(model_folder, rows, trl_losses, tmp_path, layout, sizes):
    with engine_sizes(**sizes):
        losses = alignkit_losses(model_folder, rows, tmp_path, layout)
    assert losses == pytest.approx(trl_losses, rel=0, abs=TOLERANCE)


def test_batches_share_prompts(in_order):
    """Else the layouts above would be one and the same."""
    batches = [in_order[i : i + PAIRS_PER_STEP] for i in range(0, len(in_order), PAIRS_PER_STEP)]
    assert all(len({row["prompt"] for row in batch}) < PAIRS_PER_STEP for batch in batches)
