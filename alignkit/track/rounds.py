"""The rounds of a run side by side: what each measured, what moved the wrong way, and what the drift rules did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import inf
from typing import Any

from alignkit.track.folder import RunFolder
from alignkit.track.page import note, section, table
from alignkit.track.text import number

Numbers = dict[str, float]
CONSISTENCY = "consistency"
"""Stands for the last part of a metric's name, whatever method logs it."""


@dataclass(frozen=True)
class Column:
    """A number of a round. `good`: +1 where more is better, −1 where less is, 0 where neither.

    A change counts when it is larger than `slack`, or than that share of the value it is compared with (`relative`).
    """

    title: str
    metric: str
    good: int = 0
    slack: float = 0.0
    relative: bool = False

    def lost(self, value: float, earlier: Sequence[float]) -> bool:
        """Whether the value is worse than the best of earlier ones."""
        if not self.good or not earlier:
            return False
        best = self.best(earlier)
        return self.good * (best - value) > (self.slack * abs(best) if self.relative else self.slack)

    def best(self, values: Sequence[float]) -> float:
        """The best of some values."""
        return min(values) if self.good < 0 else max(values)


COLUMNS = (
    Column("reward", "reward"),
    Column("judge accuracy", "drift/judge_accuracy", 1, 0.05),
    Column("agreement", "drift/agreement", 1, 0.05),
    Column(CONSISTENCY, CONSISTENCY, 1, 0.05),
    Column("length", "drift/mean_length", -1, 0.5, relative=True),
    Column("chosen over rejected length", "drift/selected_length_ratio", -1, 0.25, relative=True),
    Column("distinct trigrams", "drift/distinct_trigrams", 1, 0.2, relative=True),
    Column("chosen log-probability", "drift/chosen_logps", 1, 0.1),
    Column("win rate, held out", "eval_win_rate", 1, 0.05),
    Column("reward, held out", "eval_reward", 1, 0.05, relative=True),
)


def rounds_section(run: RunFolder) -> list[str]:
    """The section; none for a run without rounds."""
    if not run.rounds:
        return []
    start = {n: v for record in run.records if record["step"] == 0 for n, v in record.items() if n.startswith("eval_")}
    rows = [(f"round {line['round']}", str(line["step"])) for line in run.rounds]
    measured = numbers_of_rounds(run)
    if start:
        rows, measured = [("start", ""), *rows], [start, *measured]
    columns = [column for column in COLUMNS if any(column.metric in numbers for numbers in measured)]
    cells = [[*row, *(_cell(column, measured, i) for column in columns)] for i, row in enumerate(rows)]
    head = ["", "after step", *(column.title for column in columns)]
    caption = (
        "A round is measured when it is scored, before it is learned from; what is held out, after it was. ▲ and ▼: "
        "worse than the best before."
    )
    words = [note(_verdict(columns, measured)), *_rules(run)]
    return [section("Rounds", "\n".join([table(head, cells, caption=caption, numbers=True), *words]))]


def numbers_of_rounds(run: RunFolder) -> list[Numbers]:
    """Of each round what was measured of it, what was logged while it was learned from, and its last evaluation."""
    found = []
    for line, end in zip(run.rounds, [*(line["step"] for line in run.rounds[1:]), inf], strict=True):
        records = [record for record in run.records if line["step"] < record["step"] <= end]
        told = [float(v) for r in records for n, v in r.items() if n.rpartition("/")[2] == CONSISTENCY]
        own = {CONSISTENCY: sum(told) / len(told)} if told else {}
        evaluations = [record for record in records if any(name.startswith("eval_") for name in record)]
        measured = {n: v for n, v in evaluations[-1].items() if n.startswith("eval_")} if evaluations else {}
        found.append({**line["metrics"], **own, **measured})
    return found


def told(line: Mapping[str, Any]) -> str:
    """What a drift rule saw and did, in words; a line of `rules` in rounds.jsonl."""
    value, limit, against = (number(line[key]) for key in ("value", "limit", "against"))
    compared = {
        "below": f"below {limit}",
        "above": f"above {limit}",
        "falls_by": f"more than {limit} below the {against} of an earlier round",
        "rises_by": f"more than {limit} above the {against} of an earlier round",
    }[line["bound"]]
    done = {
        "damp": f"the learning rate is multiplied by {number(line.get('factor', 1.0))} from here on",
        "stop": "the run ends before it learns from this round",
        "rollback": "the run ends with the weights that the round before began with, where there was one",
    }[line["action"]]
    return f"{line['metric']} is {value}, {compared}: {done}"


def _cell(column: Column, measured: Sequence[Numbers], i: int) -> str:
    value = measured[i].get(column.metric)
    if value is None:
        return "–"
    lost = column.lost(value, _values(column, measured[:i]))
    return number(value) + (f" {'▼' if column.good > 0 else '▲'}" if lost else "")


def _verdict(columns: Sequence[Column], measured: Sequence[Numbers]) -> str:
    """What the last value of each column lost against the best one before."""
    parts = []
    for column in columns:
        *earlier, last = _values(column, measured)
        if column.lost(last, earlier):
            parts.append(f"{column.title} {number(column.best(earlier))} → {number(last)}")
    return f"Moved the wrong way since its best: {', '.join(parts)}." if parts else "Nothing moved the wrong way."


def _rules(run: RunFolder) -> list[str]:
    said = [f"Round {line['round']}: {told(rule)}." for line in run.rounds for rule in line["rules"]]
    if said:
        return [f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in said)}</ul>"]
    return [note("No drift rule had to act.")] if run.recipe.get("drift", {}).get("rules") else []


def _values(column: Column, measured: Sequence[Numbers]) -> list[float]:
    return [numbers[column.metric] for numbers in measured if column.metric in numbers]
