"""How the cost of a step grows: time and memory of forward and backward against batch, completions, prompt, vocabulary.

    python scripts/bench/scaling.py [--repeats 3] [--json FILE] [--figure FILE.svg] [--table]

The engine alone, without loop or optimizer, for each layout of `model.layout`: one point is one process, so that memory
is its own. Rows have the lengths of the mixed workloads unless the swept axis says otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT / "scripts"), str(ROOT)]

LAYOUTS = ("padded", "packed", "prefix_shared")
START = {"groups": 2, "completions": 2, "prompt": 200, "vocabulary": 2048}
AXES = {
    "groups": (1, 2, 4, 8),
    "completions": (1, 2, 4, 8),
    "prompt": (50, 400, 1600),
    "vocabulary": (2048, 32768, 151936),
}
TITLES = {
    "groups": "prompts in a batch, 2 completions each",
    "completions": "completions of a prompt, 2 prompts",
    "prompt": "tokens of a prompt",
    "vocabulary": "words of the vocabulary",
}
COMPLETION = (50, 400)


def measure(point: dict[str, Any]) -> dict[str, float]:
    """One point: processor seconds of a step (least of the repeats), MB it adds to the process, tokens computed."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from alignkit.core.rng import generator
    from alignkit.core.types import Row
    from alignkit.data.collate import collate
    from alignkit.dist.engine import DistEngine
    from alignkit.models.layout import lay_out
    from alignkit.models.policy import CausalPolicy, ForwardOptions
    from bench.gate import Meter

    torch.set_num_threads(point["threads"])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=point["vocabulary"],
            hidden_size=256,
            num_hidden_layers=4,
            intermediate_size=704,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    )
    units = []
    for g in range(point["groups"]):
        rng = generator(0, "scaling", g)
        words = range(2, point["vocabulary"])
        prompt = rng.choices(words, k=round(point["prompt"] * rng.uniform(0.5, 1.5)))
        for _ in range(point["completions"]):
            answer = rng.choices(words, k=rng.randint(*COMPLETION))
            units.append((Row([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)),))
    batch = collate(units)
    policy = CausalPolicy(model, DistEngine(torch.float32), ForwardOptions(point["layout"]))
    layout = policy.path.layout
    outputs = frozenset({"logps", "entropy", "correct"})

    def step() -> None:
        policy.loss(batch, outputs, lambda out, some: -out.logps[some["mask"]].sum() / 1000).backward()

    meter = Meter("cpu")
    base = meter.read().resident
    step()
    peak, seconds = meter.read().peak, []
    for _ in range(point["repeats"]):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    tokens = lay_out(batch, layout, torch.device("cpu")).tokens.numel()
    return {"seconds": min(seconds), "megabytes": (peak - base) / 2**20, "tokens": tokens}


def sweep(threads: int, repeats: int) -> list[dict[str, Any]]:
    """Every axis, every layout, one process a point."""
    found = []
    for axis, values in AXES.items():
        for value in values:
            for layout in LAYOUTS:
                point = {**START, axis: value, "layout": layout, "threads": threads, "repeats": repeats}
                command = [sys.executable, __file__, "--point", json.dumps(point)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{axis} {value} {layout} failed:\n{done.stderr}")
                found.append({"axis": axis, "value": value, "layout": layout, **json.loads(done.stdout)})
                print(f"{axis} {value} {layout}: {found[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Time above, memory below, an axis a column, a layout a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    panels = figure.subplots(2, len(AXES))
    units = {"seconds": "processor seconds of a step", "megabytes": "MB a step adds"}
    for column, axis in enumerate(AXES):
        for row, unit in enumerate(units):
            panel = panels[row][column]
            for layout, color in zip(LAYOUTS, ("#999999", "#d08a2e", "#2563a8"), strict=True):
                mine = [p for p in points if p["axis"] == axis and p["layout"] == layout]
                panel.plot([p["value"] for p in mine], [p[unit] for p in mine], "o-", ms=3, color=color, label=layout)
            panel.set_ylim(bottom=0)
            panel.set_xscale("log" if axis == "vocabulary" else "linear")
            panel.set_xlabel(TITLES[axis])
            panel.spines[["top", "right"]].set_visible(False)
            if column == 0:
                panel.set_ylabel(units[unit])
    panels[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def table(points: list[dict[str, Any]]) -> str:
    """Markdown: seconds, MB and tokens of the layouts at every point."""
    lines = [
        "| axis | value | tokens padded / packed / shared | seconds | MB |",
        "|---|---|---|---|---|",
    ]
    for axis, values in AXES.items():
        for value in values:
            mine = [p for p in points if p["axis"] == axis and p["value"] == value]
            shown = (
                " / ".join(f"{p['tokens']:.0f}" for p in mine),
                " / ".join(f"{p['seconds']:.2f}" for p in mine),
                " / ".join(f"{p['megabytes']:.0f}" for p in mine),
            )
            lines.append(f"| {axis} | {value} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3, help="steps timed at a point, the quickest counts (3)")
    parser.add_argument("--threads", type=int, default=1, help="of one process (1: processor time then is work)")
    parser.add_argument("--json", type=Path, help="write the points here; read them from here if it exists")
    parser.add_argument("--figure", type=Path, help="draw them here")
    parser.add_argument("--table", action="store_true", help="print them as Markdown")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(json.loads(args.point))))
        return
    if args.json and args.json.exists():
        points = json.loads(args.json.read_text())
    else:
        points = sweep(args.threads, args.repeats)
        if args.json:
            args.json.write_text(json.dumps(points, indent=1))
    if args.figure:
        draw(points, args.figure)
    if args.table:
        print(table(points))


if __name__ == "__main__":
    main()
