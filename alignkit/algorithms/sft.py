"""Supervised fine-tuning: the token mean of −log π(completion | prompt) over the whole optimizer batch.

Deviations: none to speak of; every trained token of the batch has the same weight, whatever row or rank it lies in.
Any data will do: of a preference pair or a ranked list it learns the best completion; rows labelled false it leaves.
"""

from __future__ import annotations

from alignkit.core import Algorithm, AlgorithmConfig, Batch, Forward, Group, Metric, Metrics, Terms, Unit, register
from alignkit.core.pairs import best_worst
from alignkit.core.types import Term


class SFTConfig(AlgorithmConfig):
    """SFT has no keys of its own."""


@register.algorithm("sft")
class SFT(Algorithm[SFTConfig]):
    """Maximum likelihood on one completion a prompt."""

    def build(self, groups: list[Group]) -> list[Unit]:
        return [best_worst(group)[:1] for group in groups if group.fields.get("label", True)]

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        lengths = batch["mask"].sum(-1).to(out.logps.dtype)
        metrics = {"completions/mean_length": Metric.mean(lengths, batch["row"])}
        return {"nll": Term(-out.logps, over="mask")}, metrics
