"""From tracks to figures: ratios by pairs of steps, a table, a JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.race import ROOT, Settings, Track

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "numpy")
TOLERANCE = {"cpu": (5e-4, 1e-3), "cuda": (5e-2, 5e-2)}
"""How far losses, and relatively gradient norms, of two correct trainers may drift apart: in float32, in bfloat16."""


@dataclass(frozen=True)
class Ratio:
    """A ratio over pairs of steps."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Ratio:
        """Median and range."""
        return Ratio(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Figures:
    """One race in numbers. Times are TRL / alignkit, so more is better; memory is alignkit / TRL, so less is better.

    `train_memory`: peak of the steps less what was resident when the model stood; `peak_memory`: that peak as it is.
    Seconds are medians of the measured steps. `agree`: whether both sides did what is right.
    """

    cpu: Ratio
    wall: Ratio
    train_memory: float
    peak_memory: float
    agree: bool
    setup_cpu: float
    setup_wall: float
    step_cpu_seconds: dict[str, float]
    step_wall_seconds: dict[str, float]
    train_bytes: dict[str, int]
    peak_bytes: dict[str, int]


@dataclass(frozen=True)
class OfflineFigures(Figures):
    """Differences are the largest of all steps, the gradient norm's relative."""

    loss_difference: float
    grad_norm_difference: float


def figures(tracks: Mapping[str, Track], settings: Settings) -> OfflineFigures:
    """What a race on equal rows shows: times of the steps after the warm-up, memory and losses of all."""
    ours, theirs = tracks["alignkit"], tracks["trl"]
    difference = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    gradients = max(abs(a - b) / b for a, b in zip(ours.grad_norms, theirs.grad_norms, strict=True))
    allowed, allowed_gradients = TOLERANCE[settings.device]
    return OfflineFigures(
        **measured(tracks, settings),
        agree=difference <= allowed and gradients <= allowed_gradients,
        loss_difference=difference,
        grad_norm_difference=gradients,
    )


def measured(tracks: Mapping[str, Track], settings: Settings) -> dict[str, Any]:
    """What is measured of every race: the fields of `Figures` but `agree`."""
    ours, theirs = tracks["alignkit"], tracks["trl"]
    pairs = list(zip(ours.steps, theirs.steps, strict=True))[settings.warmup :]
    peaks = {side: max(lap.peak for lap in track.steps) for side, track in tracks.items()}
    grown = {side: max(1, peaks[side] - track.base) for side, track in tracks.items()}

    def median(track: Track, of: str) -> float:
        return statistics.median(getattr(lap, of) for lap in track.steps[settings.warmup :])

    return {
        "cpu": Ratio.of([other.cpu / own.cpu for own, other in pairs]),
        "wall": Ratio.of([other.wall / own.wall for own, other in pairs]),
        "train_memory": grown["alignkit"] / grown["trl"],
        "peak_memory": peaks["alignkit"] / peaks["trl"],
        "setup_cpu": theirs.setup.cpu / ours.setup.cpu,
        "setup_wall": theirs.setup.wall / ours.setup.wall,
        "step_cpu_seconds": {side: median(track, "cpu") for side, track in tracks.items()},
        "step_wall_seconds": {side: median(track, "wall") for side, track in tracks.items()},
        "train_bytes": grown,
        "peak_bytes": peaks,
    }


HEADINGS = (
    *("workload", "batch", "cpu ratio (range)", "wall ratio (range)", "train memory", "peak memory"),
    *("set-up cpu", "set-up wall", "loss difference", "gradient norm", "cpu s a step", "train MB"),
)


def table(rows: Sequence[tuple[str, int, OfflineFigures]]) -> str:
    """A Markdown table, a workload a line; `a : b` is alignkit : TRL."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for name, batch_size, found in rows:
        seconds, grown = found.step_cpu_seconds, found.train_bytes
        cells = (
            name,
            str(batch_size),
            str(found.cpu),
            str(found.wall),
            f"{found.train_memory:.2f}",
            f"{found.peak_memory:.2f}",
            f"{found.setup_cpu:.2f}",
            f"{found.setup_wall:.2f}",
            f"{found.loss_difference:.1e}",
            f"{found.grad_norm_difference:.1e}" + ("" if found.agree else " **they differ**"),
            f"{seconds['alignkit']:.2f} : {seconds['trl']:.2f}",
            f"{grown['alignkit'] / 1e6:.0f} : {grown['trl'] / 1e6:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    cpus = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def commit() -> str | None:
    """The measured commit, marked when the tree differs from it; None outside a git checkout."""
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    return shown.stdout.strip() or None


class Document:
    """The JSON file of a bench, complete after every workload: a later one that breaks costs no earlier figure."""

    def __init__(self, path: Path | None, settings: Settings) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "machine": machine(settings.device),
            "settings": asdict(settings),
            "load_average": {"start": os.getloadavg()},
            "workloads": {},
            "not_raced": {},
        }

    def add(self, name: str, batch_size: int, found: Figures, tracks: Mapping[str, Track]) -> None:
        """One race, with every step's numbers."""
        raw = {side: asdict(track) for side, track in tracks.items()}
        self._content["workloads"][name] = {"batch_size": batch_size, "figures": asdict(found), "raw": raw}
        self.write()

    def add_samples(self, name: str, found: Any, written: Mapping[str, Any]) -> None:
        """One race of samplers, with every generation's numbers."""
        raw = {side: asdict(own) for side, own in written.items()}
        self._content["workloads"][name] = {"figures": asdict(found), "raw": raw}
        self.write()

    def skip(self, name: str, reason: str) -> None:
        """A workload that has no figures, and why."""
        self._content["not_raced"][name] = reason
        self.write()

    def write(self) -> None:
        """Replace the file, if one was asked for."""
        self._content["load_average"]["end"] = os.getloadavg()
        if self._path is not None:
            self._path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
