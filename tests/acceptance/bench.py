"""What every acceptance experiment stands on: runs started through the command line, and figures with their bounds.

A method adds one file to this folder with a function under `@method("name")`; there is no list to edit.
"""

import importlib
import json
import os
import pkgutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import tests.acceptance


@dataclass(frozen=True)
class Figure:
    """One measured number. The median seed must meet the bound; no seed may do worse than `start`, the same number of
    the model the experiment began with."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    start: float | None = None

    @property
    def bound(self) -> str:
        """The bound as text."""
        sides = [("≥", self.at_least), ("≤", self.at_most)]
        parts = [f"{sign} {value:g}" for sign, value in sides if value is not None]
        return ", ".join(parts) or "reported"

    def meets(self, value: float) -> bool:
        """Whether `value` is within the bound."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    @property
    def falls_behind(self) -> bool:
        """Whether training made this number worse."""
        return self.start is not None and self.value < self.start


def passes(figures: list[Figure]) -> bool:
    """Whether one number, measured on several seeds, is accepted."""
    median = statistics.median(figure.value for figure in figures)
    return figures[0].meets(median) and not any(figure.falls_behind for figure in figures)


class Bench:
    """One seed of every experiment. Runs with the same name are trained once and shared by the methods."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._runs: dict[str, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def train(self, name: str, recipe: Mapping[str, Any]) -> Path:
        """The run folder of this recipe, trained through the command line. Raises RuntimeError with its last output."""
        if name not in self._runs:
            run = self.folder / name
            file = self.folder / f"{name}.yaml"
            file.write_text(yaml.safe_dump({"seed": self.seed, "output_dir": str(run), **recipe}, sort_keys=False))
            command = [sys.executable, "-m", "alignkit", "train", str(file)]
            environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                tail = (done.stdout + done.stderr)[-3000:]
                raise RuntimeError(f"`alignkit train {file}` ended with exit code {done.returncode}:\n{tail}")
            self._runs[name] = run
        return self._runs[name]

    def evaluation(self, run: Path) -> dict[str, float]:
        """The last held-out evaluation of a run, as logged."""
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return next(record for record in reversed(records) if "eval_loss" in record)

    def answers(self, run: Path, prompts: list[str], *, max_tokens: int) -> list[str]:
        """One sample a prompt at temperature 1."""
        from alignkit.run import sample

        samples = sample(run, prompts, num=1, temperature=1.0, max_tokens=max_tokens)
        answer = {drawn["prompt"]: drawn["completion"] for drawn in samples}
        return [answer[prompt] for prompt in prompts]


Measure = Callable[[Bench], list[Figure]]
_METHODS: dict[str, Measure] = {}


def method(name: str) -> Callable[[Measure], Measure]:
    """Registers the acceptance experiments of one method."""

    def add(measure: Measure) -> Measure:
        _METHODS[name] = measure
        return measure

    return add


def methods() -> dict[str, Measure]:
    """Every method's experiments, by method, in alphabetical order."""
    for module in pkgutil.iter_modules(tests.acceptance.__path__):
        if not module.name.startswith("test_"):
            importlib.import_module(f"tests.acceptance.{module.name}")
    return dict(sorted(_METHODS.items()))
