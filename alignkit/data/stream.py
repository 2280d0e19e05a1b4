"""Groups in the order of training: mixed by weight, shuffled by epoch, dealt to ranks, resumed to the exact group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from alignkit.core.errors import DataError
from alignkit.core.rng import permutation
from alignkit.core.types import Completion, Group

Place = tuple[int, int]
"""A group: the number of its source, and its index there."""


def stratified(strata: Sequence[str]) -> list[int]:
    """The places of a sequence in an order in which every stretch holds each value in the proportion of the whole.

    Places of one value keep their order. Where all values are equally frequent they take turns.
    """
    places: dict[str, list[int]] = {}
    for place, value in enumerate(strata):
        places.setdefault(value, []).append(place)
    turns = sorted(places, key=lambda value: -len(places[value]))  # of equally frequent ones whichever came first
    marks = [
        ((2 * i + 1) / (2 * len(places[value])), turn, place)
        for turn, value in enumerate(turns)
        for i, place in enumerate(places[value])
    ]
    return [place for _, _, place in sorted(marks)]


def with_partners(groups: Sequence[Group], max_length: int) -> list[Group]:
    """The groups of a whole round, each with the completion of the one before it, the first with the last one's.

    None where prompt and completion stand together in a group of the round, so that they do belong together. A
    completion that is too long behind its new prompt loses its end.
    """
    together = {(tuple(group.prompt), tuple(group.completions[0].tokens)) for group in groups}
    found = []
    for group, before in zip(groups, [*groups[-1:], *groups[:-1]], strict=True):
        other = before.completions[0]
        known = (tuple(group.prompt), tuple(other.tokens)) in together
        found.append(replace(group, partner=None if known else _cut(other, max_length - len(group.prompt))))
    return found


def _cut(completion: Completion, room: int) -> Completion:
    if len(completion.tokens) <= room:
        return completion
    trained, logps = completion.trained, completion.logps
    return replace(
        completion,
        tokens=completion.tokens[:room],
        trained=trained and trained[:room],
        logps=logps and logps[:room],
    )


def groups_per_epoch(sources: Sequence[Sequence[Group]], weights: Sequence[float]) -> int:
    """Groups of one epoch of a stream of these sources."""
    return sum(_shares(sources, weights))


def _shares(sources: Sequence[Sequence[Group]], weights: Sequence[float]) -> list[int]:
    return [
        max(1, round(len(source) * weight)) if source else 0 for source, weight in zip(sources, weights, strict=True)
    ]


class Stream:
    """Rounds of `groups_per_round` groups over all ranks; this rank takes every `size`-th of them from `rank` on.

    `weights[i]`: how often each group of source i comes in an epoch. A fraction takes turns: at 0.5 two epochs see
    every group once. The order depends on seed and epoch alone, so any world size can continue it.
    `partners`: groups come with those of `with_partners`, over all ranks, in rows of at most so many tokens; None =
    without. `strata`: the field of a group by which an epoch's order is `stratified`; None = as shuffled.
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
        partners: int | None = None,
        strata: str | None = None,
    ) -> None:
        if not any(sources):
            raise DataError("there is no group to train on: every data source is empty")
        self.sources, self.weights, self.seed = sources, weights, seed
        self.groups_per_round, self.rank, self.size = groups_per_round, rank, size
        self._partners, self._strata = partners, strata
        self._shares = _shares(sources, weights)
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
        groups = self._whole_round(self._order[self._cursor : end])
        self._cursor = end
        if end == self.groups_per_epoch:
            self._epoch, self._cursor = self._epoch + 1, 0
            self._order = self._draw(self._epoch)
        return groups[self.rank :: self.size]

    def rounds(self, count: int) -> Iterator[list[Group]]:
        """The groups of a run's first `count` rounds over all ranks, as the data gave them."""
        for epoch in range(-(-count // self.rounds_per_epoch)):
            order = self._draw(epoch)[: (count - epoch * self.rounds_per_epoch) * self.groups_per_round]
            for start in range(0, len(order), self.groups_per_round):
                places = order[start : start + self.groups_per_round]
                yield [self.sources[source][index] for source, index in places]

    def preview(self, rounds: int) -> list[Group]:
        """The groups of a run's first `rounds` rounds over all ranks, wherever the stream stands now.

        Each once, or once with every partner it meets.
        """
        seen: dict[tuple[Place, Place], Group] = {}
        everything = sum(len(source) for source in self.sources)
        for epoch in range(-(-rounds // self.rounds_per_epoch)):
            left = (rounds - epoch * self.rounds_per_epoch) * self.groups_per_round
            order = self._draw(epoch)[:left]
            for start in range(0, len(order), self.groups_per_round):
                places = order[start : start + self.groups_per_round]
                before = [*places[-1:], *places[:-1]]
                for place, other, group in zip(places, before, self._whole_round(places), strict=True):
                    seen.setdefault((place, place if group.partner is None else other), group)
            if len(seen) == everything and self._partners is None:
                break
        return [seen[pair] for pair in sorted(seen)]

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

    def _whole_round(self, places: list[Place]) -> list[Group]:
        groups = [self.sources[source][index] for source, index in places]
        return groups if self._partners is None else with_partners(groups, self._partners)

    def _draw(self, epoch: int) -> list[Place]:
        """Every group of an epoch, in order."""
        pool: list[Place] = []
        for number, (source, share) in enumerate(zip(self.sources, self._shares, strict=True)):
            if not source:
                continue
            copies, rest = divmod(share, len(source))
            pool += [(number, index) for _ in range(copies) for index in range(len(source))]
            turn = permutation(len(source), self.seed, "weight", number) if rest else []
            pool += [(number, turn[(epoch * rest + i) % len(source)]) for i in range(rest)]
        order = [pool[i] for i in permutation(len(pool), self.seed, "shuffle", epoch)]
        if self._strata is None:
            return order
        values = [str(self.sources[source][index].fields[self._strata]) for source, index in order]
        return [order[i] for i in stratified(values)]
