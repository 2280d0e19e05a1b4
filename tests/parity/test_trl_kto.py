"""Five steps of KTO by TRL's own trainer and by alignkit: same batches, model, optimizer and mismatched answers."""

from pathlib import Path
from string import ascii_letters, ascii_lowercase, ascii_uppercase
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.parity import sides
from tests.parity.sides import TOLERANCE

pytestmark = pytest.mark.xdist_group("trl")

STEPS, BETA = 5, 0.1
WEIGHTS = {"desirable_weight": 1.33, "undesirable_weight": 1.0}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Mostly good answers, so that mismatched ones become likelier too and the reference point leaves 0."""
    rng, rows = generator(sides.SEED, "parity labels"), []
    for i in range(STEPS * sides.BATCH):
        symbols = ascii_lowercase if i % 4 == 0 else ascii_uppercase
        prompt, answer = (sides.word(rng, x) for x in (ascii_letters, symbols))
        rows.append({"prompt": prompt, "completion": answer, "label": i % 4 != 0})
    return rows


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return toys.write_model(tmp_path_factory.mktemp("model"), sides.SEED)


@pytest.fixture(scope="module", params=["kto", "apo_zero_unpaired"])
def trl_steps(request, model_folder, rows, tmp_path_factory) -> tuple[str, list[dict[str, float]]]:
    """The loss type and what TRL logs. One block of its rotation is a whole step."""
    from trl import KTOConfig, KTOTrainer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    keys = {"loss_type": request.param, "beta": BETA, **WEIGHTS}
    folder = tmp_path_factory.mktemp("trl")
    return request.param, sides.trl_steps(KTOTrainer, KTOConfig, folder, sides.in_order(rows), model, tokenizer, **keys)


@pytest.mark.filterwarnings("ignore:30 good and 10 bad answers")
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_alignkit_agrees_with_trl(model_folder, rows, trl_steps, tmp_path, micro_batch_size):
    loss_type, expected = trl_steps
    algorithm = {"name": "kto", "beta": BETA, "loss_type": loss_type, **WEIGHTS}
    found = sides.our_steps(algorithm, model_folder, rows, tmp_path, micro_batch_size=micro_batch_size)
    assert len(expected) == STEPS
    for name in ("loss", "rewards/chosen", "rewards/rejected", "kl"):
        if name in expected[0]:
            theirs = [record[name] for record in expected]
            assert [record[name] for record in found] == pytest.approx(theirs, rel=0, abs=TOLERANCE), name
    if loss_type == "kto":
        assert max(record["kl"] for record in found) > 0.1, "a clamp that always holds would hide the rotation"
