"""Self-rewarding: its pairs, its rounds, and what a judge that says nothing leaves of them."""

import json

import pytest

from alignkit import testing
from alignkit.algorithms.self_rewarding import SelfRewarding, SelfRewardingConfig
from alignkit.core import Completion, Group, RunFailed
from alignkit.core.errors import RecipeError
from alignkit.recipe import load_recipe


def indifferent(completions, **columns):
    """A judge to whom everything is the same."""
    return [0.5] * len(completions)


def by_content(completions, **columns):
    """A judge whose verdicts have nothing to do with what it is shown."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def group(rewards):
    answers = [Completion(str(i), [i + 2], reward=x, version=0, ended=True) for i, x in enumerate(rewards)]
    return Group("g", [], [1], answers)


def test_its_pair_is_the_best_and_the_worst():
    algorithm = SelfRewarding(SelfRewardingConfig(name="x"))
    pairs = algorithm.build([group([0.0, 2.0, 2.0, -1.0]), group([1.0, 1.0]), group([1.0, float("nan")])])
    assert [[row.tokens[-1] - 2 for row in pair] for pair in pairs] == [[1, 3]]


def test_a_judge_that_knows_no_difference_teaches_nothing(tmp_path):
    bench = testing.Bench("self_rewarding", folder=tmp_path)
    recipe = bench.recipe("run", max_steps=2, num_epochs=2)
    judged = recipe.rewards[0].model_copy(update={"name": f"{__name__}:indifferent"})
    with pytest.raises(RunFailed, match="no row gave anything to train on"):
        testing.train(recipe.model_copy(update={"rewards": [judged]}), quiet=True, report=False)


def recipe_of(tmp_path, name, algorithm=None, **blocks):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {'abc'[i % 3]}"}) + "\n" for i in range(10)))
    return load_recipe(
        {
            "output_dir": str(tmp_path / name),
            "model": {"name_or_path": str(testing.build_tiny_model(tmp_path / "model")), "dtype": "float32"},
            "data": [{"path": str(rows)}],
            "algorithm": {"name": name, **(algorithm or {})},
            "rewards": [{"name": f"{__name__}:by_content"}],
            "rollout": {"num_generations": 4, "max_completion_length": 8},
            "train": {"batch_size": 2, "max_length": 64, "learning_rate": 1e-3, "num_epochs": 2},
            **blocks,
        }
    )


def test_rounds_share_the_prompts_and_online_dpo_answers_as_many_as_a_step_takes(tmp_path):
    """Ten prompts: three rounds of four or fewer, against two at a time."""
    online = testing.train(recipe_of(tmp_path, "online_dpo"), quiet=True, report=False)
    rounds = testing.train(recipe_of(tmp_path, "self_rewarding"), quiet=True, report=False)
    begun = [sum("reward" in record for record in testing.read_metrics(run.folder)) for run in (rounds, online)]
    assert begun[0] == 3
    assert rounds.steps <= 5  # ceil(4 / 2) + ceil(4 / 2) + ceil(2 / 2)
    assert 5 < begun[1] == online.steps <= 10
    margins = [record["rewards/margins"] for record in testing.read_metrics(rounds.folder) if "reward" in record]
    assert margins == pytest.approx([0.0] * 3, abs=1e-5)  # the reference is where the round began
    drifted = [record["rewards/margins"] for record in testing.read_metrics(online.folder)]
    assert max(map(abs, drifted[1:])) > 1e-4  # there it is the start


def test_a_reference_that_moves_may_be_held(tmp_path):
    """`refresh: never` is the other reading of the paper."""
    recipe = recipe_of(tmp_path, "self_rewarding", models={"reference": {"refresh": "never"}})
    run = testing.train(recipe, quiet=True, report=False).folder
    begun = [record["rewards/margins"] for record in testing.read_metrics(run) if "reward" in record]
    assert begun[0] == pytest.approx(0.0, abs=1e-5)
    assert max(map(abs, begun[1:])) > 1e-4


def test_a_model_that_nobody_asks_is_a_mistake(tmp_path):
    with pytest.raises(RecipeError, match="uses no model 'teacher'"):
        recipe_of(tmp_path, "self_rewarding", models={"teacher": {"from": "policy"}})
