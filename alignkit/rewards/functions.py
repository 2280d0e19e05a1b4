"""Plain Python functions as reward sources, in the signature TRL users write."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from alignkit.core.contracts import Models
from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.lazy import torch
from alignkit.core.types import RewardBatch, RewardOutput

GIVEN = ("prompts", "completions", "completion_ids")


class FunctionReward:
    """A function `reward(prompts, completions, completion_ids, **columns) -> list[float | None]` as a RewardSource.

    It is called with keywords, and only with those it names, unless it takes `**kwargs`. `prompts` are message lists,
    `completions` strings, `completion_ids` lists of token ids, every further parameter a data set column. It may be
    `async`. None = not applicable to this completion (`valid=False`).

    Raises:
        RecipeError: the object cannot be called with keywords.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name
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
        """
        del models
        arguments: dict[str, Any] = {**rows.columns, "prompts": rows.prompts, "completions": rows.completions}
        if self._accepts_all or "completion_ids" in self._accepted:
            arguments["completion_ids"] = _token_lists(rows)
        if not self._accepts_all:
            arguments = {name: value for name, value in arguments.items() if name in self._accepted}
        values = self.function(**arguments)
        if inspect.isawaitable(values):
            values = _wait_for(values)
        return self._output(values, rows.completions)

    def _output(self, values: Any, completions: list[str]) -> RewardOutput:
        if not hasattr(values, "__len__") or isinstance(values, (str, bytes, dict)):
            raise RunFailed(
                f"reward {self.name!r} returned {type(values).__name__}; expected a list with one number or None for "
                f"each of the {len(completions)} completions"
            )
        if len(values) != len(completions):
            raise RunFailed(
                f"reward {self.name!r} returned {len(values)} values for {len(completions)} completions; expected one "
                "number or None for each"
            )
        scores = [self._number(value, row, completions[row]) for row, value in enumerate(values)]
        return RewardOutput(
            score=torch.tensor([0.0 if score is None else score for score in scores], dtype=torch.float32),
            valid=torch.tensor([score is not None for score in scores], dtype=torch.bool),
        )

    def _number(self, value: Any, row: int, completion: str) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RunFailed(
                f"reward {self.name!r} returned {value!r} for row {row} (completion {completion[:60]!r}); expected a "
                "finite number, or None where it has nothing to say"
            )
        return number


def _token_lists(rows: RewardBatch) -> list[list[int]] | None:
    if rows.completion_ids is None or rows.completion_mask is None:
        return None
    lengths = rows.completion_mask.sum(-1).tolist()
    return [ids[:length] for ids, length in zip(rows.completion_ids.tolist(), lengths, strict=True)]


def _wait_for(values: Awaitable[Any]) -> Any:
    """Run an awaitable to its end, in a thread of its own: the caller may be inside an event loop (notebooks)."""

    async def result() -> Any:
        return await values

    coroutine: Coroutine[Any, Any, Any] = result()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
