"""What an online run does when a reward, a prompt or a tokenizer is not as it should be: a clear end, nothing lost."""

import json
from pathlib import Path

import pytest

from alignkit import testing
from alignkit.core.errors import RecipeError, RunFailed
from alignkit.recipe import load_recipe
from alignkit.run import resume, train
from alignkit.testing import Bench, comparable_metrics, digest, read_metrics

FAILING = """
import time

broken = {"now": False}
calls = {"count": 0}


def after_three(answer):
    def reward(completions):
        calls["count"] += 1
        good = [sum(letter.isupper() for letter in text) / max(1, len(text)) for text in completions]
        return answer(good) if broken["now"] and calls["count"] > 3 else good
    return reward


def stop(good):
    raise KeyError("no such answer")


def sleep(good):
    time.sleep(5)
    return good


raises = after_three(stop)
hangs = after_three(sleep)
nan = after_three(lambda good: [float("nan"), *good[1:]])
missing = after_three(lambda good: good[:-1])
worded = after_three(lambda good: ["good", *good[1:]])
nothing = after_three(lambda good: None)
silent = after_three(lambda good: [None] * len(good))


def same(completions):
    return [1.0] * len(completions)
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "failing", raising=False)
    return Bench("grpo", folder=tmp_path)


def recipe_of(bench, run, reward, **settings):
    recipe = bench.recipe(run, max_steps=6, **settings)
    return recipe.model_copy(update={"rewards": [load_reward(reward)]})


def load_reward(reward):
    entry = reward if isinstance(reward, dict) else {"name": reward}
    minimal = {
        "output_dir": "x",
        "model": {"name_or_path": "m"},
        "data": [{"path": "d"}],
        "algorithm": {"name": "grpo"},
    }
    sizes = {"train": {"batch_size": 8}, "rewards": [entry]}
    return load_recipe({**minimal, **sizes}).rewards[0]


def failing():
    import failing as module

    return module


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("raises", "failed with KeyError: 'no such answer'"),
        ({"name": "failing:hangs", "timeout": 0.2}, "0.2 s"),
        ("nan", "returned nan for row 0"),
        ("missing", "returned 27 values for 28 completions"),
        ("worded", "returned 'good' for row 0"),
        ("nothing", "returned NoneType"),
    ],
    ids=["raises", "hangs", "nan", "too few", "wrong type", "None in place of a list"],
)
def test_a_broken_reward_ends_the_run_and_costs_nothing(bench, reward, said):
    """The failing round is not taken: mended and resumed, the run ends as one that never failed."""
    entry = reward if isinstance(reward, dict) else f"failing:{reward}"
    whole = train(recipe_of(bench, "whole", entry), quiet=True, report=False).folder
    module = failing()
    module.calls["count"], module.broken["now"] = 0, True
    with pytest.raises(RunFailed) as failure:
        train(recipe_of(bench, "broken", entry), quiet=True, report=False)
    assert said in str(failure.value)
    folder = bench.folder / "broken"
    assert (folder / "checkpoint-3").is_dir()
    module.broken["now"] = False
    resume(folder, quiet=True, report=False)
    assert digest(folder) == digest(whole)
    assert comparable_metrics(folder) == comparable_metrics(whole)


def test_a_reward_without_an_opinion_moves_nothing(bench):
    """None is no score: such completions have no advantage, and are counted."""
    train(recipe_of(bench, "whole", "failing:silent"), quiet=True, report=False)
    module = failing()
    module.calls["count"], module.broken["now"] = 0, True
    train(recipe_of(bench, "silent", "failing:silent"), quiet=True, report=False)
    records = read_metrics(bench.folder / "silent")
    assert [record["rewards/silent/invalid"] for record in records] == [0, 0, 0, 1, 1, 1]
    assert all("reward" not in record for record in records[3:])
    assert all(abs(record["loss/policy"]) < 1e-12 for record in records[3:])


def test_rounds_without_a_group_are_passed_over_and_said(bench, capsys):
    entry = {"name": "failing:raises", "on_error": "drop_group"}
    assert train(recipe_of(bench, "whole", entry), quiet=True, report=False).steps == 6
    module = failing()
    module.calls["count"], module.broken["now"] = 0, True
    assert train(recipe_of(bench, "dropped", entry), report=False).steps == 3
    assert "after step 3: no group is left to learn from" in capsys.readouterr().out


def test_equal_rewards_for_ten_rounds_leave_the_weights_alone(bench):
    """Nothing to learn from: no gradient, no nan, and the log says so."""
    still = Bench("dr_grpo", folder=bench.folder / "still")
    recipe = still.recipe("equal", max_steps=10, weight_decay=0.0)
    recipe = recipe.model_copy(update={"rewards": [load_reward("failing:same")]})
    result = train(recipe, quiet=True, report=False)
    records = read_metrics(result.folder)
    assert [record["frac_reward_zero_std"] for record in records] == [1.0] * 10
    assert all(record["grad_norm"] == 0.0 for record in records)


def test_prompts_longer_than_the_room_for_them_are_cut_and_counted(bench, capsys):
    rows = [{"id": f"long-{i}", "prompt": "abcdefgh" * 20} for i in range(7)]
    long = Bench("grpo", folder=bench.folder / "long", rows=rows)
    result = train(long.recipe("cut", max_steps=1), report=False)
    assert "prompt cut" in capsys.readouterr().out
    assert result.steps == 1


def test_no_room_for_a_prompt_is_refused(bench):
    recipe = json.loads(bench.recipe("room").model_dump_json(by_alias=True))
    recipe["train"]["max_length"] = recipe["rollout"]["max_completion_length"]
    with pytest.raises(RecipeError, match=r"train\.max_length\s+8 tokens leave no room for a prompt"):
        load_recipe(recipe)


def test_a_tokenizer_without_a_token_for_padding_trains(bench):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = Path(bench.model) / name
        if path.is_file():
            settings = {key: x for key, x in json.loads(path.read_text()).items() if key != "pad_token"}
            path.write_text(json.dumps(settings))
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(bench.model).pad_token is None
    assert train(bench.recipe("unpadded", max_steps=2), quiet=True, report=False).steps == 2


def test_a_writer_far_from_the_policy_stops_the_run_before_the_step(bench, monkeypatch):
    from alignkit.rollout.native import NativeEngine

    fill = NativeEngine.fill

    def off(self, groups, n):
        filled = fill(self, groups, n)
        for group in filled:
            for completion in group.completions:
                completion.logps = [logp - 0.5 for logp in completion.logps]
        return filled

    monkeypatch.setattr(NativeEngine, "fill", off)
    with pytest.raises(RunFailed, match=r"differ from the policy's by 0\.5 nats a token"):
        train(bench.recipe("stale", max_steps=2), quiet=True, report=False)
    assert not testing.read_metrics(bench.folder / "stale")
