"""Tiny models and recipes that the tests of this folder share."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from alignkit.algorithms.dpo import DPO
from alignkit.assemble import Assembled, assemble
from alignkit.dist.engine import DistEngine
from alignkit.models.load import DTYPES
from alignkit.recipe import Recipe, load_recipe
from alignkit.testing import build_tiny_model, toy_rows

LORA = {"r": 4, "alpha": 8}
TEXT = [[1, 10, 11, 12, 13, 14, 2], [1, 40, 41, 42]]


class Workshop:
    """A folder with a model, five pairs, and recipes that put them together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = build_tiny_model(folder / "model")
        self.data = folder / "pairs.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(DPO, 5)))

    def recipe(self, run: str, **blocks: Any) -> Recipe:
        """`blocks` are merged into the recipe's own; `algorithm` is a name."""
        training = {
            "num_epochs": 9,
            "max_steps": 3,
            "batch_size": 5,
            "learning_rate": 5e-3,
            "lr_scheduler": "constant",
            "max_length": 64,
            "save_steps": 0,
        }
        return load_recipe(
            {
                "output_dir": str(self.folder / run),
                "model": {"name_or_path": str(self.model), "dtype": "float32", **blocks.pop("model", {})},
                "data": [{"path": str(self.data)}],
                "algorithm": {"name": blocks.pop("algorithm", "dpo")},
                "train": {**training, **blocks.pop("train", {})},
                **blocks,
            }
        )


def assembled(recipe: Recipe) -> Assembled:
    """All parts of a run, nothing trained."""
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    return assemble(recipe, DistEngine(DTYPES[recipe.model.dtype]), Console(quiet=True))


def plain_logits(model: Any) -> torch.Tensor:
    """[6, V] of the rows of `TEXT` one after the other, as plain transformers or peft computes them, eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in TEXT])
