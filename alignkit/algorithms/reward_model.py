"""Reward models: a score layer on a language model's backbone, learned from judgements. One of four kinds.

    bradley_terry         −log σ(r(w) − r(l)) of the answers of a prompt            Bradley and Terry 1952
    attribute_regression  Σ_k m_k·(r_k − a_k)² / Σ_k m_k, m_k = 1 where a_k is known   HelpSteer2, arXiv 2406.08673
    prm                   right or wrong at the end of every step, or its value     arXiv 2510.01167
    irl                   −(r(w) − r(l))/β + c·(r(w)² + r(l)²)/2, l of the policy  arXiv 2503.18991

Around Bradley–Terry: centering c·(r(w) + r(l))² (arXiv 2312.09244), ties τ·(r(w) − r(l))² (arXiv 2502.10391), ensembles
(arXiv 2310.02743), and two models that choose each other's pairs (arXiv 2505.10597).

Deviations: members of an ensemble see one batch, so what differs besides their first heads is a weight a row, drawn
once from a Poisson distribution of mean 1. Collaborative training is reconstructed in the form of co-teaching; its
schedule counts rounds, and the order of an epoch is not touched. The value of a step that no rollouts were made for,
γ^(T−t)·outcome, is a reconstruction too, and so is the square that bounds `irl`, which ends at 1 and −1 with c = 1/β.
Scores of members are averaged, and never standardised in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import exp, floor, isfinite
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    Completion,
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
from alignkit.core.config import Config
from alignkit.core.contracts import Heads
from alignkit.core.lazy import F, torch
from alignkit.core.rng import generator
from alignkit.core.types import Metric, Row, Term

if TYPE_CHECKING:
    from torch import Tensor

BINS = 10
"""Of confidence, from ½ to 1, in the calibration error."""
HELPER = "~"
"""Begins the names of metrics that others are derived from, and that are not logged."""
SCORES = frozenset({"scores"})


class CollaborativeConfig(Config):
    """Two models, each of which trains on the pairs that the other finds credible."""

    noise_rate: float = Field(0.2, ge=0, lt=1, description="believed share of turned labels; so many pairs are left")
    warmup_steps: int = Field(100, ge=0, description="rounds over which that share is reached")


class RewardModelConfig(AlgorithmConfig):
    """Keys of every kind of reward model; a kind refuses those of another."""

    kind: Literal["bradley_terry", "attribute_regression", "prm", "irl"] = "bradley_terry"
    loss_type: Literal["plain", "margin", "scaled"] = Field(
        "plain", description="what a pair's margin does: nothing, is asked for, or is the pair's weight"
    )
    center: float = Field(0.01, ge=0, description="c: pulls the sum of a pair's scores to 0; 0 = off")
    tie_weight: float = Field(1.0, ge=0, description="τ: pulls the scores of a tied pair together")
    label_smoothing: float = Field(0.0, ge=0, le=0.5, description="believed share of turned labels")
    list_length: int = Field(
        2, ge=2, description="answers of a prompt, all pairs of which count; longer lists are thinned evenly"
    )
    members: int = Field(1, ge=1, description="models of an ensemble, whole and side by side")
    bootstrap: bool = Field(True, description="give every member of an ensemble its own weights of rows")
    collaborative: CollaborativeConfig | None = Field(None, description="two models that choose each other's pairs")
    attributes: list[str] = Field([], description="what answers are graded on, one score each, in this order")
    goal: dict[str, float] = Field({}, description="attribute → weight in the logged reward; empty = the mean of all")
    form: Literal["classifier", "value"] = Field(
        "classifier", description="steps are right or wrong; or a value is read off a frozen backbone"
    )
    threshold: float | None = Field(
        None, description="labels of at least so much are right, the others wrong; null = labels are probabilities"
    )
    targets: Literal["outcome", "labels"] = Field(
        "outcome", description="the value of a step: its distance to the outcome, or its label, a success rate"
    )
    gamma: float = Field(0.9, gt=0, le=1, description="γ: what a step loses for each that comes after it")

    beta: float = Field(0.1, gt=0, description="β of the policy that irl plays against: differences count 1/β")
    regularizer: float | None = Field(None, gt=0, description="c: pulls the scores of irl to 0; null = 1/β")
    pairwise: bool = Field(False, description="irl: −log σ of the difference alone, without β and c")

    @property
    def num_members(self) -> int:
        """Models that train side by side."""
        return self.members if self.collaborative is None else 2

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key, kind in KIND_OF.items():
            if kind != self.kind and getattr(self, key) != type(self).model_fields[key].get_default():
                raise ValueError(f"`{key}` belongs to `kind: {kind}`, and this is {self.kind}; remove it")
        if self.kind == "attribute_regression":
            if not self.attributes or len(set(self.attributes)) < len(self.attributes):
                raise ValueError("`attributes` names what answers are graded on, at least one, and each once")
            if stray := sorted(set(self.goal) - set(self.attributes)):
                raise ValueError(f"`goal` weighs {stray[0]!r}, which `attributes` does not name")
        for key, form in {"threshold": "classifier", "targets": "value", "gamma": "value"}.items():
            if form != self.form and getattr(self, key) != type(self).model_fields[key].get_default():
                raise ValueError(f"`{key}` belongs to `form: {form}`; remove it")
        if self.pairwise and self.regularizer is not None:
            raise ValueError("`pairwise` has no `regularizer`: its loss is bounded; remove one of the two")
        if self.collaborative is not None and (self.members > 2 or self.list_length > 2):
            raise ValueError("`collaborative` trains two models on pairs: leave `members` and `list_length` away")
        return self


KIND_OF = {
    **dict.fromkeys(("loss_type", "center", "tie_weight", "label_smoothing", "list_length"), "bradley_terry"),
    **dict.fromkeys(("members", "bootstrap", "collaborative"), "bradley_terry"),
    **dict.fromkeys(("attributes", "goal"), "attribute_regression"),
    **dict.fromkeys(("form", "threshold", "targets", "gamma"), "prm"),
    **dict.fromkeys(("beta", "regularizer", "pairwise"), "irl"),
}
"""Key → the only kind that reads it."""


def scored_row(group: Group, completion: Completion, **scalar: float) -> Row:
    """Prompt and answer with one more token, which carries the score of all before it. Its fact `length` is the
    answer's, in tokens."""
    row = group.row(completion, length=float(len(completion.tokens)), **scalar)
    return replace(
        row,
        tokens=[*row.tokens, row.tokens[-1]],
        trained=[False] * len(row.tokens) + [True],
        inputs={"prompt": float(len(group.prompt))},
    )


def last_scores(out: Forward, batch: Batch) -> Tensor:
    """[N, H]: the scores of whole rows; 0 for a row without any."""
    assert out.scores is not None, "needs.outputs asks for them"
    return out.scores.where(batch["mask"][..., None], 0.0).sum(1)


def bag_weight(row: str, member: int) -> float:
    """How often a member of an ensemble draws a row: Poisson of mean 1, the same in every epoch."""
    draw, count, rest = generator(0, "bag", row, member).random(), 0, exp(-1.0)
    while draw > rest and count < 10:
        draw -= rest
        count += 1
        rest /= count
    return float(count)


class PairScores(Algorithm[RewardModelConfig]):
    """Kind `bradley_terry`: K rows a unit, best first; all pairs of a prompt count as one."""

    needs = Needs(completions=2, preferences=True, outputs=SCORES)

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        self._rounds = 0
        if config.collaborative is not None:
            self.needs = replace(self.needs, columns=frozenset({"policy.scores"}))

    def heads(self) -> Heads:
        return Heads("sequence", ("reward",), members=self.config.num_members)

    @classmethod
    def rows_per_unit(cls, config: RewardModelConfig) -> int:
        return config.list_length

    def build(self, groups: list[Group]) -> list[Unit]:
        return [self._ranked(group) for group in groups]

    def _ranked(self, group: Group) -> Unit:
        """The answers best first, equal ones in the order of the data, and empty rows up to `list_length`."""
        config, n = self.config, self.config.list_length
        order = sorted(range(len(group.completions)), key=lambda i: -group.completions[i].reward)
        if len(order) > n:
            order = [order[round(i * (len(order) - 1) / (n - 1))] for i in range(n)]
        answers = [group.completions[i] for i in order]
        judged = self._judged(group, answers) if config.loss_type != "plain" else [0.0] * len(answers)
        of_unit = {"weight": _number(group, "weight", 1.0), "tie": float(bool(group.fields.get("is_tie")))}
        if "is_noisy" in group.fields:
            of_unit["noisy"] = float(bool(group.fields["is_noisy"]))
        if config.members > 1 and config.bootstrap and config.collaborative is None:
            of_unit |= {f"bag_{m}": bag_weight(group.id, m) for m in range(config.members)}
        rows = [
            scored_row(group, answer, rank=answer.reward, judged=score, **of_unit)
            for answer, score in zip(answers, judged, strict=True)
        ]
        return (*rows, *(Row(tokens=[], trained=[], group=group.id) for _ in range(n - len(rows))))

    def _judged(self, group: Group, answers: Sequence[Completion]) -> list[float]:
        """Numbers whose differences are the margins of pairs: of the columns `margin` or `strength`, or scores."""
        for column in ("margin", "strength"):
            if group.fields.get(column) is not None:
                if len(answers) > 2:
                    raise DataError(f"row {group.id!r}: `{column}` is of a pair, and there are {len(answers)} answers")
                margin = _number(group, column, 0.0)
                margins = [abs(margin) if column == "strength" else margin, 0.0]
                break
        else:
            if not all("score" in answer.scores for answer in answers):
                raise DataError(
                    f"row {group.id!r}: `loss_type: {self.config.loss_type}` needs to know by how much an answer is "
                    "better. Expected a column margin or strength, score_chosen and score_rejected, or scores."
                )
            margins = [answer.scores["score"].value for answer in answers]
        if any(better < worse for better, worse in pairwise(margins)):
            raise DataError(f"row {group.id!r}: its margin is negative: the better answer is the worse one")
        return margins

    def annotate(self, batch: Batch, world: World) -> Batch:
        """Which pairs each of two collaborators trains on: those its peer finds credible, of the whole round."""
        plan = self.config.collaborative
        if plan is None:
            return batch
        ramp = min(1.0, self._rounds / plan.warmup_steps) if plan.warmup_steps else 1.0
        self._rounds += 1
        scores = batch.by_unit(batch["policy.scores"].where(batch["mask"][..., None], 0.0).sum(1))
        margins = scores[:, 0] - scores[:, -1]
        units = batch["unit"].nonzero().flatten()
        shares: list[list[list[float]]] = world.gather(margins[units].tolist())
        # as the units were dealt, so that equal margins fall out alike on any number of processes
        places = sorted((i, rank) for rank, share in enumerate(shares) for i in range(len(share)))
        everyone = torch.tensor([shares[rank][i] for i, rank in places]).reshape(-1, 2)
        keep = max(1, floor((1 - plan.noise_rate * ramp) * len(places)))
        kept = {}
        for member, peer in ((0, 1), (1, 0)):
            chosen = {places[i] for i in ops.peer_select(everyone[:, peer], keep).tolist()}
            mine = torch.zeros_like(batch["unit"])
            mine[units] = torch.tensor([(i, world.rank) in chosen for i in range(len(units))], dtype=torch.bool)
            kept[f"kept_{member}"] = mine
        return batch.with_columns(kept)

    def annotate_held_out(self, batch: Batch, world: World) -> Batch:
        """Every pair counts once for every model, and no schedule moves."""
        del world
        bags = {name: torch.ones_like(x) for name, x in batch.columns.items() if name.startswith("bag_")}
        kept = {f"kept_{m}": batch["unit"] for m in range(2)} if self.config.collaborative is not None else {}
        return batch.with_columns({**bags, **kept})

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config = self.config
        scores = batch.by_unit(last_scores(out, batch))  # [U, K, M]
        first, second = torch.triu_indices(batch.k, batch.k, offset=1, device=scores.device)
        present = batch.by_unit(batch["mask"].any(-1))
        pairs = present[:, first] & present[:, second]  # [U, P]
        better, worse = scores[:, first], scores[:, second]
        tied = self._tied(batch, first, second)
        margin = self._margins(batch, first, second).to(scores.dtype)
        asked = margin if config.loss_type == "margin" else None
        value = ops.bradley_terry(better, worse, asked, config.label_smoothing)
        if config.loss_type == "scaled":
            value = margin * value
        value = torch.where(tied[..., None], config.tie_weight * (better - worse).square(), value)
        terms = self._terms("rank", _mean_of_pairs(value, pairs), 1.0, batch)
        if config.center:
            terms |= self._terms("center", _mean_of_pairs((better + worse).square(), pairs), config.center, batch)
        return terms, self._metrics(batch, scores.detach(), pairs & ~tied, first, second)

    def _tied(self, batch: Batch, first: Tensor, second: Tensor) -> Tensor:
        ranks = batch.by_unit(batch["rank"])
        return (ranks[:, first] == ranks[:, second]) | (batch.by_unit(batch["tie"])[:, :1] > 0)

    def _margins(self, batch: Batch, first: Tensor, second: Tensor) -> Tensor:
        """[U, P, 1]: by how much the one answer of a pair was judged better than the other."""
        judged = batch.by_unit(batch["judged"])
        return (judged[:, first] - judged[:, second])[..., None]

    def _terms(self, name: str, value: Tensor, weight: float, batch: Batch) -> Terms:
        """[U, M] → the sum over members, each over the pairs it trains on, times the weights of rows."""
        value = value * batch.by_unit(batch["weight"])[:, :1].to(value.dtype)
        if self.config.collaborative is not None:
            return {f"{name}_{m}": Term(value[:, m], over=f"kept_{m}", weight=weight) for m in range(2)}
        if "bag_0" in batch:
            bags = torch.stack([batch.by_unit(batch[f"bag_{m}"])[:, 0] for m in range(value.shape[1])], -1)
            value = value * bags.to(value.dtype)
        return {name: Term(value.sum(1), over="unit", weight=weight)}

    def _metrics(self, batch: Batch, scores: Tensor, pairs: Tensor, first: Tensor, second: Tensor) -> Metrics:
        """Of the mean over members; accuracy, margin and calibration over the pairs that are not tied."""
        mean = scores.mean(-1)
        margins = mean[:, first] - mean[:, second]
        lengths = batch.by_unit(batch["length"]).to(mean.dtype)
        rows = batch.by_unit(batch["mask"].any(-1)) & batch["unit"][:, None]
        pairs = pairs & batch["unit"][:, None]
        metrics = {
            "rewards/accuracies": Metric.mean(_wins(margins), pairs),
            "rewards/margins": Metric.mean(margins, pairs),
            "rewards/chosen": Metric.mean(mean[:, first], pairs),
            "rewards/rejected": Metric.mean(mean[:, second], pairs),
            "rewards/longer_wins": Metric.mean(_wins(lengths[:, first] - lengths[:, second]), pairs),
            "completions/mean_length": Metric.mean(lengths, rows),
            **_score_metrics(mean, rows),
            **_calibration(margins.sigmoid(), torch.ones_like(margins), pairs),
        }
        if scores.shape[-1] > 1:
            each = scores[:, first] - scores[:, second]
            split = (each > 0).any(-1) & (each < 0).any(-1)
            metrics["members/std"] = Metric.mean(scores.std(-1, correction=0), rows)
            metrics["members/disagreement"] = Metric.mean(split.to(mean.dtype), pairs)
        if self.config.collaborative is not None:
            kept = torch.stack([batch["kept_0"], batch["kept_1"]], 1)
            metrics["collaborative/kept"] = Metric.mean(kept.to(mean.dtype), batch["unit"][:, None].expand_as(kept))
            if "noisy" in batch:
                clean = (batch.by_unit(batch["noisy"])[:, :1] == 0).to(mean.dtype).expand_as(kept)
                metrics["collaborative/clean"] = Metric.mean(clean, kept)
        return metrics

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        return _with_baseline(_derived(metrics), "rewards/longer_wins", "rewards/length_accuracies")

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self._rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rounds = state["rounds"]


class DemonstrationScores(PairScores):
    """Kind `irl`: demonstrations above what the policy writes itself, two rows a unit."""

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        config = self.config
        scores = batch.by_unit(last_scores(out, batch))  # [U, 2, 1]
        shown, written = scores.unbind(1)
        if config.pairwise:
            terms = self._terms("rank", ops.bradley_terry(shown, written), 1.0, batch)
        else:
            size = config.regularizer if config.regularizer is not None else 1 / config.beta
            terms = self._terms("gap", written - shown, 1 / config.beta, batch)
            terms |= self._terms("square", (shown.square() + written.square()) / 2, size, batch)
        first, second = torch.triu_indices(2, 2, offset=1, device=scores.device)
        pairs = batch.by_unit(batch["mask"].any(-1)).all(1, keepdim=True)
        return terms, self._metrics(batch, scores.detach(), pairs, first, second)


class AttributeScores(Algorithm[RewardModelConfig]):
    """Kind `attribute_regression`: every answer by itself, one score for each attribute."""

    needs = Needs(outputs=SCORES)

    def heads(self) -> Heads:
        return Heads("sequence", tuple(self.config.attributes))

    def count_units(self, group: Group) -> int:
        return len(group.completions)

    def build(self, groups: list[Group]) -> list[Unit]:
        return [(self._graded(group, i),) for group in groups for i in range(len(group.completions))]

    def _graded(self, group: Group, number: int) -> Row:
        grades = {name: self._grade(group, number, name) for name in self.config.attributes}
        if all(grade is None for grade in grades.values()):
            raise DataError(
                f"row {group.id!r}: answer {number + 1} has none of the attributes {', '.join(grades)}. Expected "
                "columns of these names in rows of one answer, or `attributes` or `scores`: "
                "{NAME: [a number or null for each answer]}; `fields` maps other names."
            )
        facts = {f"known_{k}": float(grade is not None) for k, grade in enumerate(grades.values())}
        facts |= {f"grade_{k}": grade or 0.0 for k, grade in enumerate(grades.values())}
        return scored_row(group, group.completions[number], **facts)

    def _grade(self, group: Group, number: int, name: str) -> float | None:
        """What is known of an attribute of an answer. A grade of 0 is known."""
        answer, listed = group.completions[number], group.fields.get("attributes")
        if name in answer.scores:
            return answer.scores[name].value
        found = group.fields.get(name) if len(group.completions) == 1 else None
        if found is None and isinstance(listed, Mapping) and listed.get(name) is not None:
            column = listed[name]
            if isinstance(column, list) and len(column) != len(group.completions):
                raise DataError(
                    f"row {group.id!r}: `attributes.{name}` has {len(column)} entries for {len(group.completions)} "
                    "answers"
                )
            found = column[number] if isinstance(column, list) else column
        return None if found is None else _finite(found, f"row {group.id!r}: the attribute {name!r}")

    def annotate(self, batch: Batch, world: World) -> Batch:
        """Grades and which of them are known, [N, 1, attributes]."""
        del world
        count = len(self.config.attributes)
        grades, known = (
            torch.stack([batch[f"{fact}_{k}"] for k in range(count)], -1)[:, None] for fact in ("grade", "known")
        )
        return batch.with_columns({"grades": grades, "known": known > 0})

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        scores = last_scores(out, batch)[:, None]  # [N, 1, H]
        grades = batch["grades"].to(scores.dtype)
        value = ops.squared_error(scores, grades)
        return {"error": Term(value, over="known")}, self._metrics(batch, scores.detach(), value.detach(), grades)

    def _metrics(self, batch: Batch, scores: Tensor, value: Tensor, grades: Tensor) -> Metrics:
        config, row, known = self.config, batch["row"], batch["known"]
        even = 1 / len(config.attributes)
        weights = [config.goal.get(name, 0.0) if config.goal else even for name in config.attributes]
        reward = (scores[:, 0] * scores.new_tensor(weights)).sum(-1)
        metrics = {"completions/mean_length": Metric.mean(batch["length"], row), **_score_metrics(reward, row)}
        for k, name in enumerate(config.attributes):
            told, grade = known[:, 0, k], grades[:, 0, k]
            metrics[f"mse/{name}"] = Metric.mean(value[:, 0, k], told)
            metrics[f"{HELPER}{name}/first"] = Metric.mean(grade, told)
            metrics[f"{HELPER}{name}/second"] = Metric.mean(grade.double().square(), told)
        return metrics

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        logged = _derived(metrics)
        for name in self.config.attributes:
            if f"mse/{name}" in metrics and f"{HELPER}{name}/second" in metrics:
                variance = metrics[f"{HELPER}{name}/second"] - metrics[f"{HELPER}{name}/first"] ** 2
                if variance > 0:
                    logged[f"r2/{name}"] = 1 - metrics[f"mse/{name}"] / variance
        return logged


class StepScores(Algorithm[RewardModelConfig]):
    """Kind `prm`: a solution a row, scored at the end of each of its steps."""

    needs = Needs(outputs=SCORES, fields=frozenset({"labels"}))

    def heads(self) -> Heads:
        if self.config.form == "value":
            return Heads("token", ("value",), hidden=True, frozen=True)
        return Heads("token", ("wrong", "right"))

    def build(self, groups: list[Group]) -> list[Unit]:
        return [(self._stepped(group),) for group in groups]

    def _stepped(self, group: Group) -> Row:
        """The solution, trained at the token after each step, where the state of the step's last token is read."""
        solution, ends = group.completions[0], group.completions[0].step_ends
        labels = group.fields["labels"]
        if ends is None or len(ends) != len(labels) or ends[-1] > len(solution.tokens):
            raise DataError(
                f"row {group.id!r}: {len(labels)} labels for {len(ends or [])} steps that end inside its tokens. "
                "Expected rows with prompt, completions (the steps) and labels, and no `overlong: cut`."
            )
        row = scored_row(group, solution)
        row.trained, row.token["target"] = [False] * len(row.tokens), [0.0] * len(row.tokens)
        for end, target in zip(ends, self._targets(group, labels), strict=True):
            row.trained[len(group.prompt) + end] = True
            row.token["target"][len(group.prompt) + end] = target
        return row

    def _targets(self, group: Group, labels: Sequence[Any]) -> list[float]:
        config = self.config
        if config.form == "value" and config.targets == "outcome":
            if group.fields.get("outcome") is None:
                raise DataError(
                    f"row {group.id!r} has no `outcome`. Expected true, false or a number; or, where labels are "
                    "success rates, `targets: labels`."
                )
            outcome = _finite(group.fields["outcome"], f"row {group.id!r}: `outcome`")
            return ops.discounted(outcome, len(labels), config.gamma)
        found = [_finite(label, f"row {group.id!r}: a label") for label in labels]
        if config.threshold is not None:
            return [float(label >= config.threshold) for label in found]
        if config.form == "classifier" and not all(0 <= label <= 1 for label in found):
            raise DataError(
                f"row {group.id!r}: labels {found} are no probabilities; say from where on a step is right: `threshold`"
            )
        return found

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        assert out.scores is not None, "needs.outputs asks for them"
        mask, target = batch["mask"], batch["target"].to(out.scores.dtype)
        steps = {"steps/mean_count": Metric.mean(mask.sum(-1).to(target.dtype), batch["row"])}
        if self.config.form == "value":
            error = ops.squared_error(out.scores[..., 0], target)
            metrics = {
                "mse/value": Metric.mean(error, mask),
                f"{HELPER}value/first": Metric.mean(target, mask),
                f"{HELPER}value/second": Metric.mean(target.double().square(), mask),
                **_score_metrics(out.scores[..., 0].detach(), mask),
            }
            return {"value": Term(ops.sequence_mean(error, mask), over="row")}, {**metrics, **steps}
        margin = out.scores[..., 1] - out.scores[..., 0]
        value = -target * F.logsigmoid(margin) - (1 - target) * F.logsigmoid(-margin)
        return {"step": Term(value, over="mask")}, {**_step_metrics(margin.detach(), target, mask), **steps}

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        logged = _with_baseline(_derived(metrics), "steps/right", "rewards/majority_accuracies")
        if "mse/value" in metrics:
            variance = metrics[f"{HELPER}value/second"] - metrics[f"{HELPER}value/first"] ** 2
            if variance > 0:
                logged["r2/value"] = 1 - metrics["mse/value"] / variance
        return logged


def _step_metrics(margin: Tensor, target: Tensor, mask: Tensor) -> Metrics:
    """Over steps; and over solutions with a wrong step, how often the first one is found.

    Args: [N, L] log-odds of right, targets, and where steps end.
    """
    right = target >= 0.5
    hit = ((margin > 0) == right).to(target.dtype).where(margin != 0, 0.5)
    first_told, first_true = (_first(mask & wrong) for wrong in (margin < 0, ~right))
    has_error = (mask & ~right).any(-1)
    return {
        "rewards/accuracies": Metric.mean(hit, mask),
        "steps/right": Metric.mean(right.to(target.dtype), mask),
        "steps/first_error": Metric.mean((first_told == first_true).to(target.dtype), has_error),
        **_score_metrics(margin.sigmoid(), mask),
        **_calibration(margin.sigmoid(), target, mask),
    }


def _first(where: Tensor) -> Tensor:
    """[N, L] → [N]: the first place that is True, L where none is."""
    return torch.where(where.any(-1), where.to(torch.uint8).argmax(-1), where.shape[-1])


def _mean_of_pairs(value: Tensor, pairs: Tensor) -> Tensor:
    """[U, P, M] → [U, M]: the mean over the pairs that exist."""
    return value.where(pairs[..., None], 0.0).sum(1) / pairs.sum(1).clamp(min=1)[:, None]


def _wins(difference: Tensor) -> Tensor:
    """1 where positive, ½ where 0."""
    return (difference.sign() + 1) / 2


def _score_metrics(scores: Tensor, over: Tensor) -> Metrics:
    return {
        "mean_reward": Metric.mean(scores, over),
        "min_reward": Metric.extreme(scores, over, "min"),
        "max_reward": Metric.extreme(scores, over, "max"),
        f"{HELPER}reward/second": Metric.mean(scores.double().square(), over),
    }


def _calibration(probability: Tensor, label: Tensor, over: Tensor) -> Metrics:
    gaps = ops.calibration_gaps(probability.double(), label.double(), BINS)
    return {f"{HELPER}gap/{k}": Metric.mean(gap, over) for k, gap in enumerate(gaps)}


def _derived(metrics: dict[str, float]) -> dict[str, float]:
    """What is logged, with the deviation of scores and the calibration error, without helpers."""
    logged = {name: value for name, value in metrics.items() if not name.startswith(HELPER)}
    second = f"{HELPER}reward/second"
    if second in metrics:
        logged["std_reward"] = max(0.0, metrics[second] - metrics["mean_reward"] ** 2) ** 0.5
    gaps = [abs(value) for name, value in metrics.items() if name.startswith(f"{HELPER}gap/")]
    if gaps:
        logged["calibration/ece"] = sum(gaps)
    return logged


def _with_baseline(logged: dict[str, float], share: str, name: str) -> dict[str, float]:
    """`name`, right behind the accuracy: what the better of a rule and its opposite gets, the rule winning `share`."""
    found = {}
    for metric, value in logged.items():
        found[metric] = value
        if metric == "rewards/accuracies":
            found[name] = max(logged[share], 1 - logged[share])
    return found


def _number(group: Group, column: str, default: float) -> float:
    found = group.fields.get(column)
    return default if found is None else _finite(found, f"row {group.id!r}: `{column}`")


def _finite(value: Any, what: str) -> float:
    """The value as a number. Raises DataError that says what it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        raise DataError(f"{what} is {value!r}, expected a number")
    return number


KINDS: dict[str, type[Algorithm[RewardModelConfig]]] = {
    "bradley_terry": PairScores,
    "attribute_regression": AttributeScores,
    "prm": StepScores,
    "irl": DemonstrationScores,
}


@register.algorithm("reward_model")
class RewardModel(Algorithm[RewardModelConfig]):
    """A model that scores answers, saved as transformers' classifiers are."""

    needs = Needs(outputs=SCORES)

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        self._kind = KINDS[config.kind](config)
        self.needs = self._kind.needs

    def heads(self) -> Heads:
        return self._kind.heads()

    @classmethod
    def rows_per_unit(cls, config: RewardModelConfig) -> int:
        return KINDS[config.kind].rows_per_unit(config)

    def count_units(self, group: Group) -> int:
        return self._kind.count_units(group)

    def build(self, groups: list[Group]) -> list[Unit]:
        return self._kind.build(groups)

    def annotate(self, batch: Batch, world: World) -> Batch:
        return self._kind.annotate(batch, world)

    def annotate_held_out(self, batch: Batch, world: World) -> Batch:
        return self._kind.annotate_held_out(batch, world)

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        return self._kind.loss(out, batch)

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        return self._kind.derive(metrics)

    def state_dict(self) -> dict[str, Any]:
        return self._kind.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kind.load_state_dict(state)
