"""Five steps of a reward model by TRL's own trainer and by alignkit: same batches, model, score layer and optimizer."""

import json
from string import ascii_letters, ascii_lowercase, ascii_uppercase

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit import load_recipe, train
from alignkit.core.rng import generator, permutation
from tests.acceptance import toys

pytestmark = pytest.mark.xdist_group("trl")

SEED, STEPS, PAIRS_PER_STEP = 3, 5, 8
LEARNING_RATE, MAX_GRAD_NORM, CENTER = 5e-4, 1.0, 0.01
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def rows():
    rng = generator(SEED, "reward parity")

    def word(symbols):
        return "".join(rng.choices(symbols, k=rng.randint(2, 20)))

    count = STEPS * PAIRS_PER_STEP
    return [
        {"prompt": word(ascii_letters), "chosen": word(ascii_uppercase), "rejected": word(ascii_lowercase)}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A classifier with a score layer: neither trainer draws one."""
    folder = tmp_path_factory.mktemp("start")
    language = toys.write_model(folder / "language", SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = AutoModelForSequenceClassification.from_pretrained(language, num_labels=1, dtype=torch.float32)
        torch.nn.init.normal_(model.score.weight, std=0.2)
    model.save_pretrained(folder / "classifier")
    AutoTokenizer.from_pretrained(language).save_pretrained(folder / "classifier")
    return folder / "classifier"


@pytest.fixture(scope="module")
def trl_losses(start, rows, tmp_path_factory):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        center_rewards_coefficient=CENTER,
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
    in_order = [rows[i] for i in permutation(len(rows), SEED, "shuffle", 0)]
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(in_order),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_first_steps_are_those_of_trl(start, rows, trl_losses, tmp_path):
    data = toys.write_rows(tmp_path / "pairs.jsonl", rows)
    settings = {
        "num_epochs": 1,
        "batch_size": PAIRS_PER_STEP,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "max_length": 64,
        "save_steps": 0,
    }
    recipe = {
        "seed": SEED,
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(start), "dtype": "float32"},
        "data": [{"path": str(data)}],
        "algorithm": {"name": "reward_model", "center": CENTER},
        "train": settings,
    }
    train(load_recipe(recipe), quiet=True, report=False)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(trl_losses) == STEPS
    assert abs(trl_losses[-1] - trl_losses[0]) > 0.02
    assert losses == pytest.approx(trl_losses, rel=0, abs=TOLERANCE)
