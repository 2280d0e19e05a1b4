"""How numbers, durations, names and nested facts are written for people: console, trackers, report and card agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def number(value: float) -> str:
    """Four significant digits; whole numbers in full. `number(0.69314718)` is '0.6931'."""
    if isinstance(value, int):
        return str(value)
    if 1e4 <= abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value + 0.0:.4g}"  # + 0.0 turns -0.0 into 0


def duration(seconds: float) -> str:
    """Seconds as '0:07', '12:34' or '3:25:45'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf; a list of plain values is one leaf, and so is an empty list or mapping."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from flatten(part, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        for index, part in enumerate(value):
            yield from flatten(part, f"{prefix}.{index}" if prefix else str(index))
    else:
        yield prefix, leaf(value)


def leaf(value: Any) -> str:
    """One value as text, in YAML's words for null, true and false."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(leaf(part) for part in value) or "none"
    if isinstance(value, Mapping):
        return "none"
    return str(value)


def tracker_names(record: Mapping[str, Any]) -> dict[str, float]:
    """The record under the names trackers show: `train/loss`, and `eval/loss` for `eval_loss`. `step` is left out."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in record.items()
        if name != "step"
    }
