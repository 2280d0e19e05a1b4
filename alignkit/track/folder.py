"""What a run folder says of a run: the one reader of its files, and the numbers the report draws from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from alignkit.core.errors import DataError, RecipeError
from alignkit.core.rng import key

Curve = list[tuple[int, float]]
"""(optimizer step, value) in step order."""

BOOTSTRAP_DRAWS = 2000
HIGHER_IS_BETTER = ("accuracies", "accuracy", "margins", "margin", "win_rate", "reward")
LOWER_IS_BETTER = ("loss",)


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it; None, or an empty list, where a file is not there.

    `rounds`: the lines of rounds.jsonl that are about a round as a whole.
    """

    path: Path
    recipe_text: str
    recipe: dict[str, Any]
    departures: dict[str, Any] | None
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    data_report: list[dict[str, Any]] | None
    lock: dict[str, Any] | None
    best: dict[str, Any] | None
    rounds: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def algorithm(self) -> str:
        """The method's registered name; 'unknown' when the folder holds no recipe."""
        return str(self.recipe.get("algorithm", {}).get("name", "unknown"))

    def metrics(self) -> list[str]:
        """Names of all logged numbers, in the order they first appear."""
        return list(dict.fromkeys(name for record in self.records for name in record if name != "step"))

    def curve(self, metric: str) -> Curve:
        """All values of one metric."""
        return [(record["step"], float(record[metric])) for record in self.records if metric in record]

    def samples_at(self, step: int) -> dict[str, dict[str, Any]]:
        """The samples of one step by prompt id; a prompt sampled twice has ids `id` and `id#2`."""
        found: dict[str, dict[str, Any]] = {}
        for sample in self.samples:
            if sample["step"] == step:
                name, count = str(sample["id"]), 1
                while (name if count == 1 else f"{name}#{count}") in found:
                    count += 1
                found[name if count == 1 else f"{name}#{count}"] = sample
        return found

    def sample_steps(self) -> list[int]:
        """The steps at which samples were drawn, ascending."""
        return sorted({sample["step"] for sample in self.samples})


def read_run(path: Path) -> RunFolder:
    """Read a run folder. Raises RecipeError when it is none, DataError when one of its files is damaged."""
    if not (path / "metrics.jsonl").is_file() and not (path / "recipe.resolved.yaml").is_file():
        raise RecipeError(_not_a_run(path))
    recipe_file = path / "recipe.resolved.yaml"
    return RunFolder(
        path=path,
        recipe_text=recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else "",
        recipe=_yaml(recipe_file) or {},
        departures=_yaml(path / "departures.yaml"),
        records=read_lines(path / "metrics.jsonl"),
        samples=read_lines(path / "samples.jsonl"),
        data_report=_json(path / "data_report.json"),
        lock=_json(path / "run.lock"),
        best=_json(path / "best.json"),
        rounds=[line for line in read_lines(path / "rounds.jsonl") if "metrics" in line],
    )


def better(metric: str) -> str | None:
    """'max' or 'min' where one end of the scale is plainly the good one, else None."""
    last = metric.removeprefix("eval_").rsplit("/", 1)[-1]
    if last in HIGHER_IS_BETTER:
        return "max"
    return "min" if last in LOWER_IS_BETTER else None


@dataclass(frozen=True)
class WinRate:
    """How often later samples score higher than earlier ones of the same prompt; a tie is half a win."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def win_rate(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> WinRate | None:
    """The win rate with a 95 % bootstrap interval over prompts; None when no prompt has a reward at both steps."""
    import numpy

    pairs = [(reward_of(before[name]), reward_of(after[name])) for name in before if name in after]
    outcomes = [0.5 if new == old else float(new > old) for old, new in pairs if old is not None and new is not None]
    if not outcomes:
        return None
    draws = numpy.random.default_rng(key(0, "report.win_rate", len(outcomes)))
    resampled = draws.choice(numpy.array(outcomes), size=(BOOTSTRAP_DRAWS, len(outcomes))).mean(axis=1)
    low, high = numpy.quantile(resampled, [0.025, 0.975])
    return WinRate(
        rate=sum(outcomes) / len(outcomes),
        low=float(low),
        high=float(high),
        wins=outcomes.count(1.0),
        ties=outcomes.count(0.5),
        losses=outcomes.count(0.0),
    )


def reward_of(sample: Mapping[str, Any]) -> float | None:
    """The sample's combined reward, None when it was not scored."""
    reward = sample.get("reward")
    return float(reward) if reward is not None and isfinite(reward) else None


def _not_a_run(path: Path) -> str:
    expected = "a run folder holds metrics.jsonl and recipe.resolved.yaml, written by `alignkit train`"
    if not path.is_dir():
        return f"{path}: there is no such folder; {expected}. Check the path: it is the recipe's output_dir."
    inside = sorted(child.parent.name for child in path.glob("*/metrics.jsonl"))
    hint = f" There are runs inside it: {', '.join(inside[:5])}." if inside else ""
    return f"{path} is not a run folder: {expected}, and neither is here.{hint}"


def _yaml(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is damaged: {error}. Restore it, or delete it to do without.") from None
    if found is not None and not isinstance(found, dict):
        raise DataError(f"{path} is damaged: expected a mapping, found {type(found).__name__}. Restore or delete it.")
    return found or {}


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged: {error}. Restore it, or delete it to do without.") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none without it. An unfinished last line, as a killed run leaves, is not read.

    Raises: DataError when a line is no JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found = []
    for position, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {position} is no JSON object: {error.msg}. Remove or repair it.") from None
    return found
