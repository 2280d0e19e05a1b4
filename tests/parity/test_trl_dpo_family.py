"""Five steps of the DPO family, CPO, SimPO and ORPO by TRL's own trainers and by alignkit: same batches and model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.acceptance import toys
from tests.parity import sides
from tests.parity.sides import TOLERANCE

pytestmark = pytest.mark.xdist_group("trl")

STEPS = 5
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


@pytest.fixture(scope="module")
def rows() -> toys.Rows:
    return sides.pair_rows(STEPS, prompts=5, longest=30)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return toys.write_model(tmp_path_factory.mktemp("model"), sides.SEED)


def trl_losses(label: str, keys: dict[str, Any], model_folder: Path, rows: toys.Rows, folder: Path) -> list[float]:
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    name, free = label.split(",")[0], label in REFERENCE_FREE
    if name == "orpo":
        config, trainer = ORPOConfig, ORPOTrainer
    else:
        config, trainer = (CPOConfig, CPOTrainer) if free else (DPOConfig, DPOTrainer)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if free:  # these trainers put a BOS before prompts whether or not the tokenizer does
        tokenizer.bos_token = None
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return sides.losses(sides.trl_steps(trainer, config, folder, rows, model, tokenizer, **{"beta": 0.1, **keys}))


@pytest.mark.parametrize("label", [*DPO_FAMILY, *REFERENCE_FREE])
def test_first_steps_agree(label, model_folder, rows, tmp_path):
    ours, theirs = {**DPO_FAMILY, **REFERENCE_FREE}[label]
    expected = trl_losses(label, theirs, model_folder, sides.in_order(rows), tmp_path / "trl")
    algorithm = {"name": label.split(",")[0], **ours}
    found = sides.losses(sides.our_steps(algorithm, model_folder, rows, tmp_path))
    assert len(found) == len(expected) == STEPS
    assert expected[-1] != pytest.approx(expected[0], abs=10 * TOLERANCE), "the run is trivial"
    assert found == pytest.approx(expected, rel=0, abs=TOLERANCE)
