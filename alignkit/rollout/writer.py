"""What writes token by token: a model and what it remembers of the rows under way, each in a place of its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Any, Protocol

from torch import Tensor

BLOCK = 128
"""Tokens of every row by which memory grows, and how many that no row needs any more are kept before it is moved."""


class Writer(Protocol):
    """Row i stands in place i, from 0 without gaps."""

    @property
    def mixes(self) -> bool:
        """Rows of different lengths may stand side by side, and enter at any time."""
        ...

    def read(self, prompts: Sequence[list[int]]) -> tuple[Any, Tensor]:
        """Prompts through the model: what it remembers of them, for `enter`, and its logits after each, [P, V]."""
        ...

    def enter(self, told: Any, numbers: Sequence[int]) -> None:
        """Further rows behind those under way, which begin with these prompts of a `read`, by number."""
        ...

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The next token of every row, and where in its row it stands → logits after it, [N, V]."""
        ...

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Only these rows, ascending, go on. Returns which row now stands in each place."""
        ...


def close_up(kept: Sequence[int], families: Sequence[Hashable]) -> list[int]:
    """The row for each place once only `kept` go on, ascending: few rows move, and none past another family's.

    `families` [rows]: rows that stand side by side and share one stay side by side. Rows may move in the order of
    places: what is in a place that gets another row is needed no more.
    """
    order: list[int] = []
    for _, members in groupby(kept, lambda row: families[row]):
        rows = list(members)
        places = range(len(order), len(order) + len(rows))
        moving = [row for row in rows if row not in places]
        staying = set(rows)
        order += [place if place in staying else moving.pop() for place in places]
    return order
