"""Five steps of a reward model by TRL's own trainer and by alignkit: same batches, model, score layer and optimizer."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.acceptance import toys
from tests.parity import sides
from tests.parity.sides import TOLERANCE

pytestmark = pytest.mark.xdist_group("trl")

STEPS, CENTER = 5, 0.01


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A classifier with a score layer: neither trainer draws one."""
    folder = tmp_path_factory.mktemp("start")
    language = toys.write_model(folder / "language", sides.SEED)
    with torch.random.fork_rng():
        torch.manual_seed(sides.SEED)
        model = AutoModelForSequenceClassification.from_pretrained(language, num_labels=1, dtype=torch.float32)
        torch.nn.init.normal_(model.score.weight, std=0.2)
    model.save_pretrained(folder / "classifier")
    AutoTokenizer.from_pretrained(language).save_pretrained(folder / "classifier")
    return folder / "classifier"


def test_first_steps_are_those_of_trl(start, tmp_path):
    from trl import RewardConfig, RewardTrainer

    rows = sides.pair_rows(STEPS, prompts=5, longest=20)
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(start)
    keys = {"center_rewards_coefficient": CENTER}
    theirs = sides.losses(
        sides.trl_steps(RewardTrainer, RewardConfig, tmp_path / "trl", sides.in_order(rows), model, tokenizer, **keys)
    )
    ours = sides.losses(sides.our_steps({"name": "reward_model", "center": CENTER}, start, rows, tmp_path))
    assert len(theirs) == STEPS
    assert abs(theirs[-1] - theirs[0]) > 0.02
    assert ours == pytest.approx(theirs, rel=0, abs=TOLERANCE)
