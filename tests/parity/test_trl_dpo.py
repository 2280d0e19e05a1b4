"""Ten steps of DPO by TRL's own trainer, by the flat script and by alignkit: same batches, model and optimizer."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.testing import engine_sizes
from tests.acceptance import toys
from tests.parity import sides
from tests.parity.flat_script import tiny_dpo
from tests.parity.sides import BATCH, LEARNING_RATE, MAX_GRAD_NORM, TOLERANCE

pytestmark = pytest.mark.xdist_group("trl")  # one worker: the runs of TRL and of the flat script are shared

STEPS, BETA = 10, 0.1
DPO = {"name": "dpo", "beta": BETA}


@pytest.fixture(scope="module")
def rows() -> toys.Rows:
    """Prompts are longer than answers."""
    return sides.pair_rows(STEPS, prompts=5, longest=40)


@pytest.fixture(scope="module")
def in_order(rows) -> toys.Rows:
    return sides.in_order(rows)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return toys.write_model(tmp_path_factory.mktemp("model"), sides.SEED)


@pytest.fixture(scope="module")
def tiny_losses(model_folder, in_order) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    pairs = [tiny_dpo.tokenize(row, tokenizer) for row in in_order]
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return tiny_dpo.run(model, batches, BETA, LEARNING_RATE, MAX_GRAD_NORM)


@pytest.fixture(scope="module")
def trl_losses(model_folder, in_order, tmp_path_factory) -> list[float]:
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    folder = tmp_path_factory.mktemp("trl")
    return sides.losses(sides.trl_steps(DPOTrainer, DPOConfig, folder, in_order, model, tokenizer, beta=BETA))


def test_the_flat_script_agrees_with_trl(tiny_losses, trl_losses):
    assert len(trl_losses) == STEPS
    assert tiny_losses == pytest.approx(trl_losses, rel=0, abs=TOLERANCE)


def test_the_run_is_not_trivial(trl_losses):
    assert trl_losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trl_losses[-1] < math.log(2) - 0.05


@pytest.mark.parametrize("train_keys", [{}, {"micro_batch_size": 3}], ids=["one micro-batch", "micro-batches of 3"])
def test_alignkit_agrees_with_both(model_folder, rows, tiny_losses, trl_losses, tmp_path, train_keys):
    losses = sides.losses(sides.our_steps(DPO, model_folder, rows, tmp_path, **train_keys))
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
        losses = sides.losses(sides.our_steps(DPO, model_folder, rows, tmp_path, layout=layout))
    assert losses == pytest.approx(trl_losses, rel=0, abs=TOLERANCE)


def test_batches_share_prompts(in_order):
    """Else the layouts above would be one and the same."""
    batches = [in_order[i : i + BATCH] for i in range(0, len(in_order), BATCH)]
    assert all(len({row["prompt"] for row in batch}) < BATCH for batch in batches)
