"""A trained reward model as a reward: it says what the run said of the same rows, alone and with others."""

import json

import pytest
import torch

from alignkit import ops, testing
from alignkit.core.errors import RecipeError
from alignkit.core.types import RewardBatch
from alignkit.recipe import load_recipe
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.pipeline import build_sources
from alignkit.run import train

PAIRS = [
    {"prompt": "abc", "chosen": "HELLO", "rejected": "no"},
    {"prompt": "defgh", "chosen": "GOOD", "rejected": "worse by far"},
    {"prompt": "xy", "chosen": "A", "rejected": "bb"},
]
GRADES = [{"prompt": "ab", "completion": "x" * n, "good": n, "long": -n} for n in (1, 3, 2)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return testing.build_tiny_model(tmp_path_factory.mktemp("scorers") / "model")


def learned(folder, start, rows, algorithm, **model):
    """A run of two steps on these rows, and the last evaluation of them."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = load_recipe(
        {
            "output_dir": str(folder / "run"),
            "model": {"name_or_path": str(start), "dtype": "float32", **model},
            "data": [{"path": str(data)}],
            "algorithm": {"name": "reward_model", **algorithm},
            "train": {"max_steps": 2, "num_epochs": 2, "learning_rate": 1e-2, "max_length": 64, "save_steps": 0},
            "eval": {"data": [{"path": str(data)}]},
        }
    )
    run = train(recipe, quiet=True, report=False).folder
    return run, next(r for r in reversed(testing.read_metrics(run)) if "eval_loss" in r)


def batch(pairs):
    """(prompt, completion) each, all of them ended."""
    return RewardBatch(
        prompts=[[{"role": "user", "content": prompt}] for prompt, _ in pairs],
        completions=[completion for _, completion in pairs],
        completion_ids=None,
        completion_mask=None,
        group=torch.arange(len(pairs)),
        columns={},
        step=0,
        ended=torch.ones(len(pairs), dtype=torch.bool),
    )


ANSWERS = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in PAIRS]


def scores(args, pairs=ANSWERS):
    [(_, source)] = build_sources([RewardConfig(name="reward_model", args=args)])
    return source.score(batch(pairs), None)


@pytest.mark.parametrize("model", [{}, {"lora": {"r": 4, "alpha": 8}}], ids=["full", "lora"])
def test_the_reward_is_what_the_run_evaluates(start, tmp_path, model):
    run, logged = learned(tmp_path, start, PAIRS, {}, **model)
    found = scores({"model": str(run), "batch_size": 4}).score
    chosen, rejected = found[:3].mean(), found[3:].mean()
    assert [float(chosen), float(rejected)] == pytest.approx(
        [logged["eval_rewards/chosen"], logged["eval_rewards/rejected"]], abs=1e-5
    )
    alone = scores({"model": str(run), "batch_size": 1}).score
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_members_of_a_run_are_one_reward(start, tmp_path):
    run, logged = learned(tmp_path, start, PAIRS, {"members": 2})
    found = scores({"model": str(run)})
    assert float(found.components["std"].mean()) == pytest.approx(logged["eval_members/std"], abs=1e-5)
    assert float(found.score.mean()) == pytest.approx(logged["eval_mean_reward"], abs=1e-5)
    listed = [scores({"model": str(run / f"member-{m}")}).score for m in range(2)]
    torch.testing.assert_close(scores({"model": str(run), "agg": "min"}).score, torch.stack(listed).amin(0))
    reference = tmp_path / "reference.jsonl"
    reference.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ANSWERS))
    each = torch.stack(listed, 1)
    standard = ops.standardize(each, each.mean(0), each.std(0, correction=0))
    found = scores({"model": [str(run / f"member-{m}") for m in range(2)], "reference": str(reference)})
    torch.testing.assert_close(found.score, standard.mean(1), rtol=0, atol=1e-4)


def test_attributes_are_weighed_by_a_goal(start, tmp_path):
    goal = {"good": 0.5, "long": -2.0}
    algorithm = {"kind": "attribute_regression", "attributes": ["good", "long"], "goal": goal}
    run, logged = learned(tmp_path, start, GRADES, algorithm)
    found = scores({"model": str(run), "goal": goal}, [(row["prompt"], row["completion"]) for row in GRADES])
    assert list(found.components) == ["good", "long"]
    assert float(found.score.mean()) == pytest.approx(logged["eval_mean_reward"], abs=1e-5)
    torch.testing.assert_close(found.score, 0.5 * found.components["good"] - 2 * found.components["long"])
    for args, said in (({}, "has the scores good, long"), ({"goal": {"bad": 1.0}}, "`goal` weighs 'bad'")):
        with pytest.raises(RecipeError, match=said):
            scores({"model": str(run), **args})


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"reward 'reward_model': cannot load"):
        scores({"model": str(tmp_path)})


def test_a_reference_of_one_row_is_refused(start, tmp_path):
    run, _ = learned(tmp_path, start, PAIRS, {})
    reference = tmp_path / "reference.jsonl"
    reference.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(RecipeError, match=r"1 rows, expected 2 or more"):
        scores({"model": str(run), "reference": str(reference)})
