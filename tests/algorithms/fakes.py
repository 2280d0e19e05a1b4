"""Batches and forwards made of given log-probabilities, and the division the trainer does."""

import torch
from torch import Tensor

from alignkit.core import Batch, Forward, Terms


def pair_batch(policy: Tensor, reference: Tensor, mask: Tensor) -> tuple[Forward, Batch]:
    """From [2U, T] token log-probabilities, rows chosen, rejected, chosen, …; a prompt token is put before each row."""

    def with_prompt(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)

    rows = mask.shape[0]
    columns = {
        "mask": with_prompt(mask.bool()),
        "row": torch.ones(rows, dtype=torch.bool),
        "unit": torch.ones(rows // 2, dtype=torch.bool),
        "reference.logps": with_prompt(reference),
    }
    tokens = torch.zeros(columns["mask"].shape, dtype=torch.long)
    inputs = {"tokens": tokens, "attention": torch.ones_like(tokens)}
    return Forward(logps=with_prompt(policy)), Batch(inputs=inputs, columns=columns, k=2)


def sums_batch(chosen: list[float], rejected: list[float], ref_chosen: list[float], ref_rejected: list[float]):
    """Pairs of completions one token long, so that its log-probability is the sum; the policy leaf comes first."""
    policy = torch.tensor([chosen, rejected], dtype=torch.float64).T.reshape(-1, 1).clone().requires_grad_()
    reference = torch.tensor([ref_chosen, ref_rejected], dtype=torch.float64).T.reshape(-1, 1)
    return policy, *pair_batch(policy, reference, torch.ones_like(reference))


def reduce_terms(terms: Terms, batch: Batch) -> Tensor:
    """The loss as the trainer forms it on one process and one micro-batch."""
    parts = [
        term.weight * term.value.where(batch[term.over], 0.0).sum() / batch[term.over].sum() for term in terms.values()
    ]
    return torch.stack(parts).sum()


def averages(metrics) -> dict[str, float]:
    """Metrics as logged."""
    return {name: float(metric.sum) / float(metric.count) for name, metric in metrics.items()}
