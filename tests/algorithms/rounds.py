"""Rounds of an online method made of given numbers, and several processes as threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from alignkit.core import Batch, Forward
from alignkit.dist.world import LocalWorld

WAIT = 30


def round_of(mask: Tensor, **columns: Tensor) -> Batch:
    """A round of one-row units: [N, T] of tokens, columns [N] or [N, T]; a prompt token is put before each row.

    A double underscore stands for the point in the name of a column: `policy__logps`.
    """
    rows, shape = len(mask), (len(mask), mask.shape[1] + 1)
    known = {name.replace("__", "."): with_prompt(x) if x.ndim > 1 else x for name, x in columns.items()}
    tokens = torch.zeros(shape, dtype=torch.long)
    truth = torch.ones(rows, dtype=torch.bool)
    return Batch(
        inputs={"tokens": tokens, "attention": torch.ones_like(tokens)},
        columns={"mask": with_prompt(mask.bool()), "row": truth, "unit": truth.clone(), **known},
        k=1,
    )


def with_prompt(x: Tensor) -> Tensor:
    """[N, T] → [N, 1 + T]."""
    return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)


def said(logps: Tensor, **others: Tensor) -> Forward:
    """What the policy says of such a round, from [N, T] each."""
    return Forward(logps=with_prompt(logps), **{name: with_prompt(x) for name, x in others.items()})


class _Rank(LocalWorld):
    def __init__(self, rank: int, size: int, barrier: Barrier, held: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._held = rank, size, barrier, held

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x)).sum(0)

    def gather(self, obj: Any) -> list[Any]:
        self._held[self.rank] = obj
        self._barrier.wait(WAIT)
        found = list(self._held)
        self._barrier.wait(WAIT)
        return found


def on_ranks(job: Callable[[Any, LocalWorld], Any], shares: Sequence[Any]) -> list[Any]:
    """What `job(share, world)` answers on each rank."""
    size = len(shares)
    barrier, held = Barrier(size), [None] * size
    ranks = [_Rank(rank, size, barrier, held) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(job, shares, ranks))
