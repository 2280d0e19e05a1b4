"""Runs every method's acceptance experiments through the command line and keeps their figures.

    python scripts/acceptance.py [--seeds 0 1 2] [--only dpo sft] [--write] [--folder runs/acceptance]

A number is accepted when the median seed meets its bound and no seed is worse than the model the experiment started
from. `--write` puts the figures of the methods that ran into docs/acceptance.md and leaves the others as they stand.
Exit code 1 when a number is not accepted.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "acceptance.md"
sys.path.insert(0, str(ROOT))

from tests.acceptance.bench import Bench, Figure, methods, passes  # noqa: E402

PREAMBLE = """\
# Acceptance

What each method must show before it counts as working: toy tasks whose outcome can be counted, three seeds, run through
the command line by `make acceptance`. The median seed must meet the bound, and no seed may do worse than the model the
experiment began with. The tasks are described in `tests/acceptance/`, one file a method.
"""


def table(seeds: list[int], by_seed: list[list[Figure]]) -> list[str]:
    """Markdown rows: a figure a line, a seed a column."""
    lines = [
        f"| experiment | {' | '.join(f'seed {seed}' for seed in seeds)} | median | bound | verdict |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for figures in zip(*by_seed, strict=True):
        values = [f"{figure.value:.3f}" for figure in figures]
        median = statistics.median(figure.value for figure in figures)
        judged = figures[0].bound != "reported" or figures[0].start is not None
        verdict = "–" if not judged else "pass" if passes(list(figures)) else "**fail**"
        name = figures[0].name.replace("|", "\\|")  # it would end the cell
        lines.append(f"| {name} | {' | '.join(values)} | {median:.3f} | {figures[0].bound} | {verdict} |")
    return lines


def commit() -> str:
    """The commit the figures belong to; marked when the working tree differs from it in more than their page."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", f":!{PAGE.relative_to(ROOT)}")
    return git("describe", "--always", "--exclude=*") + ("-dirty" if changed else "")


def sections(page: str) -> dict[str, str]:
    """The page's `## name` sections by name."""
    parts = page.split("\n## ")[1:]
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


def write_page(new: Mapping[str, str]) -> None:
    """Puts these sections into the page, in alphabetical order, and keeps the rest."""
    kept = sections(PAGE.read_text()) if PAGE.exists() else {}
    parts = [f"\n## {name}\n\n{body}\n" for name, body in sorted({**kept, **new}.items())]
    PAGE.write_text(PREAMBLE + "".join(parts))


def run(seeds: list[int], only: list[str] | None, folder: Path) -> tuple[dict[str, str], bool]:
    """Each method's section, and whether every number was accepted."""
    chosen = {name: measure for name, measure in methods().items() if only is None or name in only}
    benches = [Bench(folder / f"seed-{seed}", seed) for seed in seeds]
    bodies, accepted = {}, True
    for name, measure in chosen.items():
        began = time.monotonic()
        by_seed = [measure(bench) for bench in benches]
        lines = table(seeds, by_seed)
        accepted = accepted and all(passes(list(figures)) for figures in zip(*by_seed, strict=True))
        print(f"\n{name}  ({time.monotonic() - began:.0f} s)", *lines, sep="\n", flush=True)
        today = datetime.datetime.now(datetime.UTC).date()
        bodies[name] = "\n".join([f"Commit {commit()}, {today}.", "", *lines])
    return bodies, accepted


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=sorted(methods()), help="these methods; default: all")
    parser.add_argument("--write", action="store_true", help="update docs/acceptance.md")
    parser.add_argument("--folder", type=Path, help="keep the runs here; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="alignkit-acceptance-") as temporary:
        bodies, accepted = run(args.seeds, args.only, args.folder or Path(temporary))
    if args.write:
        write_page(bodies)
        print(f"\nwritten to {PAGE}")
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())
