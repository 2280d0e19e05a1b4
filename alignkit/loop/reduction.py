"""Unreduced terms → one scalar, with global denominators. The only place where a loss is divided."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from alignkit.core.contracts import Terms, World
from alignkit.core.types import BEHAVIOUR, Batch, Forward, Metric
from alignkit.data.collate import select_units

Counts = Mapping[str, float]
DIFFERENCE = "sampling/sampling_logp_difference/mean"
"""The metric that says how far whoever wrote the completions is from the policy, in nats a token."""


def global_counts(batch: Batch, index: list[int], world: World) -> Counts:
    """How often each boolean column is True in the optimizer batch, over all micro-batches and ranks."""
    part = select_units(batch, index) if index else None
    names = sorted(name for name, x in batch.columns.items() if x.dtype == torch.bool)
    local = [float(part[name].sum()) if part is not None else 0.0 for name in names]
    return dict(zip(names, world.sum(torch.tensor(local, dtype=torch.float64)).tolist(), strict=True))


def emptied(batch: Batch) -> Batch:
    """One unit that nothing counts, for a rank that has fewer micro-batches than another."""
    unit = select_units(batch, [0])
    return unit.with_columns({n: torch.zeros_like(x) for n, x in unit.columns.items() if x.dtype == torch.bool})


def combine(terms: Terms, batch: Batch, counts: Counts) -> tuple[Tensor, dict[str, Metric]]:
    """Σ weight · Σ value / global count: this micro-batch's share of the loss, and what is logged of it.

    Raises:
        ValueError: a term whose value has not the shape of its column, or whose column is unknown.
    """
    total: Tensor | None = None
    logged: dict[str, Metric] = {}
    for name, term in terms.items():
        if term.over not in counts:
            raise ValueError(
                f"term {name!r} is over the column {term.over!r}, which the batch does not have as a boolean; it has "
                f"{', '.join(counts)}"
            )
        over = batch[term.over]
        if term.value.shape != over.shape:
            raise ValueError(
                f"term {name!r} has shape {tuple(term.value.shape)}, its column {term.over!r} {tuple(over.shape)}: "
                "a loss returns unreduced values"
            )
        # `where`, not a product: outside the column a value may be infinite, and 0 · inf is nan
        share = term.value.where(over, 0.0).sum() / max(counts[term.over], 1.0)
        logged[f"loss/{name}"] = Metric(share.detach(), 1.0, "sum")
        total = term.weight * share if total is None else total + term.weight * share
    if total is None:
        raise ValueError("the loss returned no term")
    logged["loss"] = Metric(total.detach(), 1.0, "sum")
    return total, logged


def drop_single_term(totals: MutableMapping[str, Metric]) -> None:
    """Do not log a method's only term beside the loss, which it is."""
    terms = [name for name in totals if name.startswith("loss/")]
    if len(terms) == 1:
        del totals[terms[0]]


def common_metrics(out: Forward, batch: Batch, *, fresh: bool = False) -> dict[str, Metric]:
    """What every method logs; on a `fresh` round also how far the writer's log-probabilities are from the policy's."""
    metrics = {"num_input_tokens": Metric((batch.inputs["attention"] & batch["row"][:, None]).sum(), 1.0, "sum")}
    if out.entropy is not None:
        metrics["entropy"] = Metric.mean(out.entropy, batch["mask"])
    if out.correct is not None:
        metrics["mean_token_accuracy"] = Metric.mean(out.correct, batch["mask"])
    if fresh and BEHAVIOUR in batch:
        mask = batch["mask"]
        apart = (out.logps.detach() - batch[BEHAVIOUR]).where(mask, 0.0)
        ratio = apart.clamp(-20.0, 20.0).exp()
        metrics |= {
            DIFFERENCE: Metric.mean(apart.abs(), mask),
            "sampling/sampling_logp_difference/max": Metric.extreme(apart.abs(), mask, "max"),
            "sampling/importance_sampling_ratio/mean": Metric.mean(ratio, mask),
            "sampling/importance_sampling_ratio/min": Metric.extreme(ratio, mask, "min"),
            "sampling/importance_sampling_ratio/max": Metric.extreme(ratio, mask, "max"),
        }
    return metrics
