"""Rows that are scored and never trained: which of them a model sees, and that the cache knows them beforehand."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alignkit.assemble import assemble
from alignkit.core import DataError, RecipeError
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.models.cache import LogpsCache
from alignkit.models.config import RosterModelConfig
from alignkit.run import train
from alignkit.testing import Bench, digest, read_metrics


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench("kto", folder=tmp_path_factory.mktemp("bench"))


def test_only_the_slots_asked_for_are_scored(bench):
    recipe = bench.recipe("slots")
    Path(recipe.output_dir).mkdir(parents=True)
    trainer = assemble(recipe, DistEngine(torch.float32), Console(quiet=True)).trainer
    groups = trainer.rollouts.stream.take()
    batch = collate(trainer.algorithm.build([*groups, *groups[:1]]))
    everything = trainer.roster.fill(batch, {"policy.logps"})["policy.logps"]
    for slot in (0, 1):
        found = trainer.roster.fill(batch, {"policy.logps"}, {"policy.logps": (slot,)})["policy.logps"]
        torch.testing.assert_close(batch.by_unit(found)[:, slot], batch.by_unit(everything)[:, slot])
        assert not batch.by_unit(found)[:, 1 - slot].any()
        assert not found.requires_grad
    nothing = batch.with_columns({"mask": torch.zeros_like(batch["mask"])})
    assert not trainer.roster.fill(nothing, {"policy.logps"}, {"policy.logps": (1,)})["policy.logps"].any()


def test_the_cache_knows_every_mismatched_row(bench, monkeypatch):
    """Else the frozen reference would be loaded again in the middle of the run."""
    lookup, known = LogpsCache.lookup, []

    def watched(self, batch):
        found = lookup(self, batch)
        known.append(found is not None)
        return found

    monkeypatch.setattr(LogpsCache, "lookup", watched)
    recipe = bench.recipe("known", batch_size=3, num_epochs=3)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"data": recipe.data})})
    train(recipe, quiet=True, report=False)
    assert len(known) == 9 + 2, "nine rounds, and an evaluation before and after"
    assert all(known)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_measuring_moves_no_training(name, tmp_path):
    bench = Bench(name, folder=tmp_path)
    scored_anew = {"reference": RosterModelConfig.model_validate({"from": "policy", "precompute": False})}
    plain, measured = (
        bench.recipe(run, batch_size=3, num_epochs=2).model_copy(update={"models": scored_anew})
        for run in ("plain", "measured")
    )
    evaluation = measured.eval.model_copy(update={"data": measured.data, "every_steps": 1})
    measured = measured.model_copy(update={"eval": evaluation})
    runs = [train(recipe, quiet=True, report=False).folder for recipe in (plain, measured)]
    assert digest(runs[0]) == digest(runs[1])
    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in runs]
    assert losses[0] == losses[1]
    assert sum("eval_loss" in record for record in read_metrics(runs[1])) == 7


def test_pairs_are_taken_as_labelled_answers(bench, tmp_path):
    pairs = [
        {"prompt": "ask" + "abcdef"[i], "chosen": "YES" * (1 + i % 3), "rejected": "no" * (1 + i % 4)} for i in range(6)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = bench.recipe("pairs", batch_size=4, num_epochs=1)
    recipe = recipe.model_copy(update={"data": [recipe.data[0].model_copy(update={"path": str(path)})]})
    records = read_metrics(train(recipe, quiet=True, report=False).folder)
    assert len(records) == 3, "twelve answers, four a step"


def test_one_answer_a_step_is_refused(bench):
    with pytest.raises(RecipeError, match="needs 2 rows or more"):
        bench.recipe("alone", batch_size=1)


def test_bare_completions_are_refused(bench, tmp_path):
    path = tmp_path / "bare.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    recipe = bench.recipe("bare")
    recipe = recipe.model_copy(update={"data": [recipe.data[0].model_copy(update={"path": str(path)})]})
    with pytest.raises(DataError, match="needs the column 'label'"):
        train(recipe, quiet=True, report=False)
