"""Direct Preference Optimization. Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

Deviations from the paper: none. `label_smoothing` > 0 is conservative DPO (Mitchell 2023), as in the author's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING

from pydantic import Field

from alignkit import ops
from alignkit.core import Algorithm, AlgorithmConfig, Batch, Forward, Group, Metrics, Needs, Terms, Unit, register
from alignkit.core.pairs import best_worst, pair_metrics
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor


class DPOConfig(AlgorithmConfig):
    """DPO's own keys."""

    beta: float = Field(0.1, gt=0, description="tether to the reference; dimensionless")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels (conservative DPO)")


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−log σ(β·((chosen − ref_chosen) − (rejected − ref_rejected))), unreduced.

    Args: [U] summed log-probabilities in nats each; returns [U]. Source: arXiv 2305.18290, eq. 7.
    """
    return ops.logistic_pair(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)), label_smoothing)


@register.algorithm("dpo")
class DPO(Algorithm[DPOConfig]):
    """Preference pairs, a frozen reference, a logistic loss on the difference of log-ratios."""

    needs = Needs(completions=2, columns=frozenset({"reference.logps"}), preferences=True)

    def build(self, groups: list[Group]) -> list[Unit]:
        return [best_worst(group) for group in groups]

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        mask, beta = batch["mask"], self.config.beta
        chosen, rejected = batch.by_unit(ops.sequence_sum(out.logps, mask)).unbind(1)
        ref_chosen, ref_rejected = batch.by_unit(ops.sequence_sum(batch["reference.logps"], mask)).unbind(1)
        value = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, self.config.label_smoothing)
        metrics = pair_metrics(batch, chosen, rejected, ref_chosen, ref_rejected, beta)
        return {"policy": Term(value, over="unit")}, metrics

    def at_reference(self) -> Mapping[str, float]:
        return {"loss": log(2), "rewards/margins": 0.0}
