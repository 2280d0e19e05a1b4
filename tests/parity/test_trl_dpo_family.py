"""Five steps of the DPO family, CPO, SimPO and ORPO by TRL's own trainers and by alignkit: same batches and model."""

import json
from pathlib import Path
from random import Random
from string import ascii_letters, ascii_lowercase, ascii_uppercase
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import load_recipe, train
from alignkit.core.rng import generator, permutation
from tests.acceptance import toys

pytestmark = pytest.mark.xdist_group("trl")

SEED, STEPS, PAIRS_PER_STEP = 3, 5, 8
LEARNING_RATE, MAX_GRAD_NORM, TOLERANCE = 5e-4, 1.0, 5e-5

MIXTURE = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
DPO_FAMILY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "robust_dpo": ({"label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "hinge": ({}, {"loss_type": ["hinge"]}),
    "ipo": ({}, {"loss_type": ["ipo"]}),
    "exo": ({"label_smoothing": 0.1}, {"loss_type": ["exo_pair"], "label_smoothing": 0.1}),
    "nca": ({}, {"loss_type": ["nca_pair"]}),
    "sppo": ({"beta": 0.5}, {"loss_type": ["sppo_hard"], "beta": 0.5}),
    "apo_zero": ({}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({}, {"loss_type": ["apo_down"]}),
    "discopop": ({}, {"loss_type": ["discopop"], "beta": 0.05}),
    "f_dpo": ({}, {"f_divergence_type": "js_divergence"}),
    "dpo_norm": ({"beta": 2.0}, {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
    "wpo": ({}, {"use_weighting": True}),
    "aot": ({}, {"loss_type": ["aot"]}),
    "aot_unpaired": ({}, {"loss_type": ["aot_unpaired"]}),
    "dpo": ({"loss_type": "bco_pair"}, {"loss_type": ["bco_pair"]}),
    "dpo, a mixture": (MIXTURE, MIXTURE),
    "dpo, tails": ({"ld_alpha": 0.5}, {"ld_alpha": 0.5}),
    "dpo, forward KL": ({"f_divergence_type": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
}
"""Label that begins with our name → our keys and TRL's; β = 0.1 where nothing else stands."""
REFERENCE_FREE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "simpo": (
        {"beta": 2.0, "simpo_gamma": 1.0},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "cpo": ({}, {"loss_type": "sigmoid"}),
    "cpo, hinge": ({"loss_type": "hinge", "cpo_alpha": 0.5}, {"loss_type": "hinge", "cpo_alpha": 0.5}),
    "cpo, ipo": ({"loss_type": "ipo"}, {"loss_type": "ipo"}),
    "orpo": ({"orpo_nll_on_prompt": True}, {}),
}


def word(rng: Random, symbols: str, longest: int = 20) -> str:
    return "".join(rng.choices(symbols, k=rng.randint(2, longest)))


@pytest.fixture(scope="module")
def rows() -> toys.Rows:
    """Texts of many lengths, upper case preferred; several pairs of every batch share a prompt."""
    rng = generator(SEED, "parity pairs of the family")
    prompts = [word(rng, ascii_letters, longest=30) for _ in range(5)]
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


def trl_losses(label: str, keys: dict[str, Any], model_folder: Path, rows: toys.Rows, folder: Path) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    name, free = label.split(",")[0], label in REFERENCE_FREE
    if name == "orpo":
        config, trainer = ORPOConfig, ORPOTrainer
    else:
        config, trainer = (CPOConfig, CPOTrainer) if free else (DPOConfig, DPOTrainer)
    args = config(
        **{
            "output_dir": str(folder),
            "beta": 0.1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "weight_decay": 0.0,
            "optim": "adamw_torch",
            "per_device_train_batch_size": PAIRS_PER_STEP,
            "max_steps": STEPS,
            "train_sampling_strategy": "sequential",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **keys,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if free:  # these trainers put a BOS before prompts whether or not the tokenizer does
        tokenizer.bos_token = None
    run = trainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    run.train()
    return [record["loss"] for record in run.state.log_history if "loss" in record]


def alignkit_losses(label: str, keys: dict[str, Any], model_folder: Path, rows: toys.Rows, folder: Path) -> list[float]:
    data = toys.write_rows(folder / "pairs.jsonl", rows)
    recipe = {
        "seed": SEED,
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(model_folder), "dtype": "float32"},
        "data": [{"path": str(data)}],
        "algorithm": {"name": label.split(",")[0], **keys},
        "train": {
            "num_epochs": 1,
            "batch_size": PAIRS_PER_STEP,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "max_length": 64,
            "save_steps": 0,
        },
    }
    train(load_recipe(recipe), quiet=True)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("label", [*DPO_FAMILY, *REFERENCE_FREE])
def test_first_steps_agree(label, model_folder, rows, in_order, tmp_path):
    ours, theirs = {**DPO_FAMILY, **REFERENCE_FREE}[label]
    expected = trl_losses(label, theirs, model_folder, in_order, tmp_path / "trl")
    found = alignkit_losses(label, ours, model_folder, rows, tmp_path)
    assert len(found) == len(expected) == STEPS
    assert expected[-1] != pytest.approx(expected[0], abs=10 * TOLERANCE), "the run is trivial"
    assert found == pytest.approx(expected, rel=0, abs=TOLERANCE)
