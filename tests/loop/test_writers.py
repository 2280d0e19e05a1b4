"""What the loss makes of the log-probabilities that come with completions."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from alignkit.assemble import assemble
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.loop.round import blank_like
from alignkit.models.roster import OLD, WEIGHT
from alignkit.run import train
from alignkit.testing import Bench, read_metrics


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench("grpo", folder=tmp_path_factory.mktemp("writers"))


def written_by(bench, run, layout="auto", **rollout):
    recipe = bench.recipe(run, max_steps=2, model={"layout": layout})
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=rollout)})


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_training_and_writing_are_at_one_temperature(bench, layout, temperature):
    run = written_by(bench, f"hot-{layout}-{temperature}", layout, temperature=temperature)
    for record in read_metrics(train(run, quiet=True, report=False).folder):
        assert record["sampling/sampling_logp_difference/max"] < 1e-4
        assert record["ratio/mean"] == pytest.approx(1.0, abs=1e-4)


def round_of(bench, run, **rollout):
    """The first round's batch with every column."""
    recipe = written_by(bench, run, **rollout)
    Path(recipe.output_dir).mkdir(parents=True)
    trainer = assemble(recipe, DistEngine(torch.float32), Console(quiet=True)).trainer
    groups, _ = trainer.rollouts.collect(0)
    units = trainer.algorithm.build(groups)
    batch = collate(units, blank_like(units, trainer.dist.world))
    return trainer.roster.fill(batch, {OLD, WEIGHT})


def test_the_policys_own_are_taken_as_they_are(bench):
    batch = round_of(bench, "own")
    assert torch.equal(batch[OLD], batch["behaviour.logps"])
    assert (batch[WEIGHT] == 1).all()


def test_where_tokens_are_left_out_the_policy_is_asked_and_the_difference_weighs(bench):
    batch = round_of(bench, "top", top_k=5, importance_cap=0.24)
    mask, apart = batch["mask"], batch[OLD] - batch["behaviour.logps"]
    assert (apart[mask] < 0).any()  # what is left out makes the rest likelier
    expected = apart.exp().clamp(max=0.24)
    torch.testing.assert_close(batch[WEIGHT][mask], expected[mask])
    assert (batch[WEIGHT][~mask] == 1).all()
    assert (expected[mask] < 0.24).any()
    assert (batch[WEIGHT][mask] == batch[WEIGHT].new_tensor(0.24)).any()


def test_no_cap_is_no_weight(bench):
    assert (round_of(bench, "uncapped", top_k=5, importance_cap=None)[WEIGHT] == 1).all()


def test_the_temperature_costs_no_way_back(bench):
    """A first use that differs from plain transformers would silently go by whole logits, which is exact and slow."""
    recipe = written_by(bench, "way", temperature=0.5)
    Path(recipe.output_dir).mkdir(parents=True)
    path = assemble(recipe, DistEngine(torch.float32), Console(quiet=True)).trainer.policy.path
    assert path.head is not None
    assert not path.why
