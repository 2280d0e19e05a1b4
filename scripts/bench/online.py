"""Figures of methods that write their completions themselves, each side its own: what a step costs, a token written.

In place of equal losses stand equal prompts, how long both sides' completions are, and that the log-probabilities which
our sampler wrote down, and training trusts, are those of the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from bench.race import Settings, Track
from bench.report import Figures, Ratio, measured

LOGP_TOLERANCE = {"cpu": 5e-5, "cuda": 0.5}
"""Nats by which the worst token's log-probability may differ between sampler and trainer: in float32, in bfloat16."""


@dataclass(frozen=True)
class OnlineFigures(Figures):
    """`…_per_token`: seconds of a step per completion token written in it. `mean_length`: tokens of a completion."""

    cpu_per_token: Ratio
    wall_per_token: Ratio
    tokens: dict[str, int]
    mean_length: dict[str, float]
    logp_difference: float


def online_figures(tracks: Mapping[str, Track], settings: Settings) -> OnlineFigures:
    """What a race shows: times and lengths of the steps after the warm-up, memory and log-probabilities of all."""
    written = {side: track.lengths[settings.warmup :] for side, track in tracks.items()}
    difference = tracks["alignkit"].facts["sampling_logp_difference"]

    def per_token(of: str) -> Ratio:
        ours, theirs = (
            [
                getattr(lap, of) / sum(step)
                for lap, step in zip(track.steps[settings.warmup :], written[side], strict=True)
            ]
            for side, track in tracks.items()
        )
        return Ratio.of([b / a for a, b in zip(ours, theirs, strict=True)])

    return OnlineFigures(
        **measured(tracks, settings),
        agree=difference <= LOGP_TOLERANCE[settings.device],
        cpu_per_token=per_token("cpu"),
        wall_per_token=per_token("wall"),
        tokens={side: sum(chain(*steps)) for side, steps in written.items()},
        mean_length={side: fmean(chain(*steps)) for side, steps in written.items()},
        logp_difference=difference,
    )


HEADINGS = (
    *("workload", "batch", "cpu ratio a token (range)", "wall ratio a token (range)", "cpu ratio a step (range)"),
    *("wall ratio a step (range)", "train memory", "peak memory", "mean completion", "log-prob difference"),
    *("cpu s a step", "train MB"),
)


def online_table(rows: Sequence[tuple[str, int, OnlineFigures]]) -> str:
    """A Markdown table, a workload a line; `a : b` is alignkit : TRL."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for name, batch_size, found in rows:
        lengths, seconds, grown = found.mean_length, found.step_cpu_seconds, found.train_bytes
        cells = (
            name,
            str(batch_size),
            str(found.cpu_per_token),
            str(found.wall_per_token),
            str(found.cpu),
            str(found.wall),
            f"{found.train_memory:.2f}",
            f"{found.peak_memory:.2f}",
            f"{lengths['alignkit']:.1f} : {lengths['trl']:.1f}",
            f"{found.logp_difference:.1e}" + ("" if found.agree else " **they differ**"),
            f"{seconds['alignkit']:.2f} : {seconds['trl']:.2f}",
            f"{grown['alignkit'] / 1e6:.0f} : {grown['trl'] / 1e6:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
