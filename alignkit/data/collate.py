"""Units → `Batch`, and a round's batch → micro-batches that never cut a unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignkit.core.types import Batch, Row, Unit

FLOAT_FACTS = torch.float32


BLANK: Unit = (Row(tokens=[0, 0], trained=[False, False]),)


def collate(units: Sequence[Unit], blank: Unit = BLANK) -> Batch:
    """Right-padded tensors of the units, on the CPU; with no units, `blank` alone, which no column counts: it keeps a
    rank with nothing to do in step with the others.

    A row shorter than two tokens has nothing to predict and is padded like any other. Row facts missing from some rows
    are 0 there; so are facts that only `blank` has.

    Raises:
        ValueError: units of different sizes; a trained first token, which nothing predicts.
    """
    real = bool(units)
    units = list(units) if real else [blank]
    k = len(units[0])
    if any(len(unit) != k for unit in units):
        raise ValueError(f"units of one batch must be equally large; got sizes {sorted({len(u) for u in units})}")
    rows = [row for unit in units for row in unit]
    facts = [*rows, *blank]
    width = max(2, *(len(row.tokens) for row in rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    attention = torch.zeros(len(rows), width, dtype=torch.bool)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row.tokens)
        if row.trained and row.trained[0]:
            raise ValueError(f"row of group {row.group!r}: its first token is marked trained, but nothing predicts it")
        tokens[i, :length] = torch.tensor(row.tokens, dtype=torch.long)
        attention[i, :length] = True
        mask[i, :length] = torch.tensor(row.trained, dtype=torch.bool)
    columns = {
        "mask": mask,
        "row": torch.full((len(rows),), real),
        "unit": torch.full((len(units),), real),
    }
    for name in sorted({name for row in facts for name in row.scalar}):
        columns[name] = torch.tensor([row.scalar.get(name, 0.0) for row in rows], dtype=FLOAT_FACTS)
    for name in sorted({name for row in facts for name in row.token}):
        column = torch.zeros(len(rows), width, dtype=FLOAT_FACTS)
        for i, row in enumerate(rows):
            if name in row.token:
                column[i, : len(row.tokens)] = torch.tensor(row.token[name], dtype=FLOAT_FACTS)
        columns[name] = column
    inputs = {"tokens": tokens, "attention": attention}
    for name in sorted({name for row in facts for name in row.inputs}):
        inputs[name] = torch.tensor([row.inputs.get(name, 0.0) for row in rows], dtype=FLOAT_FACTS)
    return Batch(inputs=inputs, columns=columns, k=k)


def unit_lengths(batch: Batch) -> list[int]:
    """Tokens of each unit's longest row, [U]."""
    return [int(x) for x in batch.by_unit(batch.inputs["attention"].sum(-1)).amax(1)]


def select_units(batch: Batch, index: Sequence[int]) -> Batch:
    """These units, in this order, cut to their own longest row."""
    units = torch.tensor(list(index), dtype=torch.long)
    rows = (units[:, None] * batch.k + torch.arange(batch.k)).reshape(-1)
    width = max(2, int(batch.inputs["attention"][rows].sum(-1).max()))

    def pick(x: Tensor) -> Tensor:
        if x.shape[0] == batch.num_rows:
            x = x[rows]
            return x[:, :width] if x.ndim > 1 else x
        return x[units]

    return Batch(
        inputs={name: pick(x) for name, x in batch.inputs.items()},
        columns={name: pick(x) for name, x in batch.columns.items()},
        k=batch.k,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    return Batch(
        inputs={name: x.to(device) for name, x in batch.inputs.items()},
        columns={name: x.to(device) for name, x in batch.columns.items()},
        k=batch.k,
    )


def cut(lengths: Sequence[int], k: int, max_tokens: int, max_units: int | None = None) -> list[list[int]]:
    """Positions 0 … len-1 in micro-batches of at most `max_tokens` padded tokens; a larger unit goes alone.

    Units of like length share a micro-batch, longest first, so that a budget too large for memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    micros: list[list[int]] = []
    for i in order:
        if micros:
            last = micros[-1]
            fits = lengths[last[0]] * k * (len(last) + 1) <= max_tokens
            if fits and (max_units is None or len(last) < max_units):
                last.append(i)
                continue
        micros.append([i])
    return micros
