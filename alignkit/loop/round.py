"""Where a run is: the counters, and the round in hand with its optimizer batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignkit.core.contracts import World
from alignkit.core.rng import permutation
from alignkit.core.types import Batch, Metric, Row, Unit
from alignkit.track.metrics import Totals


class Progress:
    """Counters of the run. `step` counts optimizer steps, `tokens` every token trained on over all ranks."""

    def __init__(self, total_rounds: int, total_steps: int) -> None:
        self.total_rounds, self.total_steps = total_rounds, total_steps
        self.round, self.step, self.tokens = 0, 0, 0
        self.stopped = False

    @property
    def version(self) -> int:
        """The policy's version: how many steps have moved it."""
        return self.step

    def rounds(self) -> Iterator[int]:
        """Rounds from the present one on, until the steps are spent."""
        while self.round < self.total_rounds and self.step < self.total_steps:
            yield self.round
            self.round += 1

    def stop(self) -> None:
        """Make the present step the last one."""
        self.stopped = self.stopped or self.step < self.total_steps
        self.total_steps = self.step

    def state_dict(self) -> dict[str, Any]:
        """The counters, and whether the run was stopped before its planned end."""
        return {"round": self.round, "step": self.step, "tokens": self.tokens, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting."""
        self.round, self.step, self.tokens = state["round"], state["step"], state["tokens"]
        if state["stopped"]:
            self.stop()


class Round:
    """One round's annotated batch, cut into optimizer batches; may be left and resumed half-way."""

    def __init__(self, seed: int, batch_size: int, epochs: int) -> None:
        self._seed, self._batch_size, self._epochs = seed, batch_size, epochs
        self.index = -1
        self.batch: Batch | None = None
        self.groups: list[str] = []
        self._news: Totals = {}
        self._parts: list[list[int]] = []
        self._cursor = 0

    def begin(
        self,
        index: int,
        batch: Batch,
        units: list[Unit],
        dealt: Mapping[str, int],
        world: World,
        news: Totals | None = None,
    ) -> None:
        """Take a new round: this rank's `units`, and where the groups they are of stand among those of all ranks.

        Which unit falls into which part depends on the order of groups over all ranks, never on the rank layout,
        however many units a group gives. A unit that the batch's `unit` column does not count is in no part. `news` are
        logged with the first part.
        """
        self.index, self.batch, self._cursor, self._news = index, batch, 0, dict(news or {})
        self.groups = [unit[0].group for unit in units]
        counted: list[bool] = batch["unit"].tolist()
        mine_dealt = [(i, dealt.get(name, -1)) for i, name in enumerate(self.groups) if counted[i]]
        everyone: list[list[tuple[int, int]]] = world.gather(mine_dealt)
        places = sorted((place, i, r) for r, found in enumerate(everyone) for i, place in found)
        mine = {i: number for number, (_, i, r) in enumerate(places) if r == world.rank}
        total = len(places)
        num_parts = math.ceil(total / self._batch_size)
        self._parts = []
        for epoch in range(self._epochs):
            order = permutation(total, self._seed, "parts", index, epoch) if num_parts > 1 else list(range(total))
            for p in range(num_parts):
                chosen = set(order[p * self._batch_size : (p + 1) * self._batch_size])
                self._parts.append([i for i, number in sorted(mine.items()) if number in chosen])

    def part(self) -> list[int] | None:
        """Local unit indices of the next optimizer batch (maybe none on this rank); None = the round is spent."""
        return self._parts[self._cursor] if self._cursor < len(self._parts) else None

    @property
    def is_fresh(self) -> bool:
        """Whether no part has been trained on: the policy is the one that wrote the round's completions."""
        return self._cursor == 0

    def news(self) -> Totals:
        """What is to be logged of the round, for its first part alone."""
        return dict(self._news) if self.is_fresh else {}

    def advance(self) -> None:
        """The part in hand has been trained on."""
        self._cursor += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything of an unfinished round; of a spent one only its index."""
        state: dict[str, Any] = {"index": self.index, "cursor": self._cursor, "parts": self._parts, "batch": None}
        if self.part() is None or self.batch is None:
            return {**state, "parts": [], "cursor": 0, "groups": [], "news": {}}
        return {
            **state,
            "groups": self.groups,
            "news": {name: [float(m.sum), float(m.count), m.how] for name, m in self._news.items()},
            "batch": {"inputs": self.batch.inputs, "columns": self.batch.columns, "k": self.batch.k},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the round where it was left."""
        self.index, self._cursor, self._parts = state["index"], state["cursor"], state["parts"]
        self.groups = state["groups"]
        self._news = {name: Metric(*fields) for name, fields in state["news"].items()}
        saved = state["batch"]
        self.batch = None if saved is None else Batch(saved["inputs"], saved["columns"], saved["k"])

    def needs_all(self, state: dict[str, Any]) -> bool:
        """Never: a rank's units are its own."""
        del state
        return False

    def load_parts(self, states: Sequence[dict[str, Any]]) -> None:
        """Other ranks would share the round out anew: what is left of it is passed over."""
        self.index, self.batch, self._parts, self._cursor = states[0]["index"], None, [], 0


def blank_like(units: list[Unit], world: World) -> Unit:
    """A unit nothing counts, with as many rows and the same facts as the units of whichever rank has some.

    A rank whose share of the round is empty could not know them otherwise.
    """
    rows = [row for unit in units for row in unit]
    mine = (
        len(units[0]) if units else 1,
        {name for row in rows for name in row.inputs},
        {name for row in rows for name in row.token},
        {name for row in rows for name in row.scalar},
    )
    everyone: list[tuple[int, set[str], set[str], set[str]]] = world.gather(mine)
    sizes, inputs, token, scalar = zip(*everyone, strict=True)
    blank = Row(
        tokens=[0, 0],
        trained=[False, False],
        inputs=dict.fromkeys(set().union(*inputs), 0.0),
        token={name: [0.0, 0.0] for name in set().union(*token)},
        scalar=dict.fromkeys(set().union(*scalar), 0.0),
    )
    return tuple(blank for _ in range(max(sizes)))
