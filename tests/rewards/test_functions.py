"""Plain functions as reward sources."""

import asyncio
import functools
from dataclasses import replace

import pytest
import torch

from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.types import RewardBatch
from alignkit.rewards.functions import FunctionReward


def rows(**columns):
    return RewardBatch(
        prompts=[[{"role": "user", "content": "p"}]] * 3,
        completions=["a", "bb", "ccc"],
        completion_ids=torch.tensor([[1, 0, 0], [1, 2, 0], [1, 2, 3]]),
        completion_mask=torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool(),
        group=torch.tensor([0, 0, 1]),
        columns=columns,
        step=0,
        ended=torch.tensor([True, True, False]),
        plain=[True] * 3,
    )


def length(completions):
    return [len(text) for text in completions]


def test_only_named_parameters_are_passed():
    output = FunctionReward(length, "length").score(rows(answer=[7, 8, 9]), None)
    assert output.score.tolist() == [1.0, 2.0, 3.0]
    assert output.score.dtype == torch.float32
    assert output.valid.tolist() == [True, True, True]


def test_columns_and_token_lists_arrive_by_name():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, unused=5):
        seen.update(prompts=prompts, ids=completion_ids, answer=answer, unused=unused)
        return [0.0] * len(completions)

    source = FunctionReward(reward, "reward")
    source.score(rows(answer=[7, 8, 9], other=[0, 0, 0]), None)
    assert source.requires == ("answer",)
    assert seen["ids"] == [[1], [1, 2], [1, 2, 3]]
    assert seen["answer"] == [7, 8, 9]
    assert seen["unused"] == 5
    assert seen["prompts"][0] == "p"


def test_a_function_with_kwargs_gets_everything():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [0, 0, 0]

    source = FunctionReward(reward, "reward")
    source.score(rows(answer=[7, 8, 9]), None)
    assert source.requires == ()
    assert set(seen) == {"prompts", "completions", "completion_ids", "answer"}


async def slow(completions):
    await asyncio.sleep(0)
    return [1.0] * len(completions)


def test_async_functions_are_awaited_inside_and_outside_a_loop():
    source = FunctionReward(slow, "slow")
    assert source.score(rows(), None).score.tolist() == [1.0] * 3

    async def notebook():
        return source.score(rows(), None).score.tolist()

    assert asyncio.run(notebook()) == [1.0] * 3


def test_none_is_invalid_and_counts_nothing():
    output = FunctionReward(lambda completions: [None, 2.5, True], "partly").score(rows(), None)
    assert output.valid.tolist() == [False, True, True]
    assert output.score.tolist() == [0.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, float("nan"), 2.0], r"'judge' returned nan for row 1 \(completion 'bb'\)"),
        ([1.0, 2.0, float("inf")], r"'judge' returned inf for row 2"),
        ([1.0, "good", 2.0], r"'judge' returned 'good' for row 1"),
        ([1.0, 10**400, 2.0], r"'judge' returned 1000*\d* for row 1"),
        ([1.0, 2.0], r"'judge' returned 2 values for 3 completions"),
        (0.5, r"'judge' returned float; expected a list"),
        ({}, r"'judge' returned dict; expected a list"),
        ({"a": 1}, r"'judge' returned int in 'a'; expected a list"),
        ({"a": [1, 2]}, r"'judge' returned 2 values in 'a' for 3 completions"),
        ({"a": [1, 2, float("nan")]}, r"'judge' returned nan for row 2 \(completion 'ccc'\) in 'a'"),
        ([[1, 2], [1], [1, 2]], r"'judge' returned \[1\] for row 1 \(completion 'bb'\) and 2 numbers for another"),
        ("abc", r"'judge' returned str; expected a list"),
    ],
)
def test_unusable_answers_name_the_function_and_the_row(answer, message):
    with pytest.raises(RunFailed, match=message):
        FunctionReward(lambda completions: answer, "judge").score(rows(), None)


def test_an_error_inside_the_function_comes_through():
    def broken(completions):
        raise KeyError("inner")

    with pytest.raises(KeyError, match="inner"):
        FunctionReward(broken, "broken").score(rows(), None)


def test_positional_only_functions_are_refused():
    def reward(completions, /):
        return [0.0 for _ in completions]

    with pytest.raises(RecipeError, match="completions are positional-only"):
        FunctionReward(reward, "reward")


def test_partials_and_callable_objects_work():
    def scaled(completions, factor):
        return [factor * len(text) for text in completions]

    source = FunctionReward(functools.partial(scaled, factor=2), "scaled")
    assert source.requires == ()
    assert source.score(rows(), None).score.tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ({"good": [1, 2, None], "short": [3, 4, None]}, ["good", "short"]),
        ([[1, 3], (2, 4), None], ["0", "1"]),
        (torch.tensor([[1.0, 3.0], [2.0, 4.0], [0.0, 0.0]]), ["0", "1"]),
    ],
)
def test_vectors_become_components_and_their_sum_the_score(answer, names):
    output = FunctionReward(lambda completions: answer, "several").score(rows(), None)
    assert output.score.tolist() == [4.0, 6.0, 0.0]
    assert [output.components[name].tolist() for name in names] == [[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]
    assert output.valid.tolist() == [True, True, isinstance(answer, torch.Tensor)]


def test_what_a_function_logs_is_kept_and_its_hooks_are_no_columns():
    def reward(completions, trainer_state, log_extra, log_metric):
        log_extra("seen", completions)
        log_metric("step", trainer_state.global_step)
        return [0.0] * len(completions)

    source = FunctionReward(reward, "logging")
    batch = rows()
    batch.step = 7
    output = source.score(batch, None)
    assert source.requires == ()
    assert output.components["step"].tolist() == [7.0] * 3
    assert [note["seen"] for note in output.info] == ["a", "bb", "ccc"]


def test_logged_columns_have_a_value_for_each_completion():
    def reward(completions, log_extra):
        log_extra("seen", ["one"])
        return [0.0] * len(completions)

    with pytest.raises(RunFailed, match="'logging' logged 1 values as 'seen' for 3 completions"):
        FunctionReward(reward, "logging").score(rows(), None)


def test_a_late_coroutine_is_cancelled():
    ended = []

    async def hangs(completions):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        FunctionReward(hangs, "hangs", timeout=0.05).score(rows(), None)
    assert ended == [True]


def test_rows_of_turns_arrive_as_turns():
    seen = {}

    def reward(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    FunctionReward(reward, "reward").score(replace(rows(), plain=[False] * 3), None)
    assert seen["prompts"][0] == [{"role": "user", "content": "p"}]
    assert seen["completions"][1] == [{"role": "assistant", "content": "bb"}]
