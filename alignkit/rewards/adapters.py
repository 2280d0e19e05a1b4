"""Reward functions written for other suites, taken as they are: verl's `compute_score`, OpenRLHF's `reward_func`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.registry import load_object, register
from alignkit.core.types import Message, RewardBatch, RewardOutput
from alignkit.rewards.functions import answer_output, as_number, column_output


class VerlConfig(Config):
    """Keys of `verl`."""

    function: str = Field(description="'module:compute_score'")
    data_source: str = Field("data_source", description="data column passed as data_source")
    ground_truth: str = Field("ground_truth", description="data column passed as ground_truth")
    extra_info: str | None = Field(None, description="data column passed as extra_info; null = None is")
    kwargs: dict[str, Any] = Field({}, description="further arguments, the same for every row")


@register.reward("verl")
class Verl:
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info) → float or dict`, called for each row.

    Of a dict `score` is the reward, other numbers become components, and the rest is kept as a note.
    """

    config_type: ClassVar[type[Config]] = VerlConfig

    def __init__(self, config: VerlConfig) -> None:
        self.config = config
        self.requires: tuple[str, ...] = (
            config.data_source,
            config.ground_truth,
            *([config.extra_info] if config.extra_info else []),
        )
        self._function = _callable(config.function, "verl")

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; not valid where the function returned None. Raises RunFailed as a function's does."""
        del models
        size, config = len(rows.completions), self.config
        scores: list[float | None] = []
        numbers: dict[str, list[float | None]] = {}
        info: list[dict[str, Any]] = []
        for row, text in enumerate(rows.completions):
            found = self._function(
                data_source=rows.columns[config.data_source][row],
                solution_str=text,
                ground_truth=rows.columns[config.ground_truth][row],
                extra_info=rows.columns[config.extra_info][row] if config.extra_info else None,
                **config.kwargs,
            )
            where = f"row {row} (completion {text[:60]!r})"
            if isinstance(found, Mapping) and "score" not in found:
                raise RunFailed(
                    f"reward 'verl' returned {dict(found)!r} for {where}; expected a number, or 'score' in it"
                )
            parts = dict(found) if isinstance(found, Mapping) else {"score": found}
            value = parts.pop("score")
            scores.append(None if value is None else as_number("verl", value, where))
            info.append({name: part for name, part in parts.items() if not _is_number(part)})
            for name, part in parts.items():
                if _is_number(part):
                    numbers.setdefault(name, [None] * size)[row] = float(part)
        output = column_output(scores)
        output.components = {name: column_output(column).score for name, column in numbers.items()}
        output.info = info
        return output


class OpenRlhfConfig(Config):
    """Keys of `openrlhf`."""

    function: str = Field(description="'module:reward_func'")
    labels: str | None = Field(None, description="data column passed as labels; null = Nones are")


@register.reward("openrlhf")
class OpenRlhf:
    """OpenRLHF's `reward_func(queries, prompts, labels) → {"rewards", "scores", "extra_logs"}`, called for all rows.

    `rewards` count; `scores` and the entries of `extra_logs` become components. A query is the prompt's text followed
    by the completion, turns divided by line breaks: no chat template is applied.
    """

    config_type: ClassVar[type[Config]] = OpenRlhfConfig

    def __init__(self, config: OpenRlhfConfig) -> None:
        self.config = config
        self.requires: tuple[str, ...] = (config.labels,) if config.labels else ()
        self._function = _callable(config.function, "openrlhf")

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion. Raises RunFailed as a function's does."""
        del models
        prompts = [prompt_text(messages) for messages in rows.prompts]
        queries = [prompt + text for prompt, text in zip(prompts, rows.completions, strict=True)]
        labels = rows.columns[self.config.labels] if self.config.labels else [None] * len(prompts)
        found = self._function(queries, prompts, labels)
        if not isinstance(found, Mapping):
            found = {"rewards": found}
        if "rewards" not in found:
            raise RunFailed(
                f"reward 'openrlhf' returned a dict with {', '.join(map(str, found)) or 'nothing'}; expected 'rewards'"
            )
        output = answer_output("openrlhf", found["rewards"], rows.completions)
        logs = {**({"scores": found["scores"]} if "scores" in found else {}), **(found.get("extra_logs") or {})}
        for name, values in logs.items():
            output.components[str(name)] = answer_output("openrlhf", values, rows.completions).score
        return output


def prompt_text(messages: Sequence[Message]) -> str:
    """The turns of a prompt as one text, divided by line breaks."""
    return "\n".join(message.get("content", "") for message in messages)


def _callable(path: str, reward: str) -> Any:
    if ":" not in path:
        raise RecipeError(f"reward {reward!r}: args.function is {path!r}; expected 'module:function'")
    found = load_object(path)
    if not callable(found):
        raise RecipeError(f"reward {reward!r}: {path!r} is a {type(found).__name__}; expected a function")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
