"""What one side is told to do, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LEARNING_RATE, BETA, MAX_GRAD_NORM = 1e-5, 0.1, 1.0


@dataclass(frozen=True)
class Job:
    """A race as both sides see it. `compact` and `layout` each concern one of them.

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
