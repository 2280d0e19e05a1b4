"""Writes recipes/README.md from what is true already: recipes, the methods' pages, and the figures they reached.

    python scripts/recipes_page.py [--check]

`--check` writes nothing and ends with 1 when the page is not what it would write.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES, METHODS = ROOT / "recipes", ROOT / "docs" / "algorithms"
PAGE, ACCEPTANCE = RECIPES / "README.md", ROOT / "docs" / "acceptance.md"
sys.path.insert(0, str(ROOT))

from alignkit import load_recipe  # noqa: E402

PREAMBLE = """\
# Recipes

Made by `make recipes-page` from the recipes, the methods' pages and [the acceptance
experiments](../docs/acceptance.md); do not edit it. A recipe is started by its name, and any key of it can be given on
the command line:

    alignkit check dpo/qwen-0.5b
    alignkit train dpo/qwen-0.5b train.learning_rate=5e-7 output_dir=runs/mine

`stories` recipes train a model of 260,000 weights in minutes on one core; the others name a real model, and run on one
GPU or under a launcher on several: `torchrun --nproc-per-node 8 -m alignkit train dpo/qwen-0.5b`. `batch_size` counts
over all of them, so results do not change with their number.
"""
SHOWN = ("learning_rate", "batch_size", "num_epochs", "max_length")


def settings(path: Path) -> list[str]:
    """A table row: the recipe's name, model, algorithm keys and the training settings that matter most."""
    recipe = load_recipe(path)
    model = Path(recipe.model.name_or_path).name
    lora = f", LoRA {recipe.model.lora.r}" if recipe.model.lora is not None else ""
    own: dict[str, Any] = recipe.algorithm.model_dump(mode="json", exclude_unset=True)
    keys = ", ".join(f"{name} {_short(value)}" for name, value in own.items() if name not in ("name", "loss"))
    training = ", ".join(f"{name} {getattr(recipe.train, name):g}" for name in SHOWN)
    file = path.relative_to(RECIPES)
    name = f"[{file.with_suffix('')}]({file})"
    return [name, f"{model}{lora}, {recipe.model.dtype}", keys or "defaults", training]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def section(page: str, title: str) -> str:
    """The text under a heading of the second level; empty when there is none."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found.group(1).strip() if found else ""


def reached(name: str) -> list[str]:
    """The lines of a method's table of figures that have a bound: what, median and bound."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        for line in section(ACCEPTANCE.read_text(encoding="utf-8"), name).splitlines()
        if line.startswith("| ")
    ]
    return [f"{_plain(row[0])} {row[-3]} ({row[-2]})" for row in rows[1:] if row[-2] != "reported"]


def _plain(cell: str) -> str:
    return cell.replace("\\|", "|")


def method(folder: Path) -> list[str]:
    """The section of one folder of recipes."""
    page = METHODS / f"{folder.name}.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    title = text.partition("\n")[0].removeprefix("# ") or folder.name
    lines = [f"\n## {title}\n"]
    if text:
        papers = dict.fromkeys(re.findall(r"\[arXiv [\d.v]+\]\([^)]+\)", text.partition("\n## ")[0]))
        source = f"Paper: {', '.join(papers)}. " if papers else ""
        lines.append(f"{source}All of it: [docs/algorithms/{page.name}](../docs/algorithms/{page.name}).\n")
    lines += ["| recipe | model | algorithm | training |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(settings(path))} |" for path in sorted(folder.glob("*.yaml"))]
    if departures := section(text, "Deviations"):
        linked = re.sub(r"\]\((?!http)([\w.-]+\.md)", r"](../docs/algorithms/\1", departures)
        lines.append(f"\nDepartures:\n\n{linked}")
    if figures := reached(folder.name):
        lines.append(f"\nReached, median of three seeds (bound): {'; '.join(figures)}.")
    return lines


def page() -> str:
    """The whole page."""
    folders = [path for path in sorted(RECIPES.iterdir()) if path.is_dir()]
    return "\n".join([PREAMBLE.rstrip("\n"), *(line for folder in folders for line in method(folder))]) + "\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = parser.parse_args()
    text = page()
    if args.check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print("recipes/README.md is up to date" if current else "recipes/README.md is old: run `make recipes-page`")
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"written to {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
