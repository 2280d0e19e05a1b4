"""Algorithms that break the contract, one clause each. The conformance suite must catch every one of them."""

import random
from typing import ClassVar

import torch
from pydantic import field_validator

from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.algorithms.sft import SFT
from alignkit.core import Metric
from alignkit.core.types import Term


def reweighted(result, factor):
    """The same terms, each value times `factor`."""
    terms, metrics = result
    return {n: Term(t.value * factor, t.over, t.weight) for n, t in terms.items()}, metrics


class AveragesItsLoss(SFT):
    """Divides by the units it was handed; with several micro-batches that is not the optimizer batch."""

    def loss(self, out, batch):
        return reweighted(super().loss(out, batch), 1 / batch["unit"].sum())


class BatchStatisticInLoss(SFT):
    """Normalises by a mean over the micro-batch, which belongs into `annotate`."""

    def loss(self, out, batch):
        lengths = batch["mask"].sum(-1, keepdim=True).float()
        return reweighted(super().loss(out, batch), lengths / lengths.mean())


class IgnoresTheMask(SFT):
    """Takes padding into the length of a row."""

    def loss(self, out, batch):
        return reweighted(super().loss(out, batch), 10 / out.logps.shape[1])


class CountsByPosition(SFT):
    """Weighs rows by where they stand in the batch."""

    def loss(self, out, batch):
        place = torch.arange(batch.num_rows)[:, None] / batch.num_rows
        return reweighted(super().loss(out, batch), 1 + place)


class AveragesItsMetric(SFT):
    """Logs a mean without saying over how many, so that means of micro-batches are averaged."""

    def loss(self, out, batch):
        terms, metrics = super().loss(out, batch)
        return terms, {**metrics, "longest": Metric(batch["mask"].sum(-1).double().mean())}


class MetricOfTheSplit(SFT):
    """Logs how many micro-batches there were."""

    def loss(self, out, batch):
        terms, metrics = super().loss(out, batch)
        return terms, {**metrics, "micro_batches": Metric(1.0, 1.0, "sum")}


class DecaysTheWeights(SFT):
    """Penalises the weights it finds behind its outputs, which are there only where all logits are kept.

    Micro-batches cannot show it: whether the weights are within reach, and how large they are, is the same for each.
    """

    def loss(self, out, batch):
        (terms, metrics), penalty = super().loss(out, batch), 0.0
        seen, todo = set(), [out.logps.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            todo += [inner for inner, _ in node.next_functions]
            weight = getattr(node, "variable", None)
            if isinstance(weight, torch.nn.Parameter):
                penalty = penalty + weight.square().sum()
        return {n: Term(t.value + 0.01 * penalty, t.over, t.weight) for n, t in terms.items()}, metrics


class ForgetsItsState(SFT):
    """Moves a coefficient after each step and does not save it."""

    def __init__(self, config):
        super().__init__(config)
        self.strength = 1.0

    def observe(self, metrics):
        self.strength *= 0.7

    def loss(self, out, batch):
        return reweighted(super().loss(out, batch), self.strength)


class DrawsAtRandom(DPO):
    """Turns pairs round by a generator that nobody seeded."""

    def build(self, groups):
        return [unit if random.random() < 0.5 else unit[::-1] for unit in super().build(groups)]


class LearnsNothing(SFT):
    """A loss that does not depend on the weights."""

    def loss(self, out, batch):
        terms, metrics = super().loss(out, batch)
        return {n: Term(t.value * 0 + 1.0, t.over) for n, t in terms.items()}, metrics


class ShrinkingConfig(DPOConfig):
    """Halves its number each time it is read."""

    strength: float = 1.0

    @field_validator("strength")
    @classmethod
    def halve(cls, value):
        return value / 2


class ConfigMoves(DPO):
    """Its recipe is another one once it has been written and read."""

    config_type: ClassVar = ShrinkingConfig


class StatisticOfOneRank(SFT):
    """Normalises by a mean over its own rank's rows instead of asking the world."""

    def annotate(self, batch, world):
        lengths = batch["mask"].sum(-1).float()
        return batch.with_columns({"share": lengths / lengths[batch["row"]].sum().clamp(min=1)})

    def loss(self, out, batch):
        return reweighted(super().loss(out, batch), 5 * batch["share"][:, None])


class RowFacts(SFT):
    """Well-behaved: carries a fact in each row, which a rank without rows must know too."""

    def build(self, groups):
        units = super().build(groups)
        for (row,) in units:
            row.scalar["weight"] = 1 + len(row.tokens) % 3
            row.token["place"] = [float(t) for t in range(len(row.tokens))]
        return units

    def loss(self, out, batch):
        factor = batch["weight"][:, None] / (1 + batch["place"])
        return reweighted(super().loss(out, batch), factor)
