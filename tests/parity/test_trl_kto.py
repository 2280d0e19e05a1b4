"""Five steps of KTO by TRL's own trainer and by alignkit: same batches, model, optimizer and mismatched answers."""

import json
from pathlib import Path
from string import ascii_letters, ascii_lowercase, ascii_uppercase

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import load_recipe, train
from alignkit.core.rng import generator, permutation
from tests.acceptance import toys

pytestmark = pytest.mark.xdist_group("trl")

SEED, STEPS, ROWS_PER_STEP = 3, 5, 8
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 5e-4, 1.0
WEIGHTS = {"desirable_weight": 1.33, "undesirable_weight": 1.0}
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    """Mostly good answers, so that mismatched ones become likelier too and the reference point leaves 0."""
    rng, rows = generator(SEED, "parity labels"), []
    for i in range(STEPS * ROWS_PER_STEP):
        symbols = ascii_lowercase if i % 4 == 0 else ascii_uppercase
        prompt, answer = ("".join(rng.choices(x, k=rng.randint(2, 20))) for x in (ascii_letters, symbols))
        rows.append({"prompt": prompt, "completion": answer, "label": i % 4 != 0})
    return rows


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return toys.write_model(tmp_path_factory.mktemp("model"), SEED)


@pytest.fixture(scope="module", params=["kto", "apo_zero_unpaired"])
def trl_steps(request, model_folder, rows, tmp_path_factory) -> tuple[str, list[dict[str, float]]]:
    """The loss type and what TRL logs. One block of its rotation is a whole step."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    args = KTOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        loss_type=request.param,
        beta=BETA,
        **WEIGHTS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        weight_decay=0.0,
        optim="adamw_torch",
        per_device_train_batch_size=ROWS_PER_STEP,
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
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list([rows[i] for i in permutation(len(rows), SEED, "shuffle", 0)]),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    trainer.train()
    return request.param, [record for record in trainer.state.log_history if "loss" in record]


@pytest.mark.filterwarnings("ignore:30 good and 10 bad answers")
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_alignkit_agrees_with_trl(model_folder, rows, trl_steps, tmp_path, micro_batch_size):
    loss_type, expected = trl_steps
    recipe = {
        "seed": SEED,
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(model_folder), "dtype": "float32"},
        "data": [{"path": str(toys.write_rows(tmp_path / "rows.jsonl", rows))}],
        "algorithm": {"name": "kto", "beta": BETA, "loss_type": loss_type, **WEIGHTS},
        "train": {
            "num_epochs": 1,
            "batch_size": ROWS_PER_STEP,
            "micro_batch_size": micro_batch_size,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "max_length": 64,
            "save_steps": 0,
        },
    }
    train(load_recipe(recipe), quiet=True)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if "loss" in record]
    assert len(expected) == STEPS
    for name in ("loss", "rewards/chosen", "rewards/rejected", "kl"):
        if name in expected[0]:
            theirs = [record[name] for record in expected]
            assert [record[name] for record in found] == pytest.approx(theirs, rel=0, abs=TOLERANCE), name
    if loss_type == "kto":
        assert max(record["kl"] for record in found) > 0.1, "a clamp that always holds would hide the rotation"
