"""Rewards for several answers in one completion: what finding the right one is worth, over what the search cost.

2025, arXiv 2508.05731 (InfiGUI-G1, AEPO). Deviations from its code: equal answers count once, before anything else is
looked at; more than `max_answers` are malformed; an empty list is worth −1 unless `empty_list_score` says otherwise, in
theirs 0; three points are in line by the area between them, not by comparing products.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import isfinite, sqrt
from typing import Any, ClassVar

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import DataError
from alignkit.core.lazy import torch
from alignkit.core.registry import register
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.calls import select_rows
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.pipeline import build_sources

THINKING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
MALFORMED = -1.0
"""The score of a completion that no answers can be read off."""
PARTS = ("num_pred", "has_correct", "first_correct", "only_correct", "format")

Point = tuple[float, float]


class SearchConfig(Config):
    """Keys of every reward for several answers."""

    max_answers: int = Field(8, ge=1, description="a longer list is malformed; ours")
    empty_list_score: float = Field(-1.0, description="of a list without answers; in the authors' code 0")
    format_score: float = Field(1.0, description="added to every completion that is well formed")


class PointsConfig(SearchConfig):
    """Keys of `aer_point`."""

    column: str = Field("ground_truth", description="data column of the box {x1, y1, x2, y2}")
    no_think_column: str = Field("no_think", description="where this column is true no thinking is asked for")
    collinear_penalty: bool = Field(True, description="three points in line are malformed: they scan, not search")
    min_area: float = Field(1e-6, ge=0, description="three points are in line if twice their area is no more")


class AnswersConfig(SearchConfig):
    """Keys of `aer`."""

    verifier: str = Field("exact", description="the reward, by name, that says which answer is right: above ½")
    args: dict[str, Any] = Field({}, description="that reward's own keys")
    separator: str | None = Field(
        None, description="between answers; null = they are a JSON list; '' = each character is one"
    )
    think: bool = Field(False, description="answers stand behind a block <think>…</think>, once and filled")


@dataclass(frozen=True)
class Search:
    """What a completion proposed: which of its different answers are right, in its order; None = malformed."""

    right: list[bool] | None
    collinear: bool = False


def exploration_score(count: int, first: int | None) -> float:
    """±1 over the cost of the search: 1/√(N·k), −1/N without a hit, −1 without answers.

    Args: N = `count` of answers, k = `first`, the place of the first right one from 1; None = none is.

    Source: arXiv 2508.05731.
    """
    if not count:
        return -1.0
    return -1.0 / count if first is None else 1.0 / sqrt(count * first)


def behind_thinking(text: str) -> str | None:
    """What follows the thinking that a text begins with; None unless there is some, once and not empty."""
    found = THINKING.fullmatch(text)
    if found is None or not found[1].strip() or text.count("<think>") > 1 or text.count("</think>") > 1:
        return None
    return found[2]


def read_list(text: str) -> list[Any] | None:
    """The only JSON list of a text, a code fence around it or not; None where there is none."""
    start, end = text.find("["), text.rfind("]")
    if start < 0:
        return None
    try:
        found = json.loads(text[start : end + 1])
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def read_points(text: str) -> list[Point] | None:
    """Points of a JSON list of {"point_2d": [x, y]}; None where one is not of this form."""
    listed = read_list(text)
    if listed is None:
        return None
    points: list[Point] = []
    for item in listed:
        point = item.get("point_2d") if isinstance(item, Mapping) else None
        if not isinstance(point, list) or len(point) != 2 or not all(_is_number(x) for x in point):
            return None
        points.append((float(point[0]), float(point[1])))
    return points


def are_collinear(points: Sequence[Point], min_area: float) -> bool:
    """Whether any three points span no more than `min_area`, twice the area of their triangle."""
    return any(
        abs((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])) <= min_area
        for a, b, c in combinations(points, 3)
    )


@register.reward("aer_point")
class AdaptivePoints:
    """Points in one completion, paid by how soon one hits the box of the data and how few there are."""

    config_type: ClassVar[type[Config]] = PointsConfig

    def __init__(self, config: PointsConfig) -> None:
        self.config = config
        self.requires: tuple[str, ...] = (config.column,)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; not valid where the data has no box."""
        del models
        boxes = rows.columns[self.config.column]
        silent = rows.columns.get(self.config.no_think_column, [False] * len(boxes))
        return _output(
            [
                None if box is None else self._search(text, _box(box), bool(quiet))
                for text, box, quiet in zip(rows.completions, boxes, silent, strict=True)
            ],
            self.config,
        )

    def _search(self, text: str, box: tuple[float, float, float, float], quiet: bool) -> Search:
        answered = text if quiet else behind_thinking(text)
        points = None if answered is None else read_points(answered)
        if points is None:
            return Search(None)
        points = list(dict.fromkeys(points))
        if len(points) > self.config.max_answers:
            return Search(None)
        if self.config.collinear_penalty and are_collinear(points, self.config.min_area):
            return Search(None, collinear=True)
        left, top, right, bottom = box
        return Search([left <= x <= right and top <= y <= bottom for x, y in points])


@register.reward("aer")
class AdaptiveAnswers:
    """Several answers in one completion, paid by how soon a right one comes and how few there are."""

    config_type: ClassVar[type[Config]] = AnswersConfig

    def __init__(self, config: AnswersConfig) -> None:
        self.config = config
        ((_, self._verifier),) = build_sources([RewardConfig(name=config.verifier, args=config.args)])
        self.requires = self._verifier.requires

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; not valid where the verifier has nothing to say of an answer."""
        answers = [self._answers(text) for text in rows.completions]
        places = [row for row, found in enumerate(answers) for _ in found or ()]
        texts = [answer for found in answers for answer in found or ()]
        right: list[list[bool]] = [[] for _ in answers]
        known = [True] * len(answers)
        if texts:
            asked = replace(select_rows(rows, places), completions=texts, completion_ids=None, completion_mask=None)
            said = self._verifier.score(asked, models)
            for row, score, valid in zip(places, said.score.tolist(), said.valid.tolist(), strict=True):
                right[row].append(score > 0.5)
                known[row] = known[row] and valid
        searches = [
            None if not ok else Search(None if found is None else hits)
            for found, hits, ok in zip(answers, right, known, strict=True)
        ]
        return _output(searches, self.config)

    def _answers(self, text: str) -> list[str] | None:
        """The different answers of a completion, in order; None where it is malformed."""
        answered = behind_thinking(text) if self.config.think else text
        if answered is None:
            return None
        if self.config.separator is None:
            listed = read_list(answered)
            if listed is None:
                return None
            answers = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in listed]
        else:
            parts = answered.split(self.config.separator) if self.config.separator else list(answered)
            answers = [part.strip() for part in parts if part.strip()]
        answers = list(dict.fromkeys(answers))
        return answers if len(answers) <= self.config.max_answers else None


def _output(searches: Sequence[Search | None], config: SearchConfig) -> RewardOutput:
    """Scores and parts; None = nothing to say."""
    score = [0.0 if search is None else _score(search, config) for search in searches]
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    for search in searches:
        right = (search.right if search is not None else None) or []
        parts["num_pred"].append(float(len(right)))
        parts["has_correct"].append(float(any(right)))
        parts["first_correct"].append(float(right[:1] == [True]))
        parts["only_correct"].append(float(right == [True]))
        parts["format"].append(float(search is not None and search.right is not None))
    if isinstance(config, PointsConfig):
        parts["collinear"] = [float(search is not None and search.collinear) for search in searches]
    return RewardOutput(
        score=torch.tensor(score),
        valid=torch.tensor([search is not None for search in searches], dtype=torch.bool),
        components={name: torch.tensor(values) for name, values in parts.items()},
    )


def _score(search: Search, config: SearchConfig) -> float:
    if search.right is None:
        return MALFORMED
    if not search.right:
        return config.empty_list_score
    first = search.right.index(True) + 1 if any(search.right) else None
    return config.format_score + exploration_score(len(search.right), first)


def _box(value: Any) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(value[name]) for name in ("x1", "y1", "x2", "y2"))
    except (KeyError, TypeError, ValueError):
        raise DataError(f"reward 'aer_point': {value!r} is no box; expected {{x1, y1, x2, y2}}") from None
    return left, top, right, bottom


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and isfinite(x)
