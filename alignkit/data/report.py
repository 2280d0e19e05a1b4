"""What happened to the rows of one data entry: kept, dropped, changed, and how long they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.core.errors import DataError

MAX_EXAMPLES = 3
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)

DROPPED = {
    "missing value": "give the column a value in every row, or map another column with `fields`",
    "malformed": "bring the value into the expected shape",
    "empty completion": "an empty answer teaches nothing; remove the row",
    "equal completions": "equal answers hold no preference; remove the row",
    "no score gap": "an operation needs scores that tell answers apart, the chosen one's the higher; see its `min_gap`",
    "overlong": "raise train.max_length, or `overlong: cut` to keep the beginning of the answer",
    "refused by template": "the chat template does not write such conversations; choose another model.chat_template",
}
"""Why rows are dropped → what to do about it."""

CHANGED = {
    "prompt cut": "the beginning of the prompt is left out to fit max_length",
    "completion cut": "the end of a completion and its stop token are lost to fit max_length",
    "boundary merged": "the last prompt tokens change when a completion follows; they count as completion",
    "turn rewritten": "an earlier assistant turn is shown differently later on; it is context, not trained",
}
"""How kept rows are changed → what that means."""

STOP_LOST = "completion cut"


@dataclass(slots=True)
class Tally:
    """How many rows, and the first few of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Count one row; `where` names it."""
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(where)


@dataclass(slots=True)
class DataReport:
    """The account of one data entry. `lengths` are tokens as rendered, before anything was cut; of several completions
    the longest one counts. `layout` is the foreign layout that the rows of this format were read from, `added` how many
    rows more operations made of them."""

    path: str
    format: str
    rows: int
    layout: str | None = None
    added: int = 0
    kept: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    changed: dict[str, Tally] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        """Count a row left out, by a reason of `DROPPED`."""
        self.dropped.setdefault(reason, Tally()).add(where)

    def change(self, kind: str, where: str) -> None:
        """Count a kept row that was changed, by a kind of `CHANGED`."""
        self.changed.setdefault(kind, Tally()).add(where)

    def measure(self, **tokens: int) -> None:
        """Add the token counts of a row, by name."""
        for name, count in tokens.items():
            self.lengths.setdefault(name, []).append(count)

    @property
    def total(self) -> int:
        """Rows as they were to be rendered."""
        return self.rows + self.added

    @property
    def bad_fraction(self) -> float:
        """Share of rows that are unusable or lost a stop token."""
        lost = self.changed.get(STOP_LOST, Tally()).count
        return (sum(tally.count for tally in self.dropped.values()) + lost) / self.total

    def lines(self) -> list[str]:
        """The report for a console."""
        source = f" from {self.layout}" if self.layout else ""
        made = f", {self.total} after operations" if self.added else ""
        lines = [f"{self.path}: {self.rows} rows as {self.format}{source}{made}, {self.kept} kept"]
        for title, tallies, notes in (("dropped", self.dropped, DROPPED), ("changed", self.changed, CHANGED)):
            for name, tally in tallies.items():
                share = 100 * tally.count / self.total
                lines.append(f"  {title} {tally.count:>6} ({share:.1f} %)  {name}: {notes[name]}")
                lines.append(f"      {'; '.join(tally.examples)}{'; …' if tally.count > len(tally.examples) else ''}")
        for name, quantiles in self.quantiles().items():
            named = "  ".join(f"{label} {value}" for label, value in quantiles.items())
            lines.append(f"  {name + ' tokens':<18} {named}")
        return lines

    def quantiles(self) -> dict[str, dict[str, int]]:
        """Smallest, quartiles, 95 % and largest of each length."""
        return {name: _quantiles(counts) for name, counts in self.lengths.items() if counts}

    def to_json(self) -> dict[str, Any]:
        """The report as plain numbers, strings and lists."""
        return {
            "path": self.path,
            "format": self.format,
            "layout": self.layout,
            "rows": self.rows,
            "added": self.added,
            "kept": self.kept,
            "dropped": _plain(self.dropped),
            "changed": _plain(self.changed),
            "bad_fraction": self.bad_fraction,
            "tokens": self.quantiles(),
        }

    def check_budget(self, max_bad_fraction: float) -> None:
        """Raises DataError when no row is left, or when more than `max_bad_fraction` of them are bad."""
        if not self.kept:
            raise DataError("\n".join([f"{self.path}: no usable row is left of {self.rows}", *self.lines()]))
        if self.bad_fraction > max_bad_fraction:
            problem = (
                f"{self.path}: {100 * self.bad_fraction:.1f} % of the rows are unusable or lose their stop token, "
                f"`max_bad_fraction: {max_bad_fraction:g}` allows {100 * max_bad_fraction:g} %. "
                "Repair the rows named below, or raise max_bad_fraction in this data entry."
            )
            raise DataError("\n".join([problem, *self.lines()]))


def _quantiles(counts: Sequence[int]) -> dict[str, int]:
    ordered = sorted(counts)
    labels = {0.0: "min", 0.5: "median", 1.0: "max"}
    return {labels.get(q, f"{100 * q:g}%"): ordered[round(q * (len(ordered) - 1))] for q in QUANTILES}


def _plain(tallies: Mapping[str, Tally]) -> dict[str, dict[str, Any]]:
    return {name: {"count": tally.count, "examples": tally.examples} for name, tally in tallies.items()}
