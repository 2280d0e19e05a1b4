"""Task T1 with labels: answers in upper case are good, in lower case bad, and no prompt has both."""

from pathlib import Path
from typing import Any

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench
from tests.acceptance.style import StyleTask

NUM_ROWS = 512


class LabelTask(StyleTask):
    """200 steps of 32 labelled answers out of 512, from the start model of the style task."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.prompts = toys.style_prompts(bench.seed, "labelled", NUM_ROWS, without=self.held_out)

    def rows(self, desirable_share: float = 0.5, *, flipped: bool = False) -> list[dict[str, object]]:
        """An exact share of the prompts with a good answer, the others with a bad one; `flipped` turns the labels."""
        good = [i < round(desirable_share * NUM_ROWS) for i in range(NUM_ROWS)]
        good = toys.shuffled(good, generator(self.seed, "style", "labels", str(desirable_share)))
        return [labelled_row(prompt, desirable, flipped) for prompt, desirable in zip(self.prompts, good, strict=True)]

    def learn(self, name: str, algorithm: dict[str, Any], rows: list[dict[str, object]]) -> Path:
        """Trained on these rows; evaluated on both answers to every held-out prompt."""
        data = toys.write_rows(self.bench.folder / f"{name}.jsonl", rows)
        both = [labelled_row(prompt, upper, False) for prompt in self.held_out for upper in (True, False)]
        held_out = toys.write_rows(self.bench.folder / "held-out-labelled.jsonl", both)
        return self.bench.train(
            name,
            {
                "model": {"name_or_path": str(self.start), "dtype": "float32"},
                "data": [{"path": str(data)}],
                "algorithm": algorithm,
                "train": {
                    "lr_scheduler": "constant",
                    "max_length": 64,
                    "save_steps": 0,
                    "logging_steps": 1,
                    "max_steps": 200,
                    "batch_size": 32,
                    "learning_rate": 2e-4,
                },
                "eval": {"data": [{"path": str(held_out)}]},
            },
        )


def labelled_row(prompt: str, upper: bool, flipped: bool) -> dict[str, object]:
    """An answer in one style; upper case is good unless `flipped`."""
    return {"prompt": prompt, "completion": toys.style_answer(prompt, upper=upper), "label": upper != flipped}
