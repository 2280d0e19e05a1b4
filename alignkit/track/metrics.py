"""Metrics travel as sum and count and reduce as loss terms do, so no split of the batch can move them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from alignkit.core.types import Metric

if TYPE_CHECKING:
    from alignkit.core.contracts import World

Totals = dict[str, Metric]


def add(totals: Totals, metrics: Mapping[str, Metric]) -> None:
    """Merge `metrics` into `totals`, in double precision."""
    for name, metric in metrics.items():
        new = Metric(float(metric.sum), float(metric.count), metric.how)
        old = totals.get(name)
        totals[name] = new if old is None else _merge(old, new, name)


def reduce(totals: Totals, world: World) -> Totals:
    """The totals of all ranks. Ranks may hold different names: one may have had nothing to say."""
    merged: Totals = {}
    for part in world.gather({name: (m.sum, m.count, m.how) for name, m in totals.items()}):
        add(merged, {name: Metric(*fields) for name, fields in part.items()})
    return merged


def values(totals: Mapping[str, Metric]) -> dict[str, float]:
    """What is logged; a metric that counted nothing is left out."""
    out: dict[str, float] = {}
    for name, metric in totals.items():
        if metric.how == "sum":
            out[name] = float(metric.sum)
        elif float(metric.count) > 0:
            out[name] = float(metric.sum) / float(metric.count) if metric.how == "mean" else float(metric.sum)
    return out


def _merge(old: Metric, new: Metric, name: str) -> Metric:
    if old.how != new.how:
        raise ValueError(f"metric {name!r} was logged both as {old.how!r} and as {new.how!r}")
    count = float(old.count) + float(new.count)
    if old.how in ("mean", "sum"):
        return Metric(float(old.sum) + float(new.sum), count, old.how)
    if not old.count or not new.count:
        return new if not old.count else old
    pick = min if old.how == "min" else max
    return Metric(pick(float(old.sum), float(new.sum)), count, old.how)
