"""An optimizer batch → what the policy is given at a time."""

from __future__ import annotations

from typing import Any

from alignkit.core.contracts import Algorithm, World
from alignkit.core.types import Batch
from alignkit.data.collate import select_units
from alignkit.loop.config import TrainConfig
from alignkit.loop.reduction import emptied
from alignkit.models.policy import CausalPolicy
from alignkit.models.roster import Roster


def at_present(
    batch: Batch, part: list[int], algorithm: Algorithm[Any], roster: Roster, world: World
) -> tuple[Batch, list[int]]:
    """A batch that holds these units of the round, and their places in it.

    What follows the policy from step to step is of its present weights.
    """
    if not (fresh := algorithm.needs.fresh):
        return batch, part
    batch = roster.fill(select_units(batch, part) if part else emptied(batch), fresh, began=False)
    return algorithm.relabel(batch, world), list(range(len(part)))


def micros(batch: Batch, part: list[int], policy: CausalPolicy, config: TrainConfig, world: World) -> list[Batch]:
    """Micro-batches of this rank, equally many on every rank, padded with empty ones."""
    index = policy.cut(batch, part, config.micro_batch_tokens, config.micro_batch_size)
    real = [select_units(batch, micro) for micro in index]
    most = max(world.gather(len(real)))
    return real + [emptied(batch)] * (most - len(real))
