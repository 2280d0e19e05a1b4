"""Step-0 truths: what must hold on the first batch of every run, or the run is not what its recipe says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignkit.core.errors import RunFailed
from alignkit.core.types import Batch, Row, Unit
from alignkit.data.collate import collate
from alignkit.loop.reduction import DIFFERENCE
from alignkit.models.plain import PlainLogps
from alignkit.models.policy import CausalPolicy

MEAN = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Allowed difference in nats, on average over the tokens of a row; of a metric from its closed form likewise."""
WORST = {torch.float32: 1e-3, torch.bfloat16: 2.0}
"""Allowed at any one token: at a logit of 30 one step of bfloat16 is an eighth, and a token may see several."""
SHARING_ROWS = 3
"""Rows of one prompt that are rescored."""


def check_rows(policy: CausalPolicy, units: Sequence[Unit], dtype: torch.dtype) -> None:
    """A few rows alone, unpadded, through plain transformers give the log-probabilities of the training path.

    Catches what losses cannot show: padding that counts, labels shifted by one, leaks between rows of a stream, prompts
    shared wrongly, wrong position ids, dropout left on (but for adapter dropout, which was asked for).

    Raises:
        RunFailed: naming the row, the difference and the probable cause.
    """
    rows = _telling([row for unit in units for row in unit if any(row.trained)])
    if not rows:
        return
    batch = collate([(row,) for row in rows])
    with policy.evaluating() if policy.is_noisy else torch.no_grad():
        ours = policy.told(batch).cpu()
    for i, row in enumerate(rows):
        plain = policy.plain_logps(row)
        if found := _difference(ours[i, : len(row.tokens)] - plain.logps, plain.known, dtype):
            raise RunFailed(
                f"step-0 truth: the training path gives other log-probabilities than plain transformers for a row of "
                f"group {row.group!r}: they differ by {found}. "
                f"{_cause(policy, batch, i, ours[i, : len(row.tokens)], plain, dtype)} Nothing was trained. "
                "`train.step0_checks: false` skips this check."
            )


def check_closed_form(expected: Mapping[str, float], found: Mapping[str, float], dtype: torch.dtype) -> None:
    """While policy = reference the loss has a closed form (DPO: log 2, margins 0).

    Raises:
        RunFailed: naming the metric, both values and the probable cause.
    """
    for name, value in expected.items():
        if name in found and not abs(found[name] - value) <= MEAN[dtype] * max(1.0, abs(value)):
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
    if found := _difference(out_logps.detach() - batch["reference.logps"], batch["mask"], dtype):
        raise RunFailed(
            "step-0 truth: before the first step the policy's log-probabilities differ from the reference's by "
            f"{found}. A wrong adapter or models.reference, a stale cache of its log-probabilities, or dropout. "
            "Nothing was trained. `train.step0_checks: false` skips this check."
        )


def check_sampling(found: Mapping[str, float], allowed: float | None) -> None:
    """The completions are the policy's own, token by token. `allowed` in nats a token on average; None = not checked.

    Raises:
        RunFailed: whoever wrote them is too far from the policy.
    """
    apart = found.get(DIFFERENCE)
    if apart is not None and allowed is not None and apart > allowed:
        raise RunFailed(
            f"the log-probabilities that came with the completions differ from the policy's by {apart:.3g} nats a "
            f"token on average (rollout.max_logp_difference allows {allowed:g}): what wrote them does not hold these "
            "weights, or computes them otherwise. The step was not taken. Look at a stale vLLM server, its dtype and "
            "its --logprobs-mode, or raise the limit if the difference is meant."
        )


def _difference(difference: Tensor, trained: Tensor, dtype: torch.dtype) -> str:
    """How far two log-probabilities of the trained tokens are apart, in words; empty when that is rounding."""
    size = difference[trained].abs()
    if not size.numel() or (float(size.mean()) <= MEAN[dtype] and float(size.max()) <= WORST[dtype]):
        return ""  # nan is never within
    return (
        f"{float(size.mean()):.3g} nats a token on average (allowed {MEAN[dtype]:g}), {float(size.max()):.3g} at most "
        f"(allowed {WORST[dtype]:g})"
    )


def _telling(rows: list[Row]) -> list[Row]:
    """Shortest, middle and longest, and the longest rows that share a prompt.

    Padding shows in the short one, position ids in the long one, and a prompt shared wrongly in its rows alone.
    """
    if not rows:
        return []
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    by_prompt: dict[tuple[int, ...], list[Row]] = {}
    for row in reversed(by_length):
        by_prompt.setdefault(tuple(row.tokens[: row.trained.index(True)]), []).append(row)
    sharing = next((family for family in by_prompt.values() if len(family) > 1), [])
    chosen = [by_length[0], by_length[len(by_length) // 2], by_length[-1], *sharing[:SHARING_ROWS]]
    return list({id(row): row for row in chosen}.values())


def _cause(policy: CausalPolicy, batch: Batch, i: int, ours: Tensor, plain: PlainLogps, dtype: torch.dtype) -> str:
    broken = policy.broken_weights()
    if broken:
        return f"Probable cause: nan or infinity in the weights ({', '.join(broken[:3])})."
    trained, way = plain.known, policy.path
    early, right, late = plain.by_shift

    def is_right_now() -> bool:
        told = policy.told(batch)[i, : len(right)].cpu()
        return not _difference(told - right, trained, dtype)

    with policy.evaluating():
        if is_right_now():
            return "Probable cause: dropout is on (the difference is gone in eval mode)."
        with policy.on_padded_rows():
            if is_right_now():
                return (
                    f"Probable cause: the way rows are laid out and scored ({way}); `model.layout: padded` "
                    "goes around it."
                )
    inside = trained[1:] & trained[:-1]
    shifted = [
        _alike(ours, early, trained),
        _alike(ours[2:], late[2:], trained[2:]),
        _alike(ours[1:], right[:-1], inside),
        _alike(ours[:-1], right[1:], inside),
    ]
    if any(shifted):
        return "Probable cause: labels are shifted by one token."
    return "Probable cause: padding that is not masked, or position ids that do not start at 0."


def _alike(a: Tensor, b: Tensor, where: Tensor) -> bool:
    return bool(where.any()) and float((a - b).abs().where(where, 0.0).max()) < 1e-3
