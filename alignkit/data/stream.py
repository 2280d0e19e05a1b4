"""Groups in the order of training: mixed by weight, shuffled by epoch, dealt to ranks, resumed to the exact group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.core.errors import DataError
from alignkit.core.rng import permutation
from alignkit.core.types import Group


class Stream:
    """Rounds of `groups_per_round` groups over all ranks; this rank takes every `size`-th of them from `rank` on.

    `weights[i]`: how often each group of source i comes in an epoch. A fraction takes turns: at 0.5 two epochs see
    every group once. The order depends on seed and epoch alone, so any world size can continue it.
    Raises: DataError when there is no group.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Group]],
        weights: Sequence[float],
        *,
        seed: int,
        groups_per_round: int,
        rank: int,
        size: int,
    ) -> None:
        if not any(sources):
            raise DataError("there is no group to train on: every data source is empty")
        self.sources, self.weights, self.seed = sources, weights, seed
        self.groups_per_round, self.rank, self.size = groups_per_round, rank, size
        self._shares = [
            max(1, round(len(source) * weight)) if source else 0
            for source, weight in zip(sources, weights, strict=True)
        ]
        self._epoch, self._cursor = 0, 0
        self._order = self._draw(0)

    @property
    def groups_per_epoch(self) -> int:
        """Groups of one epoch, over all ranks."""
        return sum(self._shares)

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds of one epoch; the last one may be short."""
        return -(-self.groups_per_epoch // self.groups_per_round)

    @property
    def epoch(self) -> float:
        """Epochs taken so far, with their fraction."""
        return self._epoch + self._cursor / self.groups_per_epoch

    def take(self) -> list[Group]:
        """This rank's share of the next round; possibly empty where the last round of an epoch is short."""
        end = min(self._cursor + self.groups_per_round, self.groups_per_epoch)
        mine = self._order[self._cursor : end][self.rank :: self.size]
        self._cursor = end
        if end == self.groups_per_epoch:
            self._epoch, self._cursor = self._epoch + 1, 0
            self._order = self._draw(self._epoch)
        return [self.sources[source][index] for source, index in mine]

    def preview(self, rounds: int) -> list[Group]:
        """The groups of a run's first `rounds` rounds over all ranks, each once, wherever the stream stands now."""
        seen: dict[tuple[int, int], None] = {}
        everything = sum(len(source) for source in self.sources)
        for epoch in range(-(-rounds // self.rounds_per_epoch)):
            left = (rounds - epoch * self.rounds_per_epoch) * self.groups_per_round
            seen.update(dict.fromkeys(self._draw(epoch)[:left]))
            if len(seen) == everything:
                break
        return [self.sources[source][index] for source, index in sorted(seen)]

    def state_dict(self) -> dict[str, Any]:
        """The epoch and how many of its groups all ranks together have taken."""
        return {"epoch": self._epoch, "cursor": self._cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises DataError when that place does not exist in this data."""
        epoch, cursor = int(state["epoch"]), int(state["cursor"])
        if epoch < 0 or not 0 <= cursor < self.groups_per_epoch:
            raise DataError(
                f"the checkpoint stands at group {cursor} of epoch {epoch}, but an epoch of this data has "
                f"{self.groups_per_epoch} groups. The data changed since; resume with the data the run began with."
            )
        self._epoch, self._cursor = epoch, cursor
        self._order = self._draw(epoch)

    def _draw(self, epoch: int) -> list[tuple[int, int]]:
        """(source, index) of every group of an epoch, in order."""
        pool: list[tuple[int, int]] = []
        for number, (source, share) in enumerate(zip(self.sources, self._shares, strict=True)):
            if not source:
                continue
            copies, rest = divmod(share, len(source))
            pool += [(number, index) for _ in range(copies) for index in range(len(source))]
            turn = permutation(len(source), self.seed, "weight", number) if rest else []
            pool += [(number, turn[(epoch * rest + i) % len(source)]) for i in range(rest)]
        return [pool[i] for i in permutation(len(pool), self.seed, "shuffle", epoch)]
