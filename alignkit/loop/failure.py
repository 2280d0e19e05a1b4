"""What a run leaves behind when a number is not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.core.errors import RunFailed
from alignkit.core.types import Batch
from alignkit.data.collate import select_units
from alignkit.loop.checkpoint import write_state

if TYPE_CHECKING:
    from alignkit.loop.trainer import Trainer


def nonfinite(trainer: Trainer, part: list[int], found: dict[str, float]) -> RunFailed:
    """Before the step: dump the batch, keep a loadable checkpoint, say what broke. Every rank calls it."""
    step, batch, world = trainer.progress.step + 1, trainer.round.batch, trainer.dist.world
    assert batch is not None
    with trainer.dist.whole():
        broken = trainer.policy.broken_weights()
    groups = [group for ids in world.gather([trainer.round.groups[i] for i in part]) for group in ids]
    dump = dump_batch(trainer.folder / "debug" / f"step-{step}", batch, part, groups, found, world.rank)
    checkpoints = trainer.checkpoints
    if not broken or not checkpoints.steps():  # broken weights must not push out the last good ones
        trainer.save()
    return RunFailed(nonfinite_message(step, found, groups, broken, dump, checkpoints.path(checkpoints.steps()[0])))


def dump_batch(
    folder: Path, batch: Batch, part: list[int], groups: Sequence[str], found: Mapping[str, float], rank: int
) -> Path:
    """This rank's share of the failing optimizer batch, as tensors and JSON. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = select_units(batch, part) if part else batch
    state = {"inputs": chosen.inputs, "columns": chosen.columns, "k": chosen.k, "units": part}
    numbers = {name: value if isfinite(value) else str(value) for name, value in found.items()}
    write_state(folder, f"batch-rank-{rank}", {**state, "groups": list(groups), "metrics": numbers})
    return folder


def nonfinite_message(
    step: int, found: Mapping[str, float], groups: Sequence[str], broken: Sequence[str], dump: Path, checkpoint: Path
) -> str:
    """One message: what, where, why probably, what to do."""
    bad = [name for name, value in found.items() if not isfinite(value)]
    weights = f"The weights hold nan or infinity: {', '.join(broken[:3])}. " if broken else ""
    more = f" and {len(groups) - 8} more" if len(groups) > 8 else ""
    return (
        f"step {step}: {', '.join(bad)} not finite; stopped before the step. {weights}"
        f"Groups of this batch: {', '.join(groups[:8])}{more}. The batch is in {dump}, the last checkpoint is "
        f"{checkpoint}. Look at these rows, lower train.learning_rate, or try model.dtype: float32."
    )
