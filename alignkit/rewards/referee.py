"""The two rewards of a model that is player and referee: how well it ranks answers of the data, and what it thinks of
its own. 2025, arXiv 2507.17515.

    referee_rank   τ = (concordant − discordant) / pairs, between the scores it gave and the true ones; ties count 0
    self_referee   mean score of an answer over several orders of its group, 0 … 1

Deviations: scales, prompts and the number of votes are not published and ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, exp
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import templates
from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import DataError, RecipeError
from alignkit.core.lazy import torch
from alignkit.core.referee import RefereeForm, RefereeKeys
from alignkit.core.registry import register
from alignkit.core.rng import generator, permutation
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.asking import need_models
from alignkit.rewards.calls import members_of_groups
from alignkit.rewards.functions import column_output


class RefereeRankConfig(RefereeKeys):
    """Keys of `referee_rank`."""

    column: str = Field("referee_scores", description="data column of the true scores, in the order of the question")
    reward: Literal["tau", "unit"] = Field("tau", description="τ as it is, −1 … 1, or (τ + 1)/2")


@register.reward("referee_rank")
class RefereeRank:
    """How far the scores that a completion gives agree with the true ones; the least there is where it gives none.

    Parts: `accuracy`, the share of pairs it has in the right order, ties counting half and what cannot be read nothing;
    `parsed`, the share of completions that could be read.
    """

    config_type: ClassVar[type[Config]] = RefereeRankConfig

    def __init__(self, config: RefereeRankConfig) -> None:
        self.config = config
        self._form = RefereeForm(config)
        self.requires: tuple[str, ...] = (config.column,)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion, valid everywhere. Raises DataError where the true scores are no ranking."""
        del models
        taus, accuracies, parsed = [], [], []
        for text, true in zip(rows.completions, self._true(rows), strict=True):
            given = self._form.scores(text, len(true))
            tau = -1.0 if given is None else kendall(given, true)
            taus.append(tau if self.config.reward == "tau" else (tau + 1) / 2)
            accuracies.append(0.0 if given is None else (tau / kendall(true, true) + 1) / 2)
            parsed.append(float(given is not None))
        output = column_output([*taus])
        output.components = {"accuracy": torch.tensor(accuracies), "parsed": torch.tensor(parsed)}
        return output

    def _true(self, rows: RewardBatch) -> list[list[float]]:
        found = rows.columns[self.config.column]
        for value in found:
            numbers = isinstance(value, list) and all(isinstance(x, (int, float)) for x in value)
            if not numbers or len(set(value)) < 2 or (self._form.pairwise and len(value) != 2):
                expected = "two numbers that differ" if self._form.pairwise else "numbers, not all equal"
                raise DataError(
                    f"reward 'referee_rank': the column {self.config.column!r} has {str(value)[:60]}, expected "
                    f"{expected}; the operation `referee` writes them, with the same `template`"
                )
        return [[float(x) for x in value] for value in found]


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """τ_a of two columns of equal length, −1 … 1."""
    return float(ops.kendall_tau(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)))


class SelfRefereeConfig(RefereeKeys):
    """Keys of `self_referee`."""

    model: str = Field("policy", description="who judges: policy, or an entry of the recipe's `models`")
    votes: int = Field(
        3, ge=1, description="orders in which a group is listed; of pairs: other answers that each is compared with"
    )
    verdict: Literal["text", "logits"] = Field(
        "text",
        description="of pairs: text = one is written for every judgement; logits = how likely each label is, in place "
        "of draws",
    )
    temperature: float = Field(0.7, ge=0, description="at which judgements are written, or labels are likely")
    max_tokens: int = Field(512, ge=1, description="tokens of a written judgement")
    max_candidates: int = Field(8, ge=2, description="answers in one list, at most")
    overlap: int = Field(1, ge=0, description="answers that a list shares with the one before it")

    @model_validator(mode="after")
    def _goes_on(self) -> SelfRefereeConfig:
        if self.overlap >= self.max_candidates:
            raise ValueError(f"overlap: {self.overlap} leaves no new answer in lists of {self.max_candidates}")
        if self.verdict == "logits" and self.temperature == 0:
            raise ValueError("verdict: logits says how likely a label is, which needs a temperature above 0")
        return self


@dataclass(frozen=True)
class Question:
    """Rows in the order in which the referee sees them, and what it is asked; equal answers are not asked about."""

    rows: list[int]
    text: str | None


@dataclass
class Heard:
    """Of one answer: its scores, 0 … 1, and of each judgement its words, whether they could be read (1 or 0), and τ of
    score and place."""

    scores: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    parsed: list[float] = field(default_factory=list)
    biases: list[float] = field(default_factory=list)


@register.reward("self_referee")
class SelfReferee:
    """What a model thinks of a prompt's answers when it sees them side by side, 0 … 1.

    Lists: the mean score. Pairs: the share of verdicts won against other answers of the group, each in both orders;
    with `verdict: logits` what that share would be after many draws. A judge that is sure goes by position before it
    goes by what it sees: then a temperature of several nats keeps the two orders from being 1 and 0 each.
    The judgements themselves are not learned from. Parts: `position_bias`, Kendall's τ between score and place, above 0
    where what stands first is preferred; `parsed`, the share of judgements that could be read.
    """

    config_type: ClassVar[type[Config]] = SelfRefereeConfig
    requires: tuple[str, ...] = ()

    def __init__(self, config: SelfRefereeConfig) -> None:
        self.config = config
        self._form = RefereeForm(config)
        if config.verdict == "logits" and not self._form.pairwise:
            raise RecipeError(
                f"self_referee: verdict: logits compares two answers, and the template {config.template!r} asks for a "
                "list of scores; take verdict: text, or a template with {first} and {second}"
            )

    def models(self) -> tuple[str, ...]:
        """Names of the run's models that it asks."""
        return (self.config.model,)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; not valid where no judgement of it could be read.

        Raises:
            RecipeError: there are no models to ask, or none of that name.
        """
        answers = [templates.strip_thinking(text) for text in rows.completions]
        questions = [
            question
            for members in members_of_groups(rows)
            for question in self._questions(
                templates.conversation(rows.prompts[members[0]]), members, answers, rows.step
            )
        ]
        judged = self._judged(questions, need_models(models, "self_referee"))
        heard = [Heard() for _ in answers]
        for question in questions:
            said, scores = (None, [0.5] * len(question.rows)) if question.text is None else next(judged)
            _hear(said, scores, [heard[row] for row in question.rows])
        output = column_output([fmean(each.scores) if each.scores else None for each in heard])
        output.components = {
            "position_bias": torch.tensor([fmean(each.biases or [0.0]) for each in heard]),
            "parsed": torch.tensor([fmean(each.parsed or [1.0]) for each in heard]),
        }
        output.info = [{"judge": each.said} if each.said else {} for each in heard]
        return output

    def _questions(self, prompt: str, members: Sequence[int], answers: Sequence[str], step: int) -> list[Question]:
        """What is asked about the answers of one prompt: by their texts, whatever order they come in."""
        members = sorted(members, key=lambda row: answers[row])
        texts = [answers[row] for row in members]
        orders = self._pairs(texts, prompt, step) if self._form.pairwise else self._lists(texts, prompt, step)
        return [
            Question(
                [members[i] for i in order],
                self._form.question(prompt, [texts[i] for i in order]) if len({texts[i] for i in order}) > 1 else None,
            )
            for order in orders
        ]

    def _lists(self, texts: Sequence[str], prompt: str, step: int) -> list[list[int]]:
        """Every answer in each of `votes` orders, in lists of at most `max_candidates` that overlap."""
        longest, shared, size = self.config.max_candidates, self.config.overlap, len(texts)
        lists = []
        for vote in range(self.config.votes):
            order = permutation(size, 0, "self_referee", step, vote, prompt, *texts)
            pieces = max(1, ceil((size - shared) / (longest - shared)))
            starts = [min(piece * (longest - shared), max(0, size - longest)) for piece in range(pieces)]
            lists += [order[start : start + longest] for start in starts]
        return lists

    def _pairs(self, texts: Sequence[str], prompt: str, step: int) -> list[list[int]]:
        """Every answer against `votes` others, each two of them once in either order."""
        pairs: set[tuple[int, int]] = set()
        for one in range(len(texts)):
            others = [other for other in range(len(texts)) if other != one]
            draw = generator(0, "self_referee", step, one, prompt, *texts)
            for other in draw.sample(others, min(self.config.votes, len(others))):
                pairs |= {(one, other), (other, one)}
        return [list(pair) for pair in sorted(pairs)]

    def _judged(self, questions: Sequence[Question], models: Models) -> Iterator[tuple[str, list[float] | None]]:
        """Of each question that is asked, in order: what was said, and the scores of its answers, 0 … 1; None where
        nothing could be read."""
        asked = [(question.text, len(question.rows)) for question in questions if question.text is not None]
        prompts = [text for text, _ in asked]
        if self.config.verdict == "logits":
            for first, second in models.choices(prompts, self.config.labels, self.config.model):
                share = 1 / (1 + exp((second - first) / self.config.temperature))
                yield f"{self.config.labels[0]}: {share:.3f}", [share, 1 - share]
            return
        low, high = self._form.low, self._form.high
        for (_, places), said in zip(asked, self._said(prompts, models), strict=True):
            scores = self._form.scores(said, places)
            yield said, None if scores is None else [(score - low) / (high - low) for score in scores]

    def _said(self, prompts: Sequence[str], models: Models) -> Iterator[str]:
        """The judgement of each prompt, in order; a prompt that comes again is drawn again."""
        config, times = self.config, Counter(prompts)
        drawn: dict[str, Iterator[str]] = {}
        for number in sorted(set(times.values())):
            asked = [prompt for prompt, found in times.items() if found == number]
            written = models.generate(
                asked, config.model, n=number, temperature=config.temperature, max_tokens=config.max_tokens
            )
            drawn |= {prompt: iter(texts) for prompt, texts in zip(asked, written, strict=True)}
        return (next(drawn[prompt]) for prompt in prompts)


def _hear(said: str | None, scores: Sequence[float] | None, heard: Sequence[Heard]) -> None:
    """Note a judgement with the answers it is about, in their order; `said` is None where none was asked for."""
    for place, each in enumerate(heard):
        if scores is not None:
            each.scores.append(scores[place])
        if said is not None:
            each.said.append(said)
            each.parsed.append(float(scores is not None))
            each.biases += [] if scores is None else [kendall(scores, range(len(scores), 0, -1))]
