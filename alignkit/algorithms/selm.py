"""Self-Exploring Language Models. Zhang et al. 2024, arXiv 2405.19332, in the batch form of the authors' code.

Every round the policy π_t answers prompts; of its answers and the data's own pair the best and the worst are compared,
with π_t as reference, and the answer y_s that the policy wrote first is made less likely:

    loss = mean over prompts of  −log σ(βh) + α·β·Δ(y_s)        Δ(y) = log π(y) − log π_t(y), h = Δ(w) − Δ(l)

The second term is the optimism of the paper's bilevel objective: what is left of a reward that is raised where π_t does
not go already. It is added where y_s is one of the pair too.

Deviations: the paper's term has log π(y_s) alone, whose gradient is the same. The authors' code draws y_s greedily,
knows the logistic loss alone, and begins one of its two series with a round of plain DPO; here `rollout` says how y_s
is drawn, every loss of a pair in `dpo` will do, and such a round is a run of `dpo` before this one. A prompt whose
answers all have one reward has no pair and is left out. `optimism_clip` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isnan

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.core import Batch, DataError, Forward, Group, Metric, Metrics, Terms, Unit, register
from alignkit.core.config import IterativeConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.lazy import torch
from alignkit.core.types import Term


class SELMConfig(IterativeConfig, DPOConfig):
    """Keys of DPO and of rounds, and SELM's own."""

    beta: float = Field(0.01, gt=0, description="tether to the policy of the round's start; dimensionless")
    alpha: float = Field(
        0.001, ge=0, description="weight, times beta, of the log-probability of what the policy wrote; 0 = dpo"
    )
    optimism_clip: float | None = Field(
        None, gt=0, description="nats by which an answer that is so much less likely is lowered no more; null = no end"
    )

    @model_validator(mode="after")
    def _compares(self) -> SELMConfig:
        if any(name == "sft" for name, _ in self.mixture):
            raise ValueError("`loss_type` of selm is of losses that compare a pair; leave `sft` out")
        return self


@register.algorithm("selm")
class SELM(DPO):
    """The best and worst of the policy's and the data's answers as a pair, and the policy's own made less likely."""

    needs = replace(
        DPO.needs, completions=1, preferences=False, rewards=True, given=True, models={"reference": "round"}
    )
    config_type = SELMConfig
    config: SELMConfig

    @classmethod
    def rows_per_unit(cls, config: DPOConfig) -> int:
        """The pair and the sample."""
        del config
        return 3

    def take_facts(self, facts: RolloutFacts) -> None:
        self._num_generations = facts.num_generations

    def prepare(self, groups: Sequence[Group]) -> None:
        """Refuse prompts that never have two answers to compare."""
        super().prepare(groups)
        for group in groups:
            if self._num_generations + len(group.completions) < 2:
                raise DataError(
                    f"row {group.id!r} has no answers of its own, so selm has nothing to compare the policy's with: "
                    "expected columns such as chosen and rejected, or rollout.num_generations of 2 and more"
                )

    def build(self, groups: list[Group]) -> list[Unit]:
        """(best, worst, the policy's first answer) of every group whose scored answers are not all equally good."""
        units: list[Unit] = []
        for group in groups:
            # what its writer said of an answer's tokens is not known of the data's, and not asked of any
            answers = [replace(completion, logps=None) for completion in group.completions]
            scored = [answer for answer in answers if not isnan(answer.reward)]
            if len({answer.reward for answer in scored}) < 2:
                continue
            (pair,) = super().build([replace(group, completions=scored)])
            sample = group.row(answers[0])
            sample.scalar = {
                "is_chosen": float(sample.tokens == pair[0].tokens),
                "is_rejected": float(sample.tokens == pair[1].tokens),
                "distinct": float(len({tuple(answer.tokens) for answer in answers})),
            }
            units.append((*pair, sample))
        return units

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config, unit = self.config, batch["unit"]
        logps = batch.by_unit(out.logps)
        terms, metrics = super().loss(Forward(logps[:, :2].flatten(0, 1)), batch.keep_rows(0, 1))
        del metrics["completions/mean_length"]  # the round says it of all that was written

        sample = batch.keep_rows(2)
        optimism = ops.sequence_sum(logps[:, 2] - sample["reference.logps"], sample["mask"])
        weight = config.alpha * config.beta
        pairs = torch.stack([term.weight * term.value.detach() for term in terms.values()]).sum(0)
        outweighs = weight * optimism.detach().abs() > pairs.abs()
        metrics |= {
            "selm/optimism": Metric.mean(optimism, unit),
            "selm/optimism_outweighs": Metric.mean(outweighs.to(optimism.dtype), unit),
            "selm/frac_sample_chosen": Metric.mean(sample["is_chosen"], unit),
            "selm/frac_sample_rejected": Metric.mean(sample["is_rejected"], unit),
            "selm/distinct_responses": Metric.mean(sample["distinct"], unit),
            "kl": Metric.mean(ops.kl_estimate(sample["reference.logps"], logps[:, 2], "k3"), sample["mask"]),
        }
        if weight > 0:  # not 0 · term: at α = 0 loss and gradient are DPO's to the last bit
            bound = None if config.optimism_clip is None else -config.optimism_clip
            terms["optimism"] = Term(optimism if bound is None else optimism.clamp(min=bound), "unit", weight)
        return terms, metrics
