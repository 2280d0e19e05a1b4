"""The command line of the bench."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from alignkit.core.errors import RecipeError
from alignkit.recipe import find_algorithm
from bench.online import online_figures, online_table
from bench.race import BenchFailed, Settings, Track, race
from bench.report import Document, Figures, figures, table
from bench.sampling import SAMPLES, Sample, SampleFigures, race_samples, sample_table
from bench.workloads import WORKLOADS

Shown = TypeVar("Shown", bound=Figures)

DESCRIPTION = """\
Races alignkit against TRL at its strongest: equal model, rows, batches, optimizer and dtype, steps in turn.

Each side trains in a process of its own, as its user would run it (alignkit: a recipe through `alignkit train`, TRL:
its trainer with padded SDPA, fused head, precomputed reference and fused AdamW), and stops after every optimizer step
until the other has made its own. On the CPU, TRL's fused head is switched to score completions only, as it does by
itself on a GPU; --stock leaves that out.

Times are ratios TRL / alignkit, the median over pairs of steps: more is better. Memory is alignkit / TRL, peak of the
training steps less what was resident when the model was loaded: less is better. Set-up is tokenizing, preparing and
scoring the rows with the reference. The exit code is 1 when a side fails or losses or gradients disagree.

Where the sides write completions themselves (grpo-…) a batch is of completions, 8 a prompt. Their tokens differ, so the
ratio to read is of seconds per token written; in place of losses, the log-probabilities that alignkit's sampler wrote
down must be the trainer's.

Workloads named sample-… race the in-process sampler against transformers' `generate` instead, whole generations in
turn: --steps of them, of which --warmup, --batch-size, --layout and --stock do not speak. One warms up, and the exit
code is 1 when its log-probabilities are not the trainer's.
"""
EPILOGUE = """\
workloads:
{workloads}
`--device cuda` (bfloat16 on both sides, memory of CUDA's allocator) has never been run: its figures are unmeasured.
A busy machine inflates processor time too, where one thread waits for another: quote figures of a quiet one.
"""


def main(arguments: list[str] | None = None) -> int:
    """Race the chosen workloads; the exit code."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    chosen = [name for name, workload in WORKLOADS.items() if workload.device == args.device]
    if args.workloads != ["all"]:
        chosen = args.workloads
    elif args.device == "cpu":
        chosen += SAMPLES
    if unknown := sorted(set(chosen) - {*WORKLOADS, *SAMPLES}):
        parser.error(f"there is no workload {unknown[0]!r}; there are {', '.join([*WORKLOADS, *SAMPLES])}, or `all`")
    settings = Settings(
        steps=args.steps,
        warmup=args.warmup,
        batch_size=args.batch_size,
        setup_pairs=args.setup_pairs,
        layout=args.layout,
        stock=args.stock,
        seed=args.seed,
        threads=args.threads,
        device=args.device,
        timeout=args.timeout,
    )
    document = Document(args.json, settings)
    with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as temporary:
        folder = args.folder or Path(temporary)
        races = [name for name in chosen if name in WORKLOADS]
        given, written = ([name for name in races if bool(WORKLOADS[name].samples) is own] for own in (False, True))
        return max(
            run(given, settings, folder, document, figures, table),
            run(written, settings, folder, document, online_figures, online_table),
            run_samples([name for name in chosen if name in SAMPLES], settings, folder, document),
        )


def run(
    chosen: list[str],
    settings: Settings,
    folder: Path,
    document: Document,
    figures: Callable[[dict[str, Track], Settings], Shown],
    table: Callable[[list[tuple[str, int, Shown]]], str],
) -> int:
    """Race one workload after the other and print the table; the exit code."""
    rows: list[tuple[str, int, Shown]] = []
    broken = False
    for name in chosen:
        workload = WORKLOADS[name]
        try:
            find_algorithm(workload.algorithm)
        except RecipeError:
            reason = f"alignkit has no algorithm {workload.algorithm!r} yet"
            say(f"{name}: skipped: {reason}")
            document.skip(name, reason)
            continue
        try:
            tracks = race(name, workload, settings, folder / name, say)
        except BenchFailed as failure:
            say(f"{name}: {failure}")
            document.skip(name, str(failure))
            broken = True
            break
        found = figures(tracks, settings)
        rows.append((name, settings.batch_size or workload.batch_size, found))
        document.add(name, rows[-1][1], found, tracks)
    if rows:
        print(table(rows))
    return 1 if broken or not all(found.agree for _, _, found in rows) else 0


def run_samples(chosen: list[str], settings: Settings, folder: Path, document: Document) -> int:
    """Race samplers, one workload after the other, and print the table; the exit code."""
    rows: list[tuple[str, Sample, SampleFigures]] = []
    for name in chosen:
        sample = SAMPLES[name]
        found, written = race_samples(name, sample, settings.steps, settings.seed, settings.threads, folder, say)
        rows.append((name, sample, found))
        document.add_samples(name, found, written)
    if rows:
        print(sample_table(rows))
    return 0 if all(found.agree for _, _, found in rows) else 1


def say(text: str) -> None:
    """Progress; standard output is the table's."""
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    lines = [
        f"  {name:17} {w.algorithm}, {w.shape.hidden} wide, {w.shape.layers} layers, {w.shape.vocabulary} words, "
        f"prompt {w.lengths.prompt_median} ({w.lengths.prompt_range[0]}-{w.lengths.prompt_range[1]}), completion "
        f"{w.lengths.completion_range[0]}-{w.lengths.completion_range[1]}, batch {w.batch_size}, {w.device}"
        for name, w in WORKLOADS.items()
    ] + [
        f"  {name:17} sampling, {s.shape.hidden} wide, {s.shape.layers} layers, {s.shape.vocabulary} words, "
        f"{s.prompts} prompts of {s.prompt}, {s.samples} completions of {s.new} each, cpu"
        for name, s in SAMPLES.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python scripts/bench",
        description=DESCRIPTION,
        epilog=EPILOGUE.format(workloads="\n".join(lines)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    positive, counted = whole_number(1), whole_number(0)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("workloads", nargs="+", metavar="WORKLOAD", help="names below, or `all` of the device")
    parser.add_argument("--steps", type=positive, default=8, help="measured pairs of steps (8)")
    parser.add_argument("--warmup", type=counted, default=2, help="steps before them that only losses count (2)")
    parser.add_argument("--batch-size", type=positive, help="units of one step; default: the workload's")
    parser.add_argument("--setup-pairs", type=counted, default=64, help="rows to set up at least (64)")
    parser.add_argument("--layout", default="auto", help="alignkit's model.layout (auto)")
    parser.add_argument(
        "--stock", action="store_true", help="TRL's head as it comes: on the CPU it scores all positions"
    )
    parser.add_argument("--seed", type=counted, default=0, help="of model, rows and order (0)")
    parser.add_argument("--threads", type=positive, default=cores, help=f"of each side (all cores: {cores})")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: written, never measured")
    parser.add_argument("--timeout", type=positive, default=1800, help="seconds a side may be silent (1800)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step's numbers here")
    parser.add_argument("--folder", type=Path, help="keep models, rows and logs here; default: a temporary folder")
    return parser


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `least`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return parse
