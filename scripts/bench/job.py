"""What one side is told to do, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BETA, MAX_GRAD_NORM = 0.1, 1.0


@dataclass(frozen=True)
class Job:
    """A race as both sides see it. `compact` and `layout` each concern one of them.

    `samples`: completions of up to `longest` tokens that a side writes for each row itself; 0: rows hold them.
    `compact`: TRL's fused head scores completion positions only, on the CPU too; None leaves it as it comes.
    """

    algorithm: str
    folder: Path
    batch_size: int
    rows: int
    max_length: int
    seed: int
    threads: int
    device: str
    layout: str
    compact: bool | None
    samples: int = 0
    longest: int = 0

    @property
    def learning_rate(self) -> float:
        """So small where completions are written that the model stays what it is: one that stops as calibrated."""
        return 1e-7 if self.samples else 1e-5

    @property
    def rows_a_step(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size // (self.samples or 1)

    @property
    def model_folder(self) -> Path:
        """Weights and tokenizer."""
        return self.folder / "model"

    @property
    def rows_file(self) -> Path:
        """The rows as a user has them, before any shuffle."""
        return self.folder / "rows.jsonl"

    @property
    def ordered_file(self) -> Path:
        """The same rows in the order of training."""
        return self.folder / "rows-in-order.jsonl"

    def output_folder(self, side: str) -> Path:
        """What a side writes."""
        return self.folder / side
