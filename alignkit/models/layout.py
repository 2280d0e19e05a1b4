"""Rows ↔ what the model is fed: padded rows, or one ragged stream in which a shared prompt appears once.

A *branch* is what a row adds to a prompt it shares. In a stream the shared prompts come first, then their branches in
the same order, then rows that share nothing; each token has the position it has in its row.

A token predicts its successor: the last trained token of a row scores nothing and is left out, with all that follows;
the last token of a prompt scores the first token of every branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from alignkit.core.types import Batch
from alignkit.data.collate import cut, unit_lengths

LayoutName = Literal["padded", "packed", "prefix_shared"]
WORTHWHILE = 16
"""A prompt is shared where that saves at least one token in so many; reading it from elsewhere has a price too."""

FEW = 0.9
"""States are chosen from a stream where less than this share of them is read."""


@dataclass(frozen=True)
class Segments:
    """Which tokens of a stream see which. Segments are adjacent, in order, and cover the stream.

    `lengths` of all segments; the first `num_prompts` are prompts, with `branches[g]` branches each, which follow in
    the same order; what is left are rows of their own. `longest` is the number of tokens of the longest row. `scored`
    are the places whose states are read, each once; None = all, or so many that choosing them would not pay.
    """

    lengths: tuple[int, ...]
    branches: tuple[int, ...]
    longest: int
    device: torch.device
    scored: Tensor | None = field(default=None, compare=False)
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_prompts(self) -> int:
        """Prompts with branches."""
        return len(self.branches)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each segment starts, and the end of the last."""
        bounds = [0]
        for length in self.lengths:
            bounds.append(bounds[-1] + length)
        return tuple(bounds)

    @cached_property
    def causal(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of every segment that has tokens."""
        return tuple((a, b) for a, b in pairwise(self.bounds) if a < b)

    @cached_property
    def crossing(self) -> tuple[tuple[int, int, int, int], ...]:
        """(start, stop) of the branches of a prompt together, then of the prompt they all see."""
        found, segment = [], self.num_prompts
        for g, count in enumerate(self.branches):
            a, b = self.bounds[segment], self.bounds[segment + count]
            if a < b:
                found.append((a, b, self.bounds[g], self.bounds[g + 1]))
            segment += count
        return tuple(found)

    @cached_property
    def readers(self) -> tuple[tuple[int, int, int, int], ...]:
        """(start, stop) of every segment that has tokens, then of the prompt it also sees (empty: none), in order."""
        prompts = [(0, 0)] * len(self.lengths)
        segment = self.num_prompts
        for g, count in enumerate(self.branches):
            prompts[segment : segment + count] = [(self.bounds[g], self.bounds[g + 1])] * count
            segment += count
        spans = zip(pairwise(self.bounds), prompts, strict=True)
        return tuple((a, b, c, d) for (a, b), (c, d) in spans if a < b)

    def own_mask(self, length: int, shared: int, window: int | None) -> Tensor:
        """Which of [prompt of `shared` tokens, own segment] each of a segment's `length` tokens sees, [length, both].

        `window` = how many tokens of its row, itself included, a token sees.
        """
        key = (length, shared, window)
        if key not in self._masks:
            position = torch.arange(shared + length, device=self.device)
            distance = position[shared:, None] - position
            self._masks[key] = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return self._masks[key]

    def whole_mask(self, window: int | None) -> Tensor:
        """Which tokens of the stream each of its tokens sees, [T, T]."""
        key = (-1, -1, window)
        if key not in self._masks:
            place, position, owner = self._facts
            distance = position[:, None] - position
            seen = (distance >= 0) & ((place[:, None] == place) | (owner[:, None] == place))
            self._masks[key] = seen if window is None else seen & (distance < window)
        return self._masks[key]

    @cached_property
    def _facts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token, [T] each: its segment, its position in its row, the segment of the prompt it sees (or -1)."""
        owners, shared = [-1] * len(self.lengths), [0] * len(self.lengths)
        segment = self.num_prompts
        for g, count in enumerate(self.branches):
            owners[segment : segment + count] = [g] * count
            shared[segment : segment + count] = [self.lengths[g]] * count
            segment += count
        lengths = torch.tensor(self.lengths)
        place = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        first = torch.tensor(self.bounds[:-1]) - torch.tensor(shared)
        position = torch.arange(len(place)) - first[place]
        return place.to(self.device), position.to(self.device), torch.tensor(owners)[place].to(self.device)

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """int32 on the device: bounds of the causal segments, of the branches of each prompt, of the prompts."""
        crossing = [(b - a, d - c) for a, b, c, d in self.crossing]

        def bounds(sizes: Sequence[int]) -> Tensor:
            return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(self.device)

        return (
            bounds([b - a for a, b in self.causal]),
            bounds([q for q, _ in crossing]),
            bounds([k for _, k in crossing]),
        )


@dataclass(frozen=True)
class Inputs:
    """What the model is fed: `tokens` [B, T]; for a stream (B = 1) also `positions` and who sees whom.

    `scored` [S] are places in the flattened [B · T] whose states predict the masked tokens of the batch, row by row.
    """

    tokens: Tensor
    positions: Tensor | None
    segments: Segments | None
    scored: Tensor


@dataclass(frozen=True)
class _Span:
    """A row in numbers: where training begins, the last trained token, and the tokens before each as bytes."""

    row: int
    first: int
    last: int
    prompt: bytes


def lay_out(batch: Batch, layout: LayoutName, device: torch.device) -> Inputs:
    """The batch (on the CPU) as the model is fed, on `device`.

    Source: packing, prompt sharing and their order are alignkit's own; no paper.
    """
    tokens, mask = batch.inputs["tokens"], batch["mask"]
    if layout == "padded":
        row, column = mask.nonzero(as_tuple=True)
        fed = tokens[:, :-1]
        scored = row * fed.shape[1] + column - 1
        return Inputs(fed.to(device), None, None, scored.to(device))
    return _stream(tokens, mask, _families(batch, layout), device)


def cut_batch(
    batch: Batch, index: Sequence[int], layout: LayoutName, max_tokens: int, max_units: int | None = None
) -> list[list[int]]:
    """Micro-batches of the units `index`: at most `max_tokens` tokens as the layout lays them out, a larger unit alone.

    In a stream a prompt costs once a micro-batch, so units that share one stand together. Prompts too short to be worth
    sharing are counted so too: they may take a micro-batch over its budget, by less than one part in `WORTHWHILE`.
    """
    if layout == "padded":
        lengths = unit_lengths(batch)
        cuts = cut([lengths[i] for i in index], batch.k, max_tokens, max_units)
        return [[index[j] for j in part] for part in cuts]
    prompts, costs = _unit_costs(batch, layout)
    clusters: dict[tuple[bytes, ...] | int, list[int]] = {}
    for i in index:
        clusters.setdefault(tuple(sorted(prompts[i])) or i, []).append(i)
    # Largest first, so that a budget too large for memory fails at once.
    ordered = sorted(
        clusters.values(), key=lambda units: (-max(costs[i] + sum(prompts[i].values()) for i in units), units)
    )
    micros: list[list[int]] = []
    seen: dict[bytes, int] = {}
    filled = 0
    for i in (i for units in ordered for i in units):
        fresh = {key: size for key, size in prompts[i].items() if key not in seen}
        cost = costs[i] + sum(fresh.values())
        full = filled + cost > max_tokens or (max_units is not None and bool(micros) and len(micros[-1]) >= max_units)
        if not micros or full:
            micros.append([])
            seen, filled, fresh = {}, 0, prompts[i]
            cost = costs[i] + sum(fresh.values())
        micros[-1].append(i)
        seen |= fresh
        filled += cost
    return micros


def _spans(batch: Batch) -> list[_Span]:
    """Rows with something to score. The bytes of a prompt make it comparable.

    A row's prompt ends where training begins, or before: where the input `prompt` says so.
    """
    mask, tokens = batch["mask"], batch.inputs["tokens"].numpy()
    width = mask.shape[1]
    some = mask.any(1).tolist()
    first = mask.int().argmax(1).tolist()
    if "prompt" in batch.inputs:
        told = batch.inputs["prompt"].long().tolist()
        first = [min(a, b) if b else a for a, b in zip(first, told, strict=True)]
    last = (width - 1 - mask.flip(1).int().argmax(1)).tolist()
    return [_Span(i, first[i], last[i], tokens[i, : first[i]].tobytes()) for i in range(mask.shape[0]) if some[i]]


def _unit_costs(batch: Batch, layout: LayoutName) -> tuple[list[dict[bytes, int]], list[int]]:
    """Per unit: tokens of each different prompt, and of all its branches."""
    prompts: list[dict[bytes, int]] = [{} for _ in range(batch.num_units)]
    costs = [0] * batch.num_units
    for span in _spans(batch):
        unit = span.row // batch.k
        if layout == "packed":
            costs[unit] += span.last
        else:
            prompts[unit][span.prompt] = span.first
            costs[unit] += span.last - span.first
    return prompts, costs


@dataclass(frozen=True)
class _Family:
    """Rows of the batch, the number of leading tokens they share, how many each adds (none where no row adds any)."""

    rows: list[int]
    shared: int
    rest: list[int]


def _families(batch: Batch, layout: LayoutName) -> list[_Family]:
    spans = _spans(batch)
    if not spans:  # the model still has to be called: other processes wait for its gradients
        return [_Family([0], 1, [])]
    if layout == "packed":
        return [_Family([span.row], span.last, []) for span in spans]
    by_prompt: dict[bytes, list[_Span]] = {}
    for span in spans:
        by_prompt.setdefault(span.prompt, []).append(span)
    tokens = batch.inputs["tokens"]
    families = []
    for members in by_prompt.values():
        if len(members) == 1:
            families.append(_Family([members[0].row], members[0].last, []))
            continue
        rows = [span.row for span in members]
        shortest = min(span.last for span in members)
        same = (tokens[rows, :shortest] == tokens[rows[0], :shortest]).all(0)
        shared = shortest if bool(same.all()) else int(same.int().argmin())
        rest = [span.last - shared for span in members]
        if shared * (len(members) - 1) * WORTHWHILE < sum(span.last for span in members):
            families += [_Family([span.row], span.last, []) for span in members]
        else:
            families.append(_Family(rows, shared, rest if any(rest) else []))
    return families


def _stream(tokens: Tensor, mask: Tensor, families: list[_Family], device: torch.device) -> Inputs:
    together = [family for family in families if family.rest]
    alone = [family for family in families if not family.rest]
    pieces: list[tuple[int, int, int]] = []  # row, first and last + 1 token
    pieces += [(family.rows[0], 0, family.shared) for family in together]
    prompt_of: dict[int, tuple[int, int]] = {}  # row → piece of its prompt, how long that is
    rest_of: dict[int, int] = {}
    for g, family in enumerate(together):
        for row, rest in zip(family.rows, family.rest, strict=True):
            prompt_of[row], rest_of[row] = (g, family.shared), len(pieces)
            pieces.append((row, family.shared, family.shared + rest))
    for family in alone:
        prompt_of |= dict.fromkeys(family.rows, (len(pieces), family.shared))
        pieces.append((family.rows[0], 0, family.shared))
    lengths = [stop - start for _, start, stop in pieces]
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)

    scored = []
    for row in mask.any(1).nonzero().flatten().tolist():
        piece, shared = prompt_of[row]
        before = mask[row].nonzero().flatten() - 1  # the token that predicts
        offset = begins[rest_of[row]] - shared if row in rest_of else 0
        scored.append(torch.where(before < shared, before + begins[piece], before + offset))
    places = torch.cat(scored) if scored else torch.empty(0, dtype=torch.long)
    read = torch.unique(places)
    segments = Segments(
        lengths=tuple(lengths),
        branches=tuple(len(family.rest) for family in together),
        longest=max(family.shared + max(family.rest, default=0) for family in families),
        device=device,
        scored=read.to(device) if 0 < len(read) < FEW * begins[-1] else None,
    )
    return Inputs(
        tokens=torch.cat([tokens[row, a:b] for row, a, b in pieces])[None].to(device),
        positions=torch.cat([torch.arange(a, b) for _, a, b in pieces])[None].to(device),
        segments=segments,
        scored=places.to(device),
    )
