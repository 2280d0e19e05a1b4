"""GRPO-Scaling: GRPO that learns more from prompts whose answers are far from a demonstration. Cheng et al. 2025,
arXiv 2503.18991, as accounts of it give it.

    A = α·(r − mean of the prompt) / std of the prompt          α = α_D·α_M
    α_D = σ(δ) / σ(mean of δ over the category)                 δ = 1 − coverage of the answer by the demonstration
    α_M = σ(mean gap without outliers) / σ(mean gap)            gap = r(demonstration) − r(answer), by category

α has no gradient and multiplies what the division by the standard deviation has made, since that would take away any
factor of the rewards. Deviations: one α a prompt, from the means over its answers, unless `alpha_granularity` says
otherwise: with one an answer advantages no longer cancel out within a prompt. Statistics of a category are moving
averages over rounds, and α is kept within bounds. The bound of outliers is in variances of the gaps, so that the scale
of a reward does not matter. The default encoder counts words; the paper's is a trained one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.algorithms.grpo import GRPO, GRPOConfig
from alignkit.core import Batch, Completion, Forward, Group, Metric, Metrics, Terms, Unit, World, register
from alignkit.core.answers import answer_units
from alignkit.core.errors import DataError, RecipeError
from alignkit.core.lazy import torch
from alignkit.core.registry import load_object

if TYPE_CHECKING:
    from torch import Tensor

DEMONSTRATION, CATEGORY = "demonstration", "category"
SHARED = "all"
"""The category of rows that name none."""
BUCKETS = 1024
"""Dimensions of the bag of words: a word has the one that its checksum says."""
WORD, CLAUSE_END = re.compile(r"\w+"), re.compile(r"[.!?;:\n]+")

Encoder = Callable[[list[str]], Any]
Splitter = Callable[[str], list[str]]


class GRPOSConfig(GRPOConfig):
    """The keys of grpo, and those of α."""

    encoder: str = Field("bag_of_words", description="or 'module:function': texts → [texts, dimensions]")
    clauses: str = Field("sentences", description="or 'module:function': text → its clauses")
    alpha_granularity: Literal["prompt", "response"] = Field(
        "prompt", description="one α for all answers of a prompt, by their means, or one an answer"
    )
    tau: float = Field(4.0, ge=0, description="τ: gaps whose squared distance from the mean is larger are outliers")
    tau_mode: Literal["absolute", "variance"] = Field("variance", description="τ as it is, or × variance of the gaps")
    ema: float = Field(0.5, ge=0, lt=1, description="what the averages of a category keep at each round; 0 = nothing")
    alpha_clip: list[float] = Field([0.5, 2.0], min_length=2, max_length=2, description="bounds of α; [1, 1] is grpo")
    invert_hardness: bool = Field(False, description="what is near the demonstration counts as hard")
    combine: Literal["product", "sum"] = Field("product", description="α_D·α_M, or (α_D + α_M)/2")

    @model_validator(mode="after")
    def _bounds_alpha(self) -> GRPOSConfig:
        low, high = self.alpha_clip
        if not 0 < low <= high or not isfinite(high):
            raise ValueError(f"`alpha_clip` is [{low:g}, {high:g}], expected 0 < lower ≤ upper")
        return self


def bag_of_words(texts: list[str]) -> Tensor:
    """How often each word occurs, hashed, [texts] → [texts, BUCKETS]; the same on every machine."""
    counts = torch.zeros(len(texts), BUCKETS)
    for row, text in enumerate(texts):
        for word in WORD.findall(text.lower()):
            counts[row, crc32(word.encode()) % BUCKETS] += 1
    return counts


def sentences(text: str) -> list[str]:
    """What stands between marks that end a sentence or clause, and line breaks."""
    return [part.strip() for part in CLAUSE_END.split(text) if part.strip()]


BUILT_IN: dict[str, Any] = {"bag_of_words": bag_of_words, "sentences": sentences}


def find_function(key: str, name: str) -> Any:
    """A built-in by name, or 'module:function'. Raises RecipeError."""
    found = BUILT_IN.get(name)
    if found is None and ":" in name:
        found = load_object(name)
    if not callable(found):
        raise RecipeError(f"algorithm.{key}: {name!r} is none; expected {' or '.join(BUILT_IN)} or 'module:function'")
    return found


def scaled(hard: Tensor, responds: Tensor, config: GRPOSConfig) -> Tensor:
    """α of α_D and α_M, elementwise, within its bounds; 1 of two ones."""
    alpha = hard * responds if config.combine == "product" else (hard + responds) / 2
    return alpha.clamp(*config.alpha_clip)


@register.algorithm("grpo_s")
class GRPOS(GRPO):
    """GRPO whose advantages are scaled by how hard a prompt is for the policy, measured at a demonstration."""

    needs = replace(GRPO.needs, demonstration=DEMONSTRATION, fields=frozenset({DEMONSTRATION}))
    config_type = GRPOSConfig
    config: GRPOSConfig

    def __init__(self, config: GRPOSConfig) -> None:
        super().__init__(config)
        self._encode: Encoder = find_function("encoder", config.encoder)
        self._split: Splitter = find_function("clauses", config.clauses)
        self._categories = [SHARED]
        self._averages: dict[str, dict[str, float]] = {}

    def prepare(self, groups: Sequence[Group]) -> None:
        """The categories of all rows, in one order on every rank."""
        self._categories = sorted({self._category(group) for group in groups}) or [SHARED]

    def _category(self, group: Group) -> str:
        named = group.fields.get(CATEGORY)
        return SHARED if named is None else str(named)

    def build(self, groups: list[Group]) -> list[Unit]:
        """A unit is one completion, with its coverage, its gap and its category."""
        coverages = self._coverages(groups)
        facts = {group.id: self._facts_of(group, found) for group, found in zip(groups, coverages, strict=True)}
        return answer_units(groups, self._objectives, partial(_told, facts))

    def _facts_of(self, group: Group, coverages: list[float]) -> list[dict[str, float]]:
        """Of each completion of a group; coverage and gap are its own, or means over the group."""
        category = self._category(group)
        if category not in self._categories:
            raise DataError(f"row {group.id!r}: its category {category!r} is none of {', '.join(self._categories)}")
        shown = float(group.fields[f"{DEMONSTRATION}.reward"])
        gaps = [shown - completion.reward for completion in group.completions]
        wins = [float("nan") if isnan(gap) else (gap > 0) + (gap == 0) / 2 for gap in gaps]
        if self.config.alpha_granularity == "prompt":
            gaps, coverages = ([_mean(values)] * len(values) for values in (gaps, coverages))
        number = float(self._categories.index(category))
        return [
            {"coverage": coverage, "gap": gap, "wins": win, "category": number}
            for coverage, gap, win in zip(coverages, gaps, wins, strict=True)
        ]

    def _coverages(self, groups: Sequence[Group]) -> list[list[float]]:
        """How well the demonstration of each group covers each of its completions, in [−1, 1]; one call encodes all."""
        texts: list[list[list[str]]] = []
        for group in groups:
            answers = [completion.text for completion in group.completions]
            texts.append([self._split(text) or [text] for text in (str(group.fields[DEMONSTRATION]), *answers)])
        flat = [clause for group in texts for clauses in group for clause in clauses]
        if not flat:
            return []
        codes = torch.as_tensor(self._encode(flat)).detach().cpu().double()
        if codes.ndim != 2 or len(codes) != len(flat):
            raise RecipeError(
                f"algorithm.encoder: {self.config.encoder!r} made {tuple(codes.shape)} of {len(flat)} texts, expected "
                "one row for each"
            )
        rest = iter(codes)
        found = []
        for written in texts:
            shown, *each = (torch.stack([next(rest) for _ in clauses]) for clauses in written)
            found.append([float(ops.clause_coverage(ops.clause_similarity(answer, shown))) for answer in each])
        return found

    def annotate(self, batch: Batch, world: World) -> Batch:
        """Advantages times `alpha` [N], and what it is made of."""
        batch = super().annotate(batch, world)
        size, category, row = len(self._categories), batch["category"].long(), batch["row"]
        scored = row & ~batch["gap"].isnan()
        coverage, gap = batch["coverage"].double(), batch["gap"].double().where(scored, 0.0)
        distance = coverage if self.config.invert_hardness else 1 - coverage
        of_categories = partial(ops.category_means, category=category, size=size, total=world.sum)
        mean_gap = of_categories(gap, over=scored)
        tau, mode = self.config.tau, self.config.tau_mode
        _, kept = ops.responsiveness(gap, category, scored, mean_gap, tau, tau_mode=mode, total=world.sum)
        any_kept = of_categories(torch.ones_like(gap), over=kept) > 0
        filtered = torch.where(any_kept, of_categories(gap, over=kept), mean_gap)
        met, met_scored = (of_categories(torch.ones_like(gap), over=over) > 0 for over in (row, scored))
        distance_mean = self._averaged("distance", of_categories(distance, over=row), met)
        gap_mean, filtered_mean = (
            self._averaged(name, found, met_scored) for name, found in (("gap", mean_gap), ("filtered_gap", filtered))
        )
        hard = ops.data_hardness(distance, distance_mean[category])
        responds = (filtered_mean.sigmoid() / gap_mean.sigmoid())[category]
        alpha = scaled(hard, responds, self.config).to(batch["advantage"].dtype)
        return batch.with_columns(
            {
                "advantage": batch["advantage"] * alpha[:, None],
                "alpha": alpha,
                "alpha.data": hard.to(alpha.dtype),
                "alpha.model": responds.to(alpha.dtype),
                "kept": kept,
                "scored": scored,
            }
        )

    def annotate_held_out(self, batch: Batch, world: World) -> Batch:
        """`annotate` that leaves the averages where they were."""
        before = self.state_dict()
        batch = self.annotate(batch, world)
        self.load_state_dict(before)
        return batch

    def _averaged(self, name: str, found: Tensor, met: Tensor) -> Tensor:
        """[C]: the moving average of a category's statistic, 0 until the first; moved by the batches that hold it."""
        averages, keep = self._averages.setdefault(name, {}), self.config.ema
        for number, category in enumerate(self._categories):
            if met[number]:
                new = float(found[number])
                averages[category] = keep * averages[category] + (1 - keep) * new if category in averages else new
        return found.new_tensor([averages.get(category, 0.0) for category in self._categories])

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        """That of grpo."""
        terms, metrics = super().loss(out, batch)
        row, scored = batch["row"], batch["scored"]
        metrics |= {
            "alpha/mean": Metric.mean(batch["alpha"], row),
            "alpha/min": Metric.extreme(batch["alpha"], row, "min"),
            "alpha/max": Metric.extreme(batch["alpha"], row, "max"),
            "alpha/kept": Metric.mean(batch["kept"].float(), scored),
        }
        for number, name in enumerate(self._categories):
            mine = row & (batch["category"] == number)
            for fact, column in LOGGED.items():
                metrics[f"categories/{name}/{fact}"] = Metric.mean(batch[column], mine & ~batch[column].isnan())
        return terms, metrics

    def state_dict(self) -> dict[str, Any]:
        return {"averages": {name: dict(found) for name, found in self._averages.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averages = {name: dict(found) for name, found in state["averages"].items()}


LOGGED = {
    "alpha": "alpha",
    "alpha_data": "alpha.data",
    "alpha_model": "alpha.model",
    "coverage": "coverage",
    "gap": "gap",
    "demonstration_wins": "wins",
}
"""Metric of a category → column."""


def _told(facts: Mapping[str, list[dict[str, float]]], group: Group, completion: Completion) -> Mapping[str, float]:
    place = next(i for i, one in enumerate(group.completions) if one is completion)
    return facts[group.id][place]


def _mean(values: Sequence[float]) -> float:
    """Over those that are numbers; nan without any."""
    known = [value for value in values if not isnan(value)]
    return sum(known) / len(known) if known else float("nan")
