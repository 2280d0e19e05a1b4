"""Tasks T1 and T3 on a bench: the warmed-up start model, preference runs from it, and what their samples look like."""

from functools import cached_property
from pathlib import Path
from typing import Any

from tests.acceptance import toys
from tests.acceptance.bench import Bench

NUM_WARM_UP, NUM_PAIRS, NUM_HELD_OUT = 12_800, 512, 400


class StyleTask:
    """Copy four letters, in upper case (style U) or as they are (style L)."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seed = bench, bench.seed
        self.held_out = toys.style_prompts(self.seed, "held-out", NUM_HELD_OUT)

    @cached_property
    def start(self) -> Path:
        """SFT from random weights on answers half in one style and half in the other: 800 steps of 64."""
        model = toys.write_model(self.bench.folder / "style-random", self.seed)
        prompts = toys.style_prompts(self.seed, "warm-up", NUM_WARM_UP, without=self.held_out)
        data = toys.write_rows(self.bench.folder / "style-warm-up.jsonl", toys.style_warm_up(self.seed, prompts))
        return self.bench.train(
            "style-warm-up",
            {
                "model": {"name_or_path": str(model), "dtype": "float32"},
                "data": [{"path": str(data)}],
                "algorithm": {"name": "sft"},
                "train": _train(max_steps=800, batch_size=64, learning_rate=3e-3),
            },
        )

    def prefer(
        self, name: str, algorithm: dict[str, Any], *, swapped: float = 0.0, learning_rate: float = 2e-4
    ) -> Path:
        """150 steps of 32 pairs out of 512 that prefer style U; evaluated on clean held-out pairs."""
        prompts = toys.style_prompts(self.seed, "pairs", NUM_PAIRS, without=self.held_out)
        pairs = toys.style_pairs(self.seed, prompts, swapped=swapped)
        data = toys.write_rows(self.bench.folder / f"{name}.jsonl", pairs)
        clean = toys.write_rows(self.bench.folder / "held-out.jsonl", toys.style_pairs(self.seed, self.held_out))
        return self.bench.train(
            name,
            {
                "model": {"name_or_path": str(self.start), "dtype": "float32"},
                "data": [{"path": str(data)}],
                "algorithm": algorithm,
                "train": _train(max_steps=150, batch_size=32, learning_rate=learning_rate),
                "eval": {"data": [{"path": str(clean)}]},
            },
        )

    def shares(self, run: Path) -> tuple[float, float]:
        """P(U) and the share of exact copies among samples for held-out prompts."""
        answers = self.bench.answers(run, self.held_out, max_tokens=8)
        return toys.upper_share(self.held_out, answers), toys.valid_share(self.held_out, answers)


def _train(**keys: Any) -> dict[str, Any]:
    return {"lr_scheduler": "constant", "max_length": 64, "save_steps": 0, "logging_steps": 50, **keys}
