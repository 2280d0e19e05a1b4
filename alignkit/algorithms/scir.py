"""SCIR: self-consistent internal rewards. Zhou et al. 2025, arXiv 2502.08922, reconstructed.

A policy finds in several ways which of its answers a and b to a prompt is better. It is trained to find the same in
all of them, and to prefer that answer where it does, at every step anew:

    implicit reward    z_0 = β·(Δ(a) − Δ(b)),  Δ(y) = log π(y) − log π_base(y)
    judge m            z_m = ½·[(u_1 − u_2) of J_m(a, b) − (u_1 − u_2) of J_m(b, a)],  u_v = log π(verdict v | J_m)
    inconsistency      P   = mean over pairs of models of ½·[KL(p_m‖p_n) + KL(p_n‖p_m)] + λ·mean_m H(p_m),  p = σ(z)
    consensus          ŷ   = sign of mean_m z_m;  c = 1 where all signs are equal, none is 0 and min_m |2p_m − 1| ≥ κ
    loss               Σ c·(−log σ(ŷ·z_0)) / max(1, Σ c) + w·mean P + w_a·mean over labelled pairs of A

ŷ and c are of the policy before the step, without gradient. A is the error of judges on a pair that the data has: the
mean of −log σ(±(u_1 − u_2)) over judges and orders, + where the better answer stands first. Such pairs count in P too,
never in the first term.

Deviations: none can be told. The paper's equations were not at hand, and there is no code: everything but the two kinds
of reward model, a penalty on their disagreement and doubt at every step, and learning from pairs on which they agree is
a reconstruction, as are all defaults. π_base stays what it is through all rounds: with the policy of the round's start
in its place z_0 would be 0, without a sign, when a round begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import (
    Algorithm,
    Batch,
    Completion,
    Forward,
    Group,
    Metric,
    Metrics,
    Needs,
    RecipeError,
    Row,
    Terms,
    Unit,
    World,
    register,
)
from alignkit.core.config import IterativeConfig
from alignkit.core.contracts import RolloutFacts
from alignkit.core.lazy import torch
from alignkit.core.pairs import answer_row, in_order
from alignkit.core.templates import conversation, quotable, read_template, strip_thinking
from alignkit.core.types import Term

if TYPE_CHECKING:
    from torch import Tensor

ROWS_OF_A_JUDGE = 4
"""Two orders of the answers, each with either verdict."""


class SCIRConfig(IterativeConfig):
    """The keys of scir. All defaults are reconstructed."""

    beta: float = Field(0.1, gt=0, description="scale of the implicit reward, and tether to `base`; dimensionless")
    consistency_weight: float = Field(1.0, ge=0, description="w, weight of the inconsistency of all pairs")
    entropy_weight: float = Field(
        0.1, ge=0, description="λ, weight of doubt within the inconsistency; large ones make sure and wrong"
    )
    penalty_trains: Literal["both", "judge", "implicit"] = Field(
        "both", description="what the inconsistency moves; the other stays as it is"
    )
    orders: Literal["averaged", "apart"] = Field(
        "averaged", description="apart: in the inconsistency each order of a judge's answers is a model of its own"
    )
    confidence: float = Field(0.0, ge=0, le=1, description="κ, least |2p − 1| of every model on a pair to learn from")
    warmup_steps: int = Field(50, ge=0, description="first steps of the run, in which no pair is preferred")
    anchor_weight: float = Field(
        0.1,
        ge=0,
        description="weight of the judges' error on the data's own pairs; 0 = the data's answers are left out",
    )
    template: str | list[str] = Field(
        "pairwise_v1", description="what judges are asked: a shipped template or the path of a .txt file, or several"
    )
    answers: list[str] = Field(
        ["1", "2"], min_length=2, max_length=2, description='verdicts that say "the first" and "the second"'
    )
    pairing: Literal["best_worst", "first", "all"] = Field(
        "best_worst", description="pairs of a prompt's answers: by their reward, the first two, or all"
    )
    max_pairs: int = Field(4, ge=1, description="pairs of a prompt with pairing: all, at most")

    @property
    def templates(self) -> list[str]:
        """One name or path a judge."""
        return [self.template] if isinstance(self.template, str) else self.template

    @model_validator(mode="after")
    def _can_tell(self) -> SCIRConfig:
        names = _names(self.templates)
        if not names or len(set(names)) < len(names):
            raise ValueError("`template` names one judge at least, and each by another name: metrics are kept by it")
        if not all(map(str.strip, self.answers)) or self.answers[0] == self.answers[1]:
            raise ValueError("answers: expected two texts that differ")
        return self


@register.algorithm("scir")
class SCIR(Algorithm[SCIRConfig]):
    """Pairs of a policy's own answers, preferred as all its ways to judge agree → consistency penalty and DPO.

    A unit is a, b, and for each judge the pair in either order with either verdict.
    """

    needs = Needs(
        completions=2,
        columns=frozenset({"base.logps"}),
        slots={"base.logps": (0, 1)},
        rewards=True,
        sources=("implicit",),
        given=True,
        models={"base": "never"},
        fresh=frozenset({"policy.logps"}),
        others=frozenset({"base"}),
    )

    def __init__(self, config: SCIRConfig) -> None:
        super().__init__(config)
        required, optional = ("prompt", "first", "second"), ("first_label", "second_label", "principles")
        self._templates = [read_template(name, required, optional) for name in config.templates]
        self._models = ["implicit", *_names(config.templates)]
        self._labels: dict[tuple[str, ...], list[float]] = {}
        self._steps = 0

    @classmethod
    def rows_per_unit(cls, config: SCIRConfig) -> int:
        """a, b, and four for each judge."""
        return 2 + ROWS_OF_A_JUDGE * len(config.templates)

    def count_units(self, group: Group) -> int:
        """The pairs of what is written, and the data's own."""
        labelled = [answer for answer in group.completions if not isnan(answer.reward)]
        written = len(group.completions) - len(labelled)
        own = min(self.config.max_pairs, written * (written - 1) // 2) if self.config.pairing == "all" else 1
        return own + (self._better_worse([answer.reward for answer in labelled]) is not None)

    def take_facts(self, facts: RolloutFacts) -> None:
        """How prompts are written, and the tokens of both verdicts.

        Raises:
            RecipeError: the tokenizer has none for one of them, or the same for both.
        """
        self._facts = facts
        self._verdicts = [facts.encode(answer) for answer in self.config.answers]
        if not all(self._verdicts) or self._verdicts[0] == self._verdicts[1]:
            raise RecipeError(
                f"algorithm.answers: {' and '.join(self.config.answers)} are the tokens {self._verdicts[0]} and "
                f"{self._verdicts[1]}, which tell no verdicts apart; give texts that the tokenizer writes in two ways"
            )

    def prepare(self, groups: Sequence[Group]) -> None:
        """Remember how the data grades its answers: rounds grade them anew."""
        self._labels = {
            _key(group.messages, group.completions): [answer.reward for answer in group.completions]
            for group in groups
            if group.completions
        }

    def build(self, groups: list[Group]) -> list[Unit]:
        """The pairs of every group whose judges' prompts fit into train.max_length; `too_long` counts the others."""
        units: list[Unit] = []
        too_long = 0
        for group in groups:
            written = [answer for answer in group.completions if answer.version >= 0]
            pairs = [(*pair, 0.0) for pair in self._pairs(written)]
            given = [answer for answer in group.completions if answer.version < 0]
            if (places := self._better_worse(self._labels.get(_key(group.messages, given), []))) is not None:
                pairs.append((given[places[0]], given[places[1]], 1.0))
            for a, b, labelled in pairs:
                unit = self._unit(group, a, b)
                if max(len(row.tokens) for row in unit) > self._facts.max_length:
                    too_long += 1
                    continue
                unit[0].scalar |= {"labelled": labelled, "too_long": 0.0}
                units.append(unit)
        if units:
            units[0][0].scalar["too_long"] = float(too_long)
        return units

    def _pairs(self, answers: Sequence[Completion]) -> list[tuple[Completion, Completion]]:
        """Pairs of different answers."""
        config, scored = self.config, [answer for answer in answers if not isnan(answer.reward)]
        if config.pairing == "best_worst":
            ranked = sorted(scored, key=lambda answer: answer.reward, reverse=True)
            found = [(ranked[0], ranked[-1])] if len(ranked) > 1 else []
        else:
            places = sorted(combinations(range(len(answers)), 2), key=lambda pair: pair[1] - pair[0])  # each soon
            found = [(answers[i], answers[k]) for i, k in places]
        found = [(a, b) for a, b in found if a.tokens != b.tokens]
        return found[: config.max_pairs if config.pairing == "all" else 1]

    def _better_worse(self, labels: Sequence[float]) -> tuple[int, int] | None:
        """Places of the best and the worst of the data's answers; None where they are no pair, or of no use."""
        if self.config.anchor_weight == 0 or len(set(labels)) < 2 or any(map(isnan, labels)):
            return None
        return labels.index(max(labels)), labels.index(min(labels))

    def _unit(self, group: Group, a: Completion, b: Completion) -> Unit:
        question = quotable(conversation(group.messages))
        first, second = (quotable(strip_thinking(answer.text)) for answer in (a, b))
        labels = dict(zip(("first_label", "second_label"), self.config.answers, strict=True))
        rows = [answer_row(group, a), answer_row(group, b)]
        for template, texts in product(self._templates, ((first, second), (second, first))):
            filled = {"prompt": question, "first": texts[0], "second": texts[1], "principles": "", **labels}
            prompt = self._facts.render(template.fill(filled))
            for verdict in self._verdicts:
                trained = [False] * len(prompt) + [True] * len(verdict)
                rows.append(Row([*prompt, *verdict], trained, group=group.id))
        return tuple(rows)

    def annotate(self, batch: Batch, world: World) -> Batch:
        """`labelled` [U], now a boolean, and `written` [U], the other pairs."""
        del world
        labelled = batch.by_unit(batch["labelled"])[:, 0] > 0
        return batch.with_columns({"labelled": labelled, "written": batch["unit"] & ~labelled})

    def relabel(self, batch: Batch, world: World) -> Batch:
        """What the policy now agrees on: `label` [U], ±1 or 0, and the booleans `consistent` and `selected` [U]."""
        del world
        answers, base, leaning = self._sums(batch["policy.logps"], batch)
        implicit, judges = self._logits(answers, base, leaning)
        (a, b), (base_a, base_b), beta = answers.unbind(1), base.unbind(1), self.config.beta
        # Where the policy is still the base the sign is one of rounding.
        told = in_order(a, b, base_a, base_b, beta) | in_order(b, a, base_b, base_a, beta)
        logits = torch.cat([implicit.where(told, 0.0)[None], judges])
        label, consistent, sure = ops.consensus(logits, self.config.confidence)
        warm = self._steps >= self.config.warmup_steps
        selected = sure & batch["written"] if warm else torch.zeros_like(sure)
        return batch.with_columns({"label": label, "consistent": consistent & batch["unit"], "selected": selected})

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config = self.config
        answers, base, leaning = self._sums(out.logps, batch)
        implicit, judges = self._logits(answers, base, leaning)
        ordered = torch.stack([leaning[:, 0], -leaning[:, 1]], 1).flatten(0, 1)  # that a is better, in either order
        own, asked = implicit, ordered if config.orders == "apart" else judges
        if config.penalty_trains == "judge":
            own = own.detach()
        if config.penalty_trains == "implicit":
            asked = asked.detach()
        inconsistency = ops.inconsistency(torch.cat([own[None], asked]), config.entropy_weight)
        terms = {
            "preference": Term(ops.logistic_pair(batch["label"] * implicit), "selected"),
            "inconsistency": Term(inconsistency, "unit", config.consistency_weight),
            "anchor": Term(ops.logistic_pair(ordered).mean(0), "labelled", config.anchor_weight),
        }
        logits = torch.cat([implicit[None], judges])
        return terms, self._metrics(batch, logits.detach(), answers.detach(), leaning.detach())

    def _sums(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities in nats of both answers [U, 2] by the policy and by `base`, and how much likelier "the
        first" is than "the second" to each judge in both orders, [judges, 2, U]."""
        sums = batch.by_unit(ops.sequence_sum(logps, batch["mask"]))
        base = batch.by_unit(ops.sequence_sum(batch["base.logps"], batch["mask"]))[:, :2]
        verdicts = sums[:, 2:].reshape(batch.num_units, len(self._templates), 2, 2)
        return sums[:, :2], base, (verdicts[..., 0] - verdicts[..., 1]).permute(1, 2, 0)

    def _logits(self, answers: Tensor, base: Tensor, leaning: Tensor) -> tuple[Tensor, Tensor]:
        """That a is better: of the implicit reward [U], and of each judge [judges, U]."""
        ratios = answers - base
        return self.config.beta * (ratios[:, 0] - ratios[:, 1]), (leaning[:, 0] - leaning[:, 1]) / 2

    def _metrics(self, batch: Batch, logits: Tensor, answers: Tensor, leaning: Tensor) -> Metrics:
        """What is logged, from logits [M, U] and the rest as `_sums` has it."""
        written, labelled, selected = batch["written"], batch["labelled"], batch["selected"]
        flips = ((leaning[:, 0] > 0) == (leaning[:, 1] > 0)).to(logits.dtype).mean(0)
        first = batch["label"] > 0
        metrics = {
            "scir/consistency": Metric.mean(batch["consistent"].to(logits.dtype), written),
            "scir/selected": Metric.mean(selected.to(logits.dtype), written),
            "scir/flips": Metric.mean(flips, written),
            "scir/symmetric_kl": Metric.mean(ops.inconsistency(logits, 0.0), written),
            "scir/labelled_accuracy/consensus": Metric.mean(first.to(logits.dtype), labelled),
            "scir/too_long": Metric(batch["too_long"].where(batch["row"], 0.0).sum(), how="sum"),
            "logps/chosen": Metric.mean(answers[:, 0].where(first, answers[:, 1]), selected),
            "logps/rejected": Metric.mean(answers[:, 1].where(first, answers[:, 0]), selected),
        }
        for name, logit in zip(self._models, logits, strict=True):
            metrics[f"scir/confidence/{name}"] = Metric.mean((logit.sigmoid() - 0.5).abs(), written)
            metrics[f"scir/labelled_accuracy/{name}"] = Metric.mean((logit > 0).to(logits.dtype), labelled)
        return metrics

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Count the step, for the warm-up."""
        del metrics
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._steps = state["steps"]


def _names(templates: Sequence[str]) -> list[str]:
    """What judges are called in metrics."""
    return [Path(name).stem for name in templates]


def _key(messages: Sequence[Any], answers: Sequence[Completion]) -> tuple[str, ...]:
    """Tells rows of the data apart by their texts: a round may give a row another id."""
    return (conversation(messages), *(answer.text for answer in answers))
