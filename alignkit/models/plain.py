"""A row alone through plain transformers: what every faster way is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.core.types import Row
from alignkit.models.heads import score_layer
from alignkit.models.paths import causal_model

KEPT = 512
"""Positions at a row's end whose logits are computed, where a model lets one choose: all would not always fit."""
PIECE = 64
"""Positions whose probabilities are held at a time."""
SHIFTS = 3


class PlainLogps(NamedTuple):
    """`by_shift[s]` [T]: log p of each token as predicted s positions before it, 0 where nothing is; 1 is right.

    `known` [T]: trained tokens for which all of them were computed.
    """

    by_shift: Tensor
    known: Tensor

    @property
    def logps(self) -> Tensor:
        """As each token is really predicted."""
        return self.by_shift[1]


@torch.no_grad()
def plain_logps(bare: Any, row: Row, device: torch.device, temperature: float = 1.0) -> PlainLogps:
    """The row through the model's own forward, as it stands: mode, adapters, autocast. On the CPU."""
    length = len(row.tokens)
    choosable = "logits_to_keep" in inspect.signature(causal_model(bare).forward).parameters
    first = max(0, length - KEPT) if choosable else 0
    options = {"logits_to_keep": length - first} if first else {}
    logits: Tensor = bare(input_ids=torch.tensor([row.tokens], device=device), **options).logits[0]
    by_shift = torch.zeros(SHIFTS, length)
    tokens = torch.tensor(row.tokens)
    for start in range(0, len(logits), PIECE):
        table = logits[start : start + PIECE].float().div(temperature).log_softmax(-1).cpu()
        for shift in range(SHIFTS):
            predicted = tokens[first + start + shift :][: len(table)]
            there = slice(first + start + shift, first + start + shift + len(predicted))
            by_shift[shift, there] = table[: len(predicted)].gather(1, predicted[:, None])[:, 0]
    known = torch.tensor(row.trained)
    if first:
        known[: first + SHIFTS - 1] = False
    return PlainLogps(by_shift, known)


@torch.no_grad()
def plain_scores(models: Sequence[Any], row: Row, device: torch.device) -> PlainLogps:
    """The row through each model's own body and score layer, all scores of a place added up. On the CPU."""
    length = len(row.tokens)
    told = torch.zeros(length)
    for model in models:
        states: Tensor = causal_model(model).base_model(input_ids=torch.tensor([row.tokens], device=device))[0][0]
        with torch.autocast(device.type, enabled=False):
            told += score_layer(model)(states.float()).sum(-1).float().cpu()
    by_shift = torch.zeros(SHIFTS, length)
    for shift in range(SHIFTS):
        by_shift[shift, shift:] = told[: length - shift]
    return PlainLogps(by_shift, torch.tensor(row.trained))
