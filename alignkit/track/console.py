"""A run as it is watched: a progress bar on a terminal, one plain line per record everywhere else.

A line says when one of the health checks changes its verdict, and the end says them all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.track.folder import read_lines
from alignkit.track.health import WINDOW, History, Verdict, judge
from alignkit.track.text import duration, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

BAR_NUMBERS = ("rewards/accuracies", "rewards/margins", "reward", "kl", "accuracy", "mean_token_accuracy", "grad_norm")
"""What stands beside the loss on the bar: the first of these that the run logs, as many as there is room for."""


class ConsoleSink:
    """Progress and headline numbers. `quiet` shows nothing. `clock` returns seconds."""

    def __init__(self, console: Console, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.quiet, self._clock = console, quiet, clock
        self._bar: Progress | None = None
        self._total = self._first = 0
        self._started = 0.0
        self._recipe: Mapping[str, Any] = {}
        self._history = History()
        self._verdicts: dict[str, Verdict] = {}

    def start(self, facts: Mapping[str, Any]) -> None:
        """Note the time and, on a terminal, show the bar."""
        self._total, self._first, self._started = facts["total_steps"], facts["start_step"], self._clock()
        if self.quiet:
            return
        self._recipe = facts["recipe"]
        if facts["resumed"]:
            self._history = History(read_lines(Path(facts["output_dir"]) / "metrics.jsonl"))
            self._verdicts = {check.name: check.verdict for check in judge(self._history, self._recipe)}
            self._print(f"resumed after step {self._first} of {self._total}")
        if self.console.is_interactive and not self.console.no_color and not os.environ.get("CI"):
            self._bar = _progress_bar(self.console)
            self._bar.add_task(facts["algorithm"], total=self._total, completed=self._first, numbers="")
            self._bar.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Move the bar or print a line; an evaluation is always a line."""
        if self.quiet:
            return
        if any(name.startswith("eval_") for name in record):
            self._print(self._evaluation_line(record))
            return
        if self._bar is None:
            self._print(self._training_line(record))
        else:
            numbers = _bar_numbers(record, self.console.width)
            self._bar.update(self._bar.task_ids[0], completed=record["step"], numbers=numbers)
        self._history.add(record)
        if self._history.count % WINDOW == 0:  # judged on records that no earlier judgement saw: no flicker
            self._tell_changes(record)

    def close(self) -> None:
        """Leave the terminal as it was, and say how the run is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        checks = judge(self._history, self._recipe)
        width = max((len(check.name) for check in checks), default=0)
        for check in checks:
            self._print(f"health  {check.verdict:<5}  {check.name:<{width}}  {check.text} {check.link}")

    def _tell_changes(self, record: Mapping[str, Any]) -> None:
        for check in judge(self._history, self._recipe):
            before = self._verdicts.get(check.name, "ok")
            if check.verdict != before:
                change = f"{check.name}: {check.verdict}, was {before}."
                self._print("  ".join(["health", *self._where(record), change, f"{check.text} {check.link}"]))
            self._verdicts[check.name] = check.verdict

    def _print(self, line: str) -> None:
        # A log line is for grep as well: never wrapped, never recoloured.
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _where(self, record: Mapping[str, Any]) -> list[str]:
        epoch = [f"epoch {number(record['epoch'])}"] if "epoch" in record else []
        return [f"step {record['step']}/{self._total}", *epoch]

    def _training_line(self, record: Mapping[str, Any]) -> str:
        names = ["loss", "reward", *(name for name in record if name.startswith("rewards/")), "kl", "grad_norm"]
        parts = [*self._where(record), *(f"{name} {number(record[name])}" for name in names if name in record)]
        if "learning_rate" in record:
            parts.append(f"lr {number(record['learning_rate'])}")
        elapsed, done = self._clock() - self._started, record["step"] - self._first
        parts.append(f"elapsed {duration(elapsed)}")
        if done > 0:
            parts.append(f"eta {duration(elapsed / done * (self._total - record['step']))}")
        return "  ".join(parts)

    def _evaluation_line(self, record: Mapping[str, Any]) -> str:
        numbers = [
            f"{name.removeprefix('eval_')} {number(value)}"
            for name, value in record.items()
            if name.startswith("eval_")
        ]
        return "  ".join(["eval", *self._where(record), *numbers])


def _bar_numbers(record: Mapping[str, Any], width: int) -> str:
    """The loss and one headline number on 80 columns, three from 110 on: more would push the ETA off the line."""
    room = max(1, min(3, (width - 65) // 15))
    shown = ["loss", *[name for name in BAR_NUMBERS if name in record][:room]]
    return "  ".join(f"{name.rsplit('/', 1)[-1]} {number(record[name])}" for name in shown if name in record)


def _progress_bar(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
    )
