"""Step-0 truths: what must hold on the first batch of every run, or the run is not what its recipe says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.core.errors import RunFailed
from alignkit.core.types import Batch, Row, Unit
from alignkit.data.collate import collate
from alignkit.models.policy import CausalPolicy

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Nats a token (rows) and units of a metric (closed forms): rounding of a few ulps; bfloat16 has a coarser grain."""


def check_rows(policy: CausalPolicy, units: Sequence[Unit], dtype: torch.dtype) -> None:
    """Three rows alone, unpadded, through plain transformers give the log-probabilities of the training path.

    Catches what losses cannot show: padding that counts, labels shifted by one, leaks between packed rows, wrong
    position ids, dropout left on.

    Raises:
        RunFailed: naming the row, the difference and the probable cause.
    """
    rows = _three([row for unit in units for row in unit if any(row.trained)])
    if not rows:
        return
    batch = collate([(row,) for row in rows])
    with torch.no_grad():
        ours = policy.forward(batch, frozenset({"logps"})).logps.cpu()
    for i, row in enumerate(rows):
        plain = _plain_logps(policy, row)
        trained = torch.tensor(row.trained)
        difference = (ours[i, : len(row.tokens)] - plain).abs().where(trained, 0.0)
        worst = float(difference.max())
        if not worst <= TOLERANCE[dtype]:  # also true for nan
            raise RunFailed(
                f"step-0 truth: the training path gives other log-probabilities than plain transformers for a row of "
                f"group {row.group!r}: they differ by {worst:.3g} nats at token {int(difference.argmax())} (allowed "
                f"{TOLERANCE[dtype]:g}). {_cause(policy, ours[i, : len(row.tokens)], plain, trained)} Nothing was "
                "trained. `train.step0_checks: false` skips this check."
            )


def check_closed_form(expected: Mapping[str, float], found: Mapping[str, float], dtype: torch.dtype) -> None:
    """While policy = reference the loss has a closed form (DPO: log 2, margins 0).

    Raises:
        RunFailed: naming the metric, both values and the probable cause.
    """
    for name, value in expected.items():
        if name in found and not abs(found[name] - value) <= TOLERANCE[dtype] * max(1.0, abs(value)):
            raise RunFailed(
                f"step-0 truth: {name} is {found[name]:.6g} on the first batch; while the policy equals the reference "
                f"it must be {value:.6g}. The reference is not the model the run starts from: a wrong adapter or "
                "models.reference, a stale cache of its log-probabilities, or dropout. Nothing was trained. "
                "`train.step0_checks: false` skips this check."
            )


def check_reference(out_logps: Tensor, batch: Batch, dtype: torch.dtype) -> None:
    """Token by token, the policy's log-probabilities are the reference's before the first step.

    Raises:
        RunFailed: they are not.
    """
    difference = (out_logps.detach() - batch["reference.logps"]).abs().where(batch["mask"], 0.0)
    worst = float(difference.max())
    if not worst <= TOLERANCE[dtype]:
        raise RunFailed(
            f"step-0 truth: before the first step the policy's log-probabilities differ from the reference's by "
            f"{worst:.3g} nats at some token (allowed {TOLERANCE[dtype]:g}). A wrong adapter or models.reference, a "
            "stale cache of its log-probabilities, or dropout. Nothing was trained. `train.step0_checks: false` skips "
            "this check."
        )


def _three(rows: list[Row]) -> list[Row]:
    """Shortest, middle and longest: padding shows in the short one, position ids in the long one."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    return [by_length[i] for i in sorted({0, len(by_length) // 2, len(by_length) - 1})] if by_length else []


def _plain_logps(policy: CausalPolicy, row: Row) -> Tensor:
    ids = torch.tensor([row.tokens], device=policy.dist.device)
    with policy.evaluating(), policy.dist.autocast():
        logits = policy.bare(input_ids=ids).logits[0]
    table = logits.float().log_softmax(-1).cpu()
    plain = torch.zeros(len(row.tokens))
    for t in range(1, len(row.tokens)):
        plain[t] = table[t - 1, row.tokens[t]]
    return plain


def _cause(policy: CausalPolicy, ours: Tensor, plain: Tensor, trained: Tensor) -> str:
    broken = policy.broken_weights()
    if broken:
        return f"Probable cause: nan or infinity in the weights ({', '.join(broken[:3])})."
    noisy: list[Any] = [m for m in policy.bare.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if noisy:
        return "Probable cause: dropout is on."
    inside = trained[1:] & trained[:-1]
    if bool(inside.any()) and float((ours[1:] - plain[:-1]).abs().where(inside, 0.0).max()) < 1e-3:
        return "Probable cause: labels are shifted by one token."
    return "Probable cause: padding that is not masked, or position ids that do not start at 0."
