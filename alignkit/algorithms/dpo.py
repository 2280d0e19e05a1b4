"""Direct Preference Optimization and its family. Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

With log π(y) summed over an answer of |y| tokens, Δ(y) = log π(y) − log π_ref(y), h = Δ(w) − Δ(l), q = σ(βh):

    dpo         −log σ(βh)                                          arXiv 2305.18290, eq. 7
    cdpo        −(1−ε)·log σ(βh) − ε·log σ(−βh)                     Mitchell's note on conservative DPO, 2023
    robust_dpo  [−(1−ε)·log σ(βh) + ε·log σ(−βh)] / (1−2ε)          arXiv 2403.00409
    hinge       max(0, 1 − βh)                                      arXiv 2305.10425, as in 2309.06657
    ipo         (Δ(w)/|w| − Δ(l)/|l| − 1/(2β))²                      arXiv 2310.12036, eq. 17
    ipo_sum     (h − 1/(2β))²                                       the same, as DPO's authors read it
    exo         q·log(q/(1−ε)) + (1−q)·log((1−q)/ε)                 arXiv 2402.00856, eq. 16
    nca         −log σ(βΔ(w)) − ½·log σ(−βΔ(w)) − ½·log σ(−βΔ(l))   arXiv 2402.05369
    sppo        (Δ(w) − 1/(2β))² + (Δ(l) + 1/(2β))²                 arXiv 2405.00675, eq. 4.7
    apo_zero    1 − σ(βΔ(w)) + σ(βΔ(l))                             arXiv 2408.06266, eq. 7
    apo_down    σ(βΔ(w)) + 1 − σ(βh)                                arXiv 2408.06266, eq. 8
    discopop    (1−g)·(−log σ(βh)) + g·e^−βh, g = σ(βh/τ)           arXiv 2406.08414, eq. 5
    f_dpo       −log σ(β·(f′(e^Δ(w)) − f′(e^Δ(l))))                 arXiv 2309.16240
    dpo_norm    −log σ(β·(Δ(w)/|w| − Δ(l)/|l|))                     arXiv 2411.15124
    wpo         any of them, times how likely both answers are      arXiv 2406.11827, eq. 2

The names are defaults of `loss_type` and its companions. `loss_type` also takes `bco_pair` (arXiv 2404.04656) and, in a
mixture, `sft`; `ld_alpha` is LD-DPO's (arXiv 2409.06411).

Deviations from the papers: none of plain DPO. `ipo` divides log-ratios by the tokens of their answer, on its authors'
word; `sppo` has hard labels; `exo_pair` without smoothing takes 0.001 and says so, since its target would have no
logarithm; `wpo` weighs what is of pairs, not the `sft` term. The defaults ε = 0.1 of `cdpo` and `robust_dpo`, `js` of
`f_dpo` and β = 0.1 of `wpo` are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, log1p
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    DataError,
    Forward,
    Group,
    Metrics,
    Needs,
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.pairs import best_worst, chosen_tokens, pair_metrics
from alignkit.core.types import Metric, Term

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "ipo_sum",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
EXO_SMOOTHING = 1e-3
SMOOTHED = {"sigmoid", "robust", "exo_pair"}
"""Loss types that know of turned labels."""


class DPOConfig(AlgorithmConfig):
    """Keys of DPO and its variants."""

    beta: float = Field(0.1, gt=0, description="tether to the reference; dimensionless")
    loss_type: LossType | list[LossType] = Field("sigmoid", description="the loss of a pair, or several to be added up")
    loss_weights: list[float] | None = Field(None, description="one factor for each of several losses; null = 1 each")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels (conservative DPO)")
    f_divergence_type: Divergence = Field("reverse_kl", description="what log-ratios are measured by")
    f_alpha: float = Field(0.5, description="order of the alpha divergence")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="weight of tokens beyond the length of the shorter answer; null = 1"
    )
    discopop_tau: float = Field(0.05, gt=0, description="temperature of DiscoPOP's gate")

    @property
    def mixture(self) -> list[tuple[LossType, float]]:
        """Loss types and their factors."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        return list(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if not names or len(set(names)) < len(names) or names == ["sft"]:
            raise ValueError("`loss_type` names each loss once, and at least one that compares the answers of a pair")
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ValueError(
                f"`loss_weights` has {len(self.loss_weights)} entries, `loss_type` names {len(names)} losses"
            )
        if self.label_smoothing and not SMOOTHED & set(names):
            raise ValueError(f"`label_smoothing` does nothing to {', '.join(names)}; remove it")
        if self.label_smoothing == 0.5 and "robust" in names:
            raise ValueError("`robust` divides by 1 − 2·label_smoothing: it must be below 0.5")
        if self.f_divergence_type != "reverse_kl" and (stray := _of_answers(names)):
            raise ValueError(
                f"`f_divergence_type` changes the difference of log-ratios, which {', '.join(stray)} does not read; "
                f"it goes with {', '.join(name for name, found in LOSSES.items() if found.of_difference)}"
            )
        return self


@dataclass(frozen=True, slots=True)
class LogRatios:
    """What a loss is a function of, [U] each: log-ratios Δ of chosen and rejected in nats, and differences of f′(e^Δ),
    summed over answers (`difference`) or divided by their tokens (`mean_difference`)."""

    chosen: Tensor
    rejected: Tensor
    difference: Tensor
    mean_difference: Tensor


class PairLoss(NamedTuple):
    """The loss of a pair [U], what it is where all log-ratios are 0, and whether it reads nothing but a difference."""

    value: Callable[[LogRatios, DPOConfig], Tensor]
    at_reference: Callable[[DPOConfig], float]
    of_difference: bool = True


def _smoothing(config: DPOConfig) -> float:
    return config.label_smoothing or EXO_SMOOTHING


def _ln_2(config: DPOConfig) -> float:
    del config
    return log(2)


LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(lambda x, c: ops.logistic_pair(c.beta * x.difference, c.label_smoothing), _ln_2),
    "robust": PairLoss(lambda x, c: ops.robust_pair(c.beta * x.difference, c.label_smoothing), _ln_2),
    "hinge": PairLoss(lambda x, c: ops.hinge_pair(c.beta * x.difference), lambda _: 1.0),
    "ipo": PairLoss(lambda x, c: ops.square_pair(x.mean_difference, c.beta), lambda c: (2 * c.beta) ** -2),
    "ipo_sum": PairLoss(lambda x, c: ops.square_pair(x.difference, c.beta), lambda c: (2 * c.beta) ** -2),
    "exo_pair": PairLoss(
        lambda x, c: ops.exo_pair(c.beta * x.difference, _smoothing(c)),
        lambda c: -log(2) - (log1p(-_smoothing(c)) + log(_smoothing(c))) / 2,
    ),
    "discopop": PairLoss(
        lambda x, c: ops.discopop_pair(c.beta * x.difference, c.discopop_tau), lambda _: (log(2) + 1) / 2
    ),
    "sigmoid_norm": PairLoss(lambda x, c: ops.logistic_pair(c.beta * x.mean_difference), _ln_2),
    "nca_pair": PairLoss(
        lambda x, c: ops.nca_pair(c.beta * x.chosen, c.beta * x.rejected), lambda _: 2 * log(2), of_difference=False
    ),
    "bco_pair": PairLoss(
        lambda x, c: ops.bco_pair(c.beta * x.chosen, c.beta * x.rejected), lambda _: 2 * log(2), of_difference=False
    ),
    "sppo_hard": PairLoss(
        lambda x, c: ops.sppo_pair(x.chosen, x.rejected, c.beta), lambda c: 2 * (2 * c.beta) ** -2, of_difference=False
    ),
    "apo_zero": PairLoss(
        lambda x, c: ops.apo_zero_pair(c.beta * x.chosen, c.beta * x.rejected), lambda _: 1.0, of_difference=False
    ),
    "apo_down": PairLoss(
        lambda x, c: ops.apo_down_pair(c.beta * x.chosen, c.beta * x.rejected), lambda _: 1.0, of_difference=False
    ),
}
"""Every loss of a pair; `sft` is a loss of tokens and stands in `DPO.loss`."""


def _of_answers(names: list[LossType]) -> list[LossType]:
    return [name for name in names if name in LOSSES and not LOSSES[name].of_difference]


@register.algorithm("cdpo", label_smoothing=0.1)
@register.algorithm("robust_dpo", loss_type="robust", label_smoothing=0.1)
@register.algorithm("hinge", loss_type="hinge")
@register.algorithm("ipo", loss_type="ipo")
@register.algorithm("ipo_sum", loss_type="ipo_sum")
@register.algorithm("exo", loss_type="exo_pair", label_smoothing=1e-3)
@register.algorithm("nca", loss_type="nca_pair")
@register.algorithm("sppo", loss_type="sppo_hard", beta=1e-3)
@register.algorithm("apo_zero", loss_type="apo_zero")
@register.algorithm("apo_down", loss_type="apo_down")
@register.algorithm("discopop", loss_type="discopop", beta=0.05)
@register.algorithm("f_dpo", f_divergence_type="js")
@register.algorithm("dpo_norm", loss_type="sigmoid_norm", beta=5.0)
@register.algorithm("dpo")  # the first to run: a recipe that says `module:DPO` takes its defaults
class DPO(Algorithm[DPOConfig]):
    """Preference pairs, a frozen reference, a loss of the log-ratios of both answers."""

    needs = Needs(completions=2, columns=frozenset({"reference.logps"}), preferences=True)

    def __init__(self, config: DPOConfig) -> None:
        super().__init__(config)
        self._has_margins = False
        if any(name == "exo_pair" for name, _ in config.mixture) and not config.label_smoothing:
            warnings.warn(
                f"exo_pair has no value at label_smoothing 0; {EXO_SMOOTHING} is used. Set it to silence this.",
                stacklevel=2,
            )

    def prepare(self, groups: Sequence[Group]) -> None:
        """Whether any row asks for a margin: the loss at the reference then depends on the rows."""
        self._has_margins = any(_margin(group) for group in groups)

    def build(self, groups: list[Group]) -> list[Unit]:
        units: list[Unit] = []
        for group in groups:
            chosen, rejected = best_worst(group)
            if (margin := _margin(group)) is not None:
                if margin and (stray := _of_answers([name for name, _ in self.config.mixture])):
                    raise DataError(
                        f"row {group.id!r} has a `margin`, which {', '.join(stray)} has no place for: it is taken off "
                        "the difference of two answers. Put `fields: {margin: '=0'}` into the data block to leave it."
                    )
                chosen.scalar["margin"] = margin
            units.append((chosen, rejected))
        return units

    def annotate(self, batch: Batch, world: World) -> Batch:
        """The tokens of chosen answers, for the `sft` term to be counted over."""
        del world
        return batch.with_columns({"chosen": chosen_tokens(batch)})

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config, mask = self.config, batch["mask"]
        weights = 1.0 if config.ld_alpha is None else ops.tail_weights(mask, config.ld_alpha)
        chosen, rejected = batch.by_unit(ops.sequence_sum(out.logps * weights, mask)).unbind(1)
        ref_sums = ops.sequence_sum(batch["reference.logps"] * weights, mask)
        ref_chosen, ref_rejected = batch.by_unit(ref_sums).unbind(1)
        ratios = self._log_ratios(chosen - ref_chosen, rejected - ref_rejected, batch)
        terms: Terms = {
            name: Term(LOSSES[name].value(ratios, config), over="unit", weight=weight)
            if name in LOSSES
            else Term(-out.logps, over="chosen", weight=weight)
            for name, weight in config.mixture
        }
        metrics = pair_metrics(batch, chosen, rejected, ref_chosen, ref_rejected, config.beta)
        return terms, {**metrics, "nll_loss": Metric.mean(-out.logps, chosen_tokens(batch))}

    def _log_ratios(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> LogRatios:
        config = self.config
        scores = [ops.divergence_score(x, config.f_divergence_type, config.f_alpha) for x in (chosen, rejected)]
        lengths = batch.by_unit(batch["mask"].sum(-1).clamp(min=1)).unbind(1)
        difference, mean_difference = scores[0] - scores[1], scores[0] / lengths[0] - scores[1] / lengths[1]
        if "margin" in batch:
            asked = batch.by_unit(batch["margin"])[:, 0].to(chosen.dtype) / config.beta
            difference, mean_difference = difference - asked, mean_difference - asked
        return LogRatios(chosen, rejected, difference, mean_difference)

    def at_reference(self) -> Mapping[str, float]:
        values = {name: LOSSES[name].at_reference(self.config) for name, _ in self.config.mixture if name in LOSSES}
        if self._has_margins:
            return {"rewards/margins": 0.0}
        if len(values) < len(self.config.mixture):  # of likelihood itself nothing is known
            return {**{f"loss/{name}": value for name, value in values.items()}, "rewards/margins": 0.0}
        return {"loss": sum(weight * values[name] for name, weight in self.config.mixture), "rewards/margins": 0.0}


@register.algorithm("wpo")
class WPO(DPO):
    """DPO whose pairs count for as much as both answers look like samples of the policy."""

    needs = replace(DPO.needs, outputs=frozenset({"logps", "logits"}))

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        terms, metrics = super().loss(out, batch)
        assert out.logits is not None, "needs.outputs asks for them"
        rows = ops.wpo_weights(out.logps, ops.log_sum_squares(out.logits), batch["mask"])
        weights = batch.by_unit(rows).prod(1)
        metrics["wpo/weight"] = Metric.mean(weights, batch["unit"])
        return {
            name: replace(term, value=weights * term.value) if term.over == "unit" else term
            for name, term in terms.items()
        }, metrics

    def at_reference(self) -> Mapping[str, float]:
        return {"rewards/margins": 0.0}


def _margin(group: Group) -> float | None:
    found = group.fields.get("margin")
    if found is None:
        return None
    try:
        return float(found)
    except (TypeError, ValueError):
        raise DataError(f"row {group.id!r}: margin is {found!r}, expected a number") from None
