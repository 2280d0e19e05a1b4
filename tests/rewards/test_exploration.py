"""Rewards for several answers in one completion, by hand."""

import json
from itertools import pairwise

import pytest
import torch

from alignkit.core.errors import DataError, RecipeError
from alignkit.core.types import RewardBatch
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.exploration import exploration_score, read_points
from alignkit.rewards.pipeline import build_sources

BOX = {"x1": 0, "y1": 0, "x2": 10, "y2": 10}
INSIDE, OUTSIDE = [5, 5], [50, 60]


def points(*found, think="because"):
    return f"<think>{think}</think>" + json.dumps([{"point_2d": list(point)} for point in found])


def answer(name, texts, columns, **args):
    ((_, source),) = build_sources([RewardConfig(name=name, args=args)])
    count = len(texts)
    rows = RewardBatch(
        prompts=[[{"role": "user", "content": "where?"}]] * count,
        completions=texts,
        completion_ids=None,
        completion_mask=None,
        group=torch.arange(count),
        columns={key: [value] * count for key, value in columns.items()},
        step=0,
        ended=torch.ones(count, dtype=torch.bool),
    )
    return source.score(rows, None)


def scores(name, texts, columns, **args):
    return answer(name, texts, columns, **args).score.tolist()


def test_success_over_cost():
    assert [exploration_score(*case) for case in ((1, 1), (4, 1), (4, 4), (2, 2))] == [1, 0.5, 0.25, 0.5]
    assert [exploration_score(n, None) for n in (1, 4, 0)] == [-1, -0.25, -1]
    counts = range(1, 9)
    hits = {(n, k): exploration_score(n, k) for n in counts for k in range(1, n + 1)}
    misses = [exploration_score(n, None) for n in counts]
    assert min(hits.values()) > max(misses)
    assert all(hits[n, k] > hits[n, k + 1] for n, k in hits if (n, k + 1) in hits)
    assert all(hits[n, k] > hits[n + 1, k] for n, k in hits if (n + 1, k) in hits)
    assert all(less < more for less, more in pairwise(misses))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (points(INSIDE), 2.0),
        (points(OUTSIDE), 0.0),
        (points(OUTSIDE, INSIDE), 1.5),
        (points(OUTSIDE, [80, 20], INSIDE, [1, 70]), 1 + 1 / 12**0.5),
        (points(OUTSIDE, OUTSIDE, OUTSIDE), 0.0),  # one answer, three times
        (points([1, 1], [2, 2], [3, 3]), -1.0),  # in line
        (points([1, 1], [2, 2], [3, 3.1]), 2 + (1 / 3**0.5 - 1)),
        (points(think=""), -1.0),
        (points(), -1.0),
        (points(INSIDE, think=""), -1.0),
        (points(INSIDE) + "<think>again</think>", -1.0),
        ("no thinking " + points(INSIDE), -1.0),
        (json.dumps([{"point_2d": INSIDE}]), -1.0),
        ("<think>x</think>```json\n" + json.dumps([{"point_2d": INSIDE}]) + "\n```", 2.0),
        ("<think>[1]</think>[", -1.0),
        ('<think>x</think>[{"point_2d": ["5", 5]}]', -1.0),
        ('<think>x</think>[{"point_2d": [5, NaN]}]', -1.0),
        ('<think>x</think>[{"point": [5, 5]}]', -1.0),
        (points(*([i, i * i] for i in range(9))), -1.0),  # more than eight
    ],
)
def test_points(text, expected):
    assert scores("aer_point", [text], {"ground_truth": BOX}) == pytest.approx([expected])


def test_settings_of_points():
    quiet = json.dumps([{"point_2d": INSIDE}])
    assert scores("aer_point", [quiet], {"ground_truth": BOX, "no_think": True}) == [2.0]
    line = points([1, 1], [2, 2], [3, 3])
    assert scores("aer_point", [line], {"ground_truth": BOX}, collinear_penalty=False) == pytest.approx([1 + 3**-0.5])
    assert scores("aer_point", [points()], {"ground_truth": BOX}, empty_list_score=0.0) == [0.0]
    assert scores("aer_point", [points(INSIDE)], {"ground_truth": BOX}, format_score=0.0) == [1.0]
    assert scores("aer_point", [points(INSIDE, OUTSIDE)], {"ground_truth": BOX}, max_answers=1) == [-1.0]
    assert not answer("aer_point", [points(INSIDE)], {"ground_truth": None}).valid.any()
    with pytest.raises(DataError, match="is no box"):
        scores("aer_point", [points(INSIDE)], {"ground_truth": [1, 2]})


def test_what_is_logged_of_points():
    texts = [points(OUTSIDE, INSIDE), points(INSIDE), points([1, 1], [2, 2], [3, 3])]
    found = answer("aer_point", texts, {"ground_truth": BOX}).components
    assert {name: values.tolist() for name, values in found.items()} == {
        "num_pred": [2, 1, 0],
        "has_correct": [1, 1, 0],
        "first_correct": [0, 1, 0],
        "only_correct": [0, 1, 0],
        "format": [1, 1, 0],
        "collinear": [0, 0, 1],
    }


def test_points_survive_being_written():
    assert read_points(points((1.0, 2.5), (3.0, 4.0)).partition("</think>")[2]) == [(1.0, 2.5), (3.0, 4.0)]


@pytest.mark.parametrize(
    ("text", "args", "expected"),
    [
        ('["x", "y"]', {}, 1 + 2**-0.5),
        ('["y", "X"]', {}, 1.5),
        ('["y", "z"]', {}, 0.5),
        ('["y", "y", "z"]', {}, 0.5),
        ("[]", {}, -1.0),
        ("x", {}, -1.0),
        ("y, x", {"separator": ","}, 1.5),
        ("yx", {"separator": ""}, 1.5),
        ("", {"separator": ""}, -1.0),
        ("abcde", {"separator": "", "max_answers": 4}, -1.0),
        ('<think>hm</think>["x"]', {"think": True}, 2.0),
        ('["x"]', {"think": True}, -1.0),
        ('["it is x"]', {"verifier": "regex", "args": {"pattern": "x$"}}, 2.0),
        ("[4, 7]", {"verifier": "regex", "args": {"pattern": "^7$"}}, 1.5),
    ],
)
def test_answers(text, args, expected):
    assert scores("aer", [text], {"answer": "x"}, **args) == pytest.approx([expected])


def test_answers_of_several_rows_keep_to_their_own():
    found = answer("aer", ['["x"]', "broken", '["y", "x"]', "[]"], {"answer": "x"})
    assert found.score.tolist() == pytest.approx([2.0, -1.0, 1.5, -1.0])
    assert found.components.keys() == {"num_pred", "has_correct", "first_correct", "only_correct", "format"}
    assert not answer("aer", ['["x"]'], {"answer": None}).valid.any()
    with pytest.raises(RecipeError, match="unknown reward 'exakt'"):
        build_sources([RewardConfig(name="aer", args={"verifier": "exakt"})])
