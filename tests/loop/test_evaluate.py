"""Samples against a fixed opponent: the win rate by hand, and whose answers it compares with."""

import json
from collections.abc import Mapping
from math import nan, sqrt
from pathlib import Path
from typing import Any

import pytest

from alignkit.core.errors import DataError
from alignkit.core.types import NAN, Completion, Group
from alignkit.loop.evaluate import chosen_answers, win_rate
from alignkit.recipe import Recipe, load_recipe
from alignkit.run import resume, train
from alignkit.testing import Bench, Killed, comparable_metrics, killed_at, read_metrics


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        # outcomes 1, ½, 0: mean ½, variance (¼ + 0 + ¼) / 2, divided by 3 prompts
        ([3.0, 2.0, 1.0], [2.0, 2.0, 2.0], {"eval_win_rate": 0.5, "eval_win_rate/standard_error": sqrt(0.25 / 3)}),
        # 1, 1, 1, 0: mean ¾, variance (3/16 + 9/16) / 3 = ¼, divided by 4
        ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0], {"eval_win_rate": 0.75, "eval_win_rate/standard_error": 0.25}),
        ([1.0, 1.0], [1.0, 1.0], {"eval_win_rate": 0.5, "eval_win_rate/standard_error": 0.0}),
        ([1.0, nan, 5.0], [0.0, 0.0, nan], {"eval_win_rate": 1.0}),  # one prompt has no spread
        ([nan], [1.0], {}),
    ],
)
def test_win_rate_by_hand(ours: list[float], theirs: list[float], expected: Mapping[str, float]) -> None:
    found = win_rate(
        {f"p{i}": reward for i, reward in enumerate(ours)}, {f"p{i}": reward for i, reward in enumerate(theirs)}
    )
    assert found == pytest.approx(expected)


def test_a_prompt_the_opponent_did_not_answer_is_left_out() -> None:
    assert win_rate({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.0}) == {"eval_win_rate": 1.0}


def group(name: str, prompt: int, *answers: tuple[str, float], **fields: Any) -> Group:
    completions = [Completion(text=text, tokens=[1], reward=reward) for text, reward in answers]
    return Group(id=name, messages=[], prompt=[prompt], completions=completions, fields=fields)


def asked(*groups: Group) -> list[Group]:
    return [Group(id=g.id, messages=[], prompt=g.prompt) for g in groups]


def texts(found: list[Group]) -> list[tuple[str, list[str]]]:
    return [(g.id, [c.text for c in g.completions]) for g in found]


def test_the_answer_the_data_prefers() -> None:
    groups = [
        group("pair", 1, ("worse", 0.0), ("better", 1.0)),
        group("ranked", 2, ("low", -3.0), ("high", -1.0), ("middle", -2.0)),
        group("demonstration", 3, ("given", NAN)),
        group("bad", 4, ("bad", 0.0), label=False),
        group("good", 4, ("good", 1.0), label=True),
        group("only bad", 5, ("bad", 0.0), label=False),
        group("bare", 6),
    ]
    found = chosen_answers(asked(*(groups[i] for i in (0, 1, 2, 3, 5, 6))), groups)
    assert texts(found) == [
        ("pair", ["better"]),
        ("ranked", ["high"]),
        ("demonstration", ["given"]),
        ("bad", ["good"]),  # under the id of the prompt that is sampled from
    ]
    assert [c.reward for c in groups[0].completions] == [0.0, 1.0]  # what the loss learns from is left alone
    assert all(g.completions[0].reward != g.completions[0].reward for g in found)


def test_no_answer_to_compare_with_is_refused() -> None:
    bare = group("bare", 1)
    with pytest.raises(DataError, match=r"eval.opponent: chosen compares samples with the answers of eval.data"):
        chosen_answers(asked(bare), [bare])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench("dpo", folder=tmp_path_factory.mktemp("evaluate"))


def recipe(bench: Bench, run: str, opponent: str) -> Recipe:
    base = bench.recipe(run, max_steps=2, num_epochs=9, batch_size=3, save_steps=1, learning_rate=1e-2)
    overrides = [
        *(f"eval.data.0.path={bench.data}", "eval.every_steps=1", "eval.num_samples=4", "eval.rewards.0.name=length"),
        "eval.rewards.0.args.unit=characters",
        *("eval.sampling.max_completion_length=12", f"eval.opponent={opponent}", "eval.best_metric=eval_win_rate"),
    ]
    return load_recipe(base.model_dump(mode="json", by_alias=True), overrides)


def sampled(folder: Path) -> dict[int, dict[str, float]]:
    """Step → prompt id → reward, of samples.jsonl."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        found.setdefault(sample["step"], {})[sample["id"]] = sample["reward"]
    return found


def measured(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder) if "eval_loss" in record]


def test_against_the_start_model(bench: Bench) -> None:
    folder = train(recipe(bench, "start", "start"), quiet=True, report=False).folder
    rewards, records = sampled(folder), measured(folder)
    assert records[0]["eval_win_rate"] == 0.5  # its own samples: every pair is a tie
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records:
        assert {n: v for n, v in record.items() if "win_rate" in n} == win_rate(rewards[record["step"]], rewards[0])
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= records[0].keys()


def test_against_the_chosen_answers_and_again_after_a_kill(bench: Bench) -> None:
    asked = recipe(bench, "chosen", "chosen")
    with killed_at(2), pytest.raises(Killed):
        train(asked, quiet=True, report=False)
    folder = resume(asked.output_dir, quiet=True, report=False).folder
    whole = train(recipe(bench, "whole", "chosen"), quiet=True, report=False).folder
    assert comparable_metrics(folder) == comparable_metrics(whole)
    lengths = {row["id"]: float(len(row["chosen"])) for row in bench.rows}
    rewards = sampled(folder)
    for record in measured(folder):
        found = {n: v for n, v in record.items() if "win_rate" in n}
        assert found == pytest.approx(win_rate(rewards[record["step"]], lengths))
    assert len(rewards[0]) == 4
