"""Plain Python functions as reward sources, in the signature TRL users write."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.core.contracts import Models
from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.lazy import torch
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.calls import in_thread

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a function that names `trainer_state` is told: the optimizer step."""

    global_step: int


class FunctionReward:
    """A function `reward(prompts, completions, completion_ids, **columns) -> list[float | None]` as a RewardSource.

    It is called with keywords, and only with those it names, unless it takes `**kwargs`. `prompts` and `completions`
    are strings, or message lists where the data gave turns; `completion_ids` are lists of token ids, every further
    parameter a data set column. It may be `async`; then it is cancelled after `timeout` seconds. None = not applicable
    to this completion (`valid=False`).

    A dict of such lists, or a list of K numbers a completion, is a vector of rewards: its entries become components,
    and their sum the score. A function that names them also gets `trainer_state` (with `global_step`), `log_extra(
    column, values)`, kept as a note beside each score, and `log_metric(name, value)`, which becomes a component.

    Raises:
        RecipeError: the object cannot be called with keywords.
    """

    def __init__(self, function: Callable[..., Any], name: str, timeout: float | None = None) -> None:
        self.function = function
        self.name = name
        self.timeout = timeout
        parameters = inspect.signature(function).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if positional:
            raise RecipeError(
                f"reward {name!r}: its parameters {', '.join(positional)} are positional-only, but rewards are called "
                "with keywords; remove the '/' from its signature"
            )
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._accepted = frozenset(p.name for p in named)
        self._accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.requires: tuple[str, ...] = tuple(p.name for p in named if p.default is p.empty and p.name not in GIVEN)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """Call the function once for all rows.

        Raises:
            RunFailed: it did not return one finite number or None for every completion.
            TimeoutError: it is async and took longer than `timeout`.
        """
        del models
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, float] = {}
        arguments: dict[str, Any] = {**rows.columns, **_texts(rows)}
        if self._accepts_all or "completion_ids" in self._accepted:
            arguments["completion_ids"] = _token_lists(rows)
        if not self._accepts_all:
            arguments = {name: value for name, value in arguments.items() if name in self._accepted}
        hooks = {"trainer_state": TrainerState(rows.step), "log_extra": extra.__setitem__}
        hooks["log_metric"] = metrics.__setitem__
        arguments.update({name: hook for name, hook in hooks.items() if name in self._accepted})
        values = self.function(**arguments)
        if inspect.isawaitable(values):
            values = _wait_for(values, self.timeout)
        output = answer_output(self.name, values, rows.completions)
        for metric, value in metrics.items():
            output.components[metric] = torch.full(output.score.shape, as_number(self.name, value, metric))
        if extra:
            output.info = self._info(extra, len(rows.completions))
        return output

    def _info(self, extra: Mapping[str, list[Any]], size: int) -> list[dict[str, Any]]:
        for column, values in extra.items():
            if len(values) != size:
                raise RunFailed(
                    f"reward {self.name!r} logged {len(values)} values as {column!r} for {size} completions; expected "
                    "one for each"
                )
        return [{column: values[row] for column, values in extra.items()} for row in range(size)]


def _texts(rows: RewardBatch) -> dict[str, list[Any]]:
    """Prompts and completions as the data has them: texts, or lists of turns."""
    plain = rows.plain or [False] * len(rows.prompts)
    return {
        "prompts": [
            (turns[-1].get("content") or "" if turns else "") if text else turns
            for turns, text in zip(rows.prompts, plain, strict=True)
        ],
        "completions": [
            answer if text else [{"role": "assistant", "content": answer}]
            for answer, text in zip(rows.completions, plain, strict=True)
        ],
    }


def answer_output(reward: str, values: Any, completions: Sequence[str]) -> RewardOutput:
    """What a function returned as a RewardOutput: numbers and Nones, or a vector of rewards as dict or matrix.

    Raises:
        RunFailed: it is anything else, naming the reward, the row and its text.
    """
    if isinstance(values, Mapping) and values:
        parts = {str(name): _column(reward, column, completions, f" in {name!r}") for name, column in values.items()}
        return vector_output(parts)
    listed = _listed(reward, values, completions, "")
    if any(isinstance(value, (list, tuple)) for value in listed):
        return vector_output(_matrix(reward, listed, completions))
    return column_output(_column(reward, listed, completions, ""))


def _listed(reward: str, values: Any, completions: Sequence[str], where: str) -> list[Any]:
    if hasattr(values, "tolist"):  # an array or a tensor, wherever it lies
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RunFailed(
            f"reward {reward!r} returned {type(values).__name__}{where}; expected a list with one number or None for "
            f"each of the {len(completions)} completions"
        )
    if len(values) != len(completions):
        raise RunFailed(
            f"reward {reward!r} returned {len(values)} values{where} for {len(completions)} completions; expected one "
            "number or None for each"
        )
    return list(values)


def _column(reward: str, values: Any, completions: Sequence[str], where: str) -> list[float | None]:
    listed = _listed(reward, values, completions, where)
    return [
        None if value is None else as_number(reward, value, f"row {row} (completion {text[:60]!r}){where}")
        for row, (value, text) in enumerate(zip(listed, completions, strict=True))
    ]


def _matrix(reward: str, rows: list[Any], completions: Sequence[str]) -> dict[str, list[float | None]]:
    width = max(len(row) for row in rows if isinstance(row, (list, tuple)))
    for number, row in enumerate(rows):
        if row is not None and not (isinstance(row, (list, tuple)) and len(row) == width):
            raise RunFailed(
                f"reward {reward!r} returned {row!r} for row {number} (completion {completions[number][:60]!r}) and "
                f"{width} numbers for another; expected as many for each"
            )
    columns = [[None if row is None else row[k] for row in rows] for k in range(width)]
    return {str(k): _column(reward, column, completions, f" in {k}") for k, column in enumerate(columns)}


def as_number(reward: str, value: Any, where: str) -> float:
    """A reward's answer as a finite float. Raises RunFailed, saying where it stood."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RunFailed(
            f"reward {reward!r} returned {value!r} for {where}; expected a finite number, or None where it has nothing "
            "to say"
        )
    return number


def column_output(values: list[float | None]) -> RewardOutput:
    """A number or None each as a RewardOutput: None is 0 and not valid."""
    return RewardOutput(
        score=torch.tensor([0.0 if value is None else value for value in values], dtype=torch.float32),
        valid=torch.tensor([value is not None for value in values], dtype=torch.bool),
    )


def vector_output(parts: Mapping[str, list[float | None]]) -> RewardOutput:
    """Named columns as components and their sum as the score; a row is valid where one of them has a number."""
    columns = {name: column_output(values) for name, values in parts.items()}
    return RewardOutput(
        score=torch.stack([column.score for column in columns.values()]).sum(0),
        valid=torch.stack([column.valid for column in columns.values()]).any(0),
        components={name: column.score for name, column in columns.items()},
    )


def _token_lists(rows: RewardBatch) -> list[list[int]] | None:
    if rows.completion_ids is None or rows.completion_mask is None:
        return None
    lengths = rows.completion_mask.sum(-1).tolist()
    return [ids[:length] for ids, length in zip(rows.completion_ids.tolist(), lengths, strict=True)]


def _wait_for(values: Awaitable[Any], seconds: float | None) -> Any:
    """Run an awaitable to its end, in a thread of its own: the caller may be inside an event loop (notebooks)."""

    async def result() -> Any:
        return await asyncio.wait_for(values, seconds)

    coroutine: Coroutine[Any, Any, Any] = result()
    return in_thread(lambda: asyncio.run(coroutine), None)
