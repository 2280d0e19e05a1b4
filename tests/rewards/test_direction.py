"""Rewards along a direction: what is selected, and what is refused."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from alignkit.core import DataError
from alignkit.core.config import CombineConfig
from alignkit.core.rng import generator
from alignkit.core.types import Completion, Group
from alignkit.rewards.combine import along, directed
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.pipeline import build_sources, score_groups
from alignkit.rewards.transforms import WhitenConfig, build_transform

DIRECTION = CombineConfig(mode="direction")
RNG = generator(0, "direction tests")
POINTS = [[(RNG.gauss(0, 1), RNG.gauss(0, 1)) for _ in range(8)] for _ in range(20)]
"""20 prompts with 8 answers each: their two rewards. An answer's text is its number."""


def first(completions, point):
    return [one[int(text)][0] for text, one in zip(completions, point, strict=True)]


def second(completions, point):
    return [one[int(text)][1] for text, one in zip(completions, point, strict=True)]


def some(completions):
    return [1.0 if text == "0" else None for text in completions]


def sources(*names, **keys):
    return build_sources([RewardConfig(name=f"{__name__}:{name}", **keys) for name in names])


def scored(points, vector, rewards=None, combine=DIRECTION) -> list[list[float]]:
    """The reward of every answer, by prompt."""
    groups = [
        Group(
            str(i),
            [{"role": "user", "content": "p"}],
            [1],
            [Completion(str(j), [5]) for j in range(len(point))],
            {"point": point, "direction": vector},
            plain=True,
        )
        for i, point in enumerate(points)
    ]
    score_groups(groups, rewards or sources("first", "second"), 0, stop_ids=[], combine=combine)
    return [[completion.reward for completion in group.completions] for group in groups]


def best(rewards: list[list[float]]) -> list[int]:
    return [row.index(max(row)) for row in rewards]


def test_the_reward_is_the_projection_on_the_direction():
    assert scored([[(2.0, 1.0), (-1.0, 3.0)]], [3, 4]) == [[pytest.approx(2.0), pytest.approx(1.8)]]


@pytest.mark.parametrize(("vector", "name"), [([1.0, 0.0], "first"), ([0.0, 1.0], "second")])
def test_a_direction_of_one_reward_selects_by_that_reward(vector, name):
    alone = scored(POINTS, None, sources(name), CombineConfig())
    assert scored(POINTS, vector) == alone


def test_the_choice_depends_neither_on_length_nor_on_what_all_answers_share():
    vector = [0.6, -0.8]
    chosen = best(scored(POINTS, vector))
    assert best(scored(POINTS, [97 * x for x in vector])) == chosen
    moved = [[(a + 4.0 * i, b - 3.0 * i) for a, b in point] for i, point in enumerate(POINTS)]
    assert best(scored(moved, vector)) == chosen
    assert best(scored(POINTS, [0.6, 0.8])) != chosen


def upper_hull(points):
    """The answers that are best for some direction with a first weight above 0: the hull's right side."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))
    hull: list[int] = []
    for i in order:
        while len(hull) > 1:
            (ax, ay), (bx, by), (cx, cy) = (points[j] for j in (*hull[-2:], i))
            if (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) > 0:  # the middle one stands out to the right
                break
            hull.pop()
        hull.append(i)
    return hull


@pytest.mark.parametrize("angle", [-85, -45, 0, 30, 45, 85])
def test_what_is_selected_stands_on_the_hull_and_above_the_mean(angle):
    vector = [math.cos(math.radians(angle)), math.sin(math.radians(angle))]
    rewards = scored(POINTS, vector)
    for point, row, chosen in zip(POINTS, rewards, best(rewards), strict=True):
        hull = upper_hull(point)
        assert all(point[a][1] < point[b][1] for a, b in pairwise(hull))
        assert chosen in hull
        assert row[chosen] >= sum(row) / len(row)


def test_an_answer_that_lacks_a_reward_its_direction_asks_for_has_none():
    rewards = sources("first", "some")
    found = scored([[(2.0, 0.0), (5.0, 0.0)]], [1.0, 1.0], rewards)[0]
    assert found[0] == pytest.approx(3.0 / math.sqrt(2))
    assert math.isnan(found[1])
    assert scored([[(2.0, 0.0), (5.0, 0.0)]], [2.0, 0.0], rewards) == [[2.0, 5.0]]


def test_a_reward_that_is_only_logged_has_no_entry():
    logged = [*sources("first", "second"), *sources("some", weight=0.0)]
    assert scored(POINTS, [0.6, 0.8], logged) == scored(POINTS, [0.6, 0.8])
    weights = directed(torch.tensor([2.0, 0.0, 1.0]).double(), [[3, -4]], ["a"])
    assert weights.tolist() == [pytest.approx([1.2, 0.0, -0.8])]
    nothing, known = along(torch.tensor([[1.0, math.nan, 2.0]]).double(), torch.tensor([[True, False, True]]), weights)
    assert (nothing.tolist(), known.tolist()) == ([pytest.approx(-0.4)], [True])


@pytest.mark.parametrize(
    "vector", [None, "0.6 0.8", [0.6], [0.6, 0.8, 0.0], [0, 0], [0.6, math.inf], [0.6, "0.8"]], ids=str
)
def test_a_column_that_is_no_direction_is_refused(vector):
    with pytest.raises(DataError, match=r"group '0' has .* in the column 'direction', expected 2 numbers, not all 0"):
        scored(POINTS, vector)


def test_a_round_without_groups_has_no_rewards():
    assert score_groups([], sources("first", "second"), 0, stop_ids=[], combine=DIRECTION) == []


def test_advantages_have_no_direction():
    with pytest.raises(ValidationError, match="mode: direction has nothing to combine"):
        CombineConfig(level="advantage", mode="direction")


def test_whitening_by_given_moments_takes_every_score_by_itself():
    def applied(*scores, **keys):
        column = torch.tensor(scores, dtype=torch.float64)
        config = WhitenConfig(name="whiten", mean=3.0, std=2.0, **keys)
        return build_transform(config).apply(column, column == column, None, None).tolist()

    assert applied(5.0) == [1.0]
    assert applied(5.0, 0.0) == [1.0, -1.5]
    assert applied(5.0, 0.0, shift_mean=False) == [4.0, 1.5]
    with pytest.raises(ValidationError, match="needs `mean` and `std`, or neither"):
        WhitenConfig(name="whiten", mean=3.0)
