"""AlignDistil: preferences as distillation of every token. Zhang et al. 2025, arXiv 2503.02832, as the authors' code
has it.

Two models have learned the same pairs before, the teacher by DPO and the contrast by DPO with chosen and rejected
exchanged. Their logits z_d and z_r make a synthetic teacher for each token, further from the contrast than either:

    D    = Σ_v |p_d(v) − p_r(v)|
    w    = adapt_gain·D + 0.001, or a fixed number
    z*   = z_d + w·(z_d − z_r)                       anchor: ref has z_ref + w·(z_d − z_r)
    loss = mean over answers of the mean over tokens of  (β/w)·KL(π ‖ softmax(z*/τ))

Under the anchor `ref`, with the reference as contrast and w fixed, this is RLHF on the reward β·log(p_d/p_ref) with KL
coefficient β/w, token by token (the paper's theorem). Answers are the policy's own (`on_policy`, held fixed: no score
function) or the chosen ones of the data (`off_policy`).

Deviations: the authors' code leaves out the first token of an answer, takes one after the last where answers are the
data's, and cuts two of the three vocabularies to their common size; here all tokens of an answer count and all
vocabularies are cut. Its `beta2` is `adapt_gain` here, `fixed_weight` where w is fixed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import Algorithm, Batch, Forward, Group, Metric, Metrics, Needs, Terms, Unit, register
from alignkit.core.config import OnlineConfig
from alignkit.core.lazy import torch
from alignkit.core.pairs import best_worst
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor

TEACHER, CONTRAST, REFERENCE = "teacher.logits", "contrast.logits", "reference.logits"
LEAST_WEIGHT = 1e-3
"""Of the adaptive weight, where both models say the same."""


class AlignDistilConfig(OnlineConfig):
    """AlignDistil's own keys."""

    mode: Literal["on_policy", "off_policy"] = Field(
        "on_policy", description="distil on answers of the policy's own, or on the chosen ones of the data"
    )
    beta: float = Field(0.1, gt=0, description="scale of the reward β·log(p_teacher/p_contrast); dimensionless")
    weight: Literal["adaptive", "fixed"] = Field(
        "adaptive", description="how far beyond the teacher: by what both models say of the token, or the same for all"
    )
    adapt_gain: float = Field(15.0, ge=0, description="adaptive: weight per disagreement; 10 for off_policy")
    fixed_weight: float = Field(1.0, ge=0, description="fixed: the weight; 0 = distil the anchor itself")
    loss_reweight: Literal["code", "none"] = Field(
        "code", description="code: a token's loss is multiplied by beta/weight; none: by 1"
    )
    anchor: Literal["dpo", "ref"] = Field("dpo", description="where extrapolation begins: teacher or reference")
    tau: float = Field(1.0, gt=0, description="temperature of the synthetic teacher")
    reward_len_norm: bool = Field(True, description="divide the loss of an answer by its tokens")

    @model_validator(mode="after")
    def _fits_together(self) -> AlignDistilConfig:
        if self.weight == "fixed" and not self.fixed_weight and self.loss_reweight == "code":
            raise ValueError(
                "`loss_reweight: code` divides by the weight, and `fixed_weight` is 0; set loss_reweight: none"
            )
        if self.mode == "off_policy" and (self.rounds is not None or self.prompts_per_round is not None):
            raise ValueError(
                "`rounds` and `prompts_per_round` are of mode: on_policy; off_policy goes by train.num_epochs"
            )
        return self


@register.algorithm("align_distil")
class AlignDistil(Algorithm[AlignDistilConfig]):
    """Every token's distribution drawn to one that two preference models extrapolate."""

    needs = Needs(
        outputs=frozenset({"logps", "logits"}),
        rewards=True,
        scored=False,
        late=frozenset({TEACHER, CONTRAST, REFERENCE}),
        others=frozenset({"teacher", "contrast"}),
    )

    def __init__(self, config: AlignDistilConfig) -> None:
        super().__init__(config)
        late, others = self.needs.late - {REFERENCE}, self.needs.others
        if config.anchor == "ref":  # where the reference as contrast makes plain RLHF of it
            late, others = self.needs.late, others - {"contrast"}
        self.needs = replace(self.needs, rewards=self._writes, late=late, others=others)

    @property
    def _writes(self) -> bool:
        return self.config.mode == "on_policy"

    def count_units(self, group: Group) -> int:
        """A unit is one completion."""
        return len(group.completions) if self._writes else 1

    def build(self, groups: list[Group]) -> list[Unit]:
        """Every answer the policy wrote; of those of the data the best, where it is not labelled false."""
        if self._writes:
            return [(group.row(completion),) for group in groups for completion in group.completions]
        return [best_worst(group)[:1] for group in groups if group.fields.get("label", True)]

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config, mask = self.config, batch["mask"]
        assert out.logits is not None, "needs.outputs asks for them"
        told = (TEACHER, CONTRAST, REFERENCE) if config.anchor == "ref" else (TEACHER, CONTRAST)
        others = (batch[name][mask].detach() for name in told)
        student, toward, away, *rest = ops.same_vocabulary(out.logits[mask], *others)
        (anchor,) = rest or (toward,)
        disagreement = ops.disagreement(toward, away)
        weight = torch.full_like(disagreement, config.fixed_weight)
        if config.weight == "adaptive":
            weight = config.adapt_gain * disagreement + LEAST_WEIGHT
        coefficient = config.beta / weight if config.loss_reweight == "code" else torch.ones_like(weight)
        distance = ops.kl_divergence(student, ops.extrapolated(anchor, toward, away, weight) / config.tau)
        reduce = ops.sequence_mean if config.reward_len_norm else ops.sequence_sum
        terms = {"distillation": Term(reduce(_by_row(coefficient * distance, mask), mask), over="row")}

        still = student.detach()
        said = {
            "reward": config.beta * ops.expected_log_ratio(still, toward, away),
            "teacher_reward": config.beta * ops.expected_log_ratio(toward, toward, away),
            "kl_teacher": distance.detach(),
            "kl_contrast": ops.kl_divergence(still, away),
            "weight": weight,
            "disagreement": disagreement,
        }
        metrics = {f"align_distil/{name}": Metric.mean(_by_row(value, mask), mask) for name, value in said.items()}
        metrics["align_distil/coefficient_max"] = Metric.extreme(_by_row(coefficient, mask), mask, "max")
        if not self._writes:  # a round says it of what was written
            metrics["completions/mean_length"] = Metric.mean(mask.sum(-1).to(distance.dtype), batch["row"])
        return terms, metrics


def _by_row(values: Tensor, mask: Tensor) -> Tensor:
    """[S] of the masked tokens → [N, L], 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
