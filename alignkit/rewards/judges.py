"""Judges: rewards that a language model gives in words, or by how likely it finds a verdict.

The model is asked through `Models`, so it may be the policy itself, another model of the run or one behind a server.
Prompts are made from templates and answers read by `core/templates.py`; a judgement that cannot be read is not valid,
never an error. docs/judges.md explains modes, keys and templates.

Source: rubric and mean of votes: Yuan et al. 2024 (arXiv 2401.10020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from alignkit import ops
from alignkit.core import templates
from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import RecipeError
from alignkit.core.lazy import torch
from alignkit.core.registry import register
from alignkit.core.rng import key, permutation
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.asking import Answers, Asker, need_models
from alignkit.rewards.calls import members_of_groups
from alignkit.rewards.functions import column_output

if TYPE_CHECKING:
    from torch import Tensor

CERTAIN = 50.0
"""Nats: differences of log-probabilities beyond it say no more, and must stay finite."""
SCALES = {"rating": (1, 10), "rating_expected": (1, 10), "rubric": (0, 5), "listwise": (1, 5)}
ANSWERS = {"pairwise": ("1", "2"), "yes_no": ("Yes", "No")}
SLOTS = {
    "pairwise": (("prompt", "first", "second"), ("first_label", "second_label")),
    "yes_no": (("prompt", "answer"), ("yes_label", "no_label")),
    "listwise": (("prompt", "answers"), ("count", "low", "high")),
    "rating": (("prompt", "answer"), ("low", "high")),
}
"""Mode → slots its template must have, and may have. Modes that are not named have those of rating."""


class JudgeConfig(Config):
    """Keys of `judge`."""

    model: str = Field("policy", description="who judges: policy, or an entry of the recipe's `models`")
    previous: str | None = Field(
        None, description="another model that judges too: its scores are the part `previous`, read by cream"
    )
    mode: Literal["rating", "rating_expected", "rubric", "pairwise", "yes_no", "listwise"] = Field(
        "rating", description="what is asked, and how the answer becomes a number"
    )
    template: str | None = Field(
        None, description="a shipped template, or the path of a .txt file; null = the mode's own"
    )
    scale: tuple[int, int] | None = Field(
        None, description="least and best number; null = 1 … 10, rubric 0 … 5, listwise 1 … 5"
    )
    verdict: Literal["logps", "text"] = Field(
        "logps", description="pairwise and yes_no: how likely each answer is, or what the judge writes"
    )
    answers: tuple[str, str] | None = Field(
        None, description='what to answer for "the first" and "the second", or for yes and no; null = 1, 2 and Yes, No'
    )
    principles: list[str] | str | None = Field(
        None, description="what to judge by: texts, or 'column:NAME' for those of the data"
    )
    votes: int = Field(1, ge=1, description="judgements of each answer, of which the mean counts")
    temperature: float = Field(0.0, ge=0, description="at which judgements are written")
    max_tokens: int = Field(512, ge=1, description="tokens of a written judgement")
    both_orders: bool = Field(True, description="pairwise: ask twice, with either answer first")
    disagreement: Literal["average", "tie"] = Field(
        "average", description="pairwise: what becomes of two orders that disagree"
    )
    opponents: int | None = Field(
        None, ge=1, description="pairwise: other answers that one is compared with; null = all of the prompt"
    )
    listed: int = Field(8, ge=2, description="listwise: answers in one prompt, at most")
    invalid_score: float | None = Field(
        None, allow_inf_nan=False, description="score of what could not be judged; null = not valid"
    )
    cache: str | None = Field(
        None, description="file that keeps the judgements of a model that never moves; null = in memory only"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> JudgeConfig:
        if self.scale is not None and (self.mode not in SCALES or self.scale[0] >= self.scale[1]):
            raise ValueError(f"scale: expected [least, best] of a mode with numbers, {', '.join(SCALES)}")
        if self.answers is not None and self.mode not in ANSWERS:
            raise ValueError(f"answers: mode {self.mode} has none, only pairwise and yes_no")
        if self.answers is not None and (
            not all(map(str.strip, self.answers)) or self.answers[0].lower() == self.answers[1].lower()
        ):
            raise ValueError("answers: expected two texts that differ")
        if isinstance(self.principles, str) and not self.principles.startswith("column:"):
            raise ValueError("principles: expected a list of texts, or 'column:NAME'")
        if self.votes > 1 and not self.writes:
            raise ValueError(f"votes: mode {self.mode} reads log-probabilities, and all votes would be equal")
        if self.votes > 1 and self.temperature == 0 and self.mode != "listwise":
            raise ValueError("votes: at temperature 0 all votes would be equal; set temperature, such as 0.7")
        if self.previous == self.model:
            raise ValueError("previous: is the judge itself; name another model, as `previous: previous`")
        if self.cache is not None and (self.model == "policy" or self.previous is not None):
            raise ValueError("cache: a file is for a judge that stays as it is, and the policy moves; leave it out")
        return self

    @property
    def writes(self) -> bool:
        """Whether the judge writes its judgement; else only log-probabilities are read."""
        return self.mode in ("rating", "rubric", "listwise") or (self.mode in ANSWERS and self.verdict == "text")


@dataclass(frozen=True)
class Case:
    """An answer to be judged, as the judge will see it."""

    question: str
    principles: str
    answer: str


@dataclass(frozen=True)
class Judgement:
    """What was found of one answer: its score, None where nothing could be read; the share of votes that could be; the
    judge's words; and other numbers by name."""

    score: float | None
    votes: float
    said: list[Any]
    parts: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Of two answers: how probably the first is better, None where nothing could be read; whether the two orders
    disagree; how much more than half goes to what stands first; the share of votes read; the judge's words."""

    better: float | None
    flipped: bool
    bias: float
    votes: float
    said: list[list[str]]


@register.reward("judge")
class Judge:
    """What a language model thinks of a completion: a number, points, yes or no, or how often it beats the others.

    Parts: `votes`, the share of judgements that could be read; `length_correlation` of scores and lengths within a
    prompt, Spearman's ρ; pairwise and listwise `position_bias`; pairwise `flips`, the share of comparisons whose two
    orders disagree.
    """

    config_type: ClassVar[type[Config]] = JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        mode = config.mode
        self._low, self._high = config.scale or SCALES.get(mode, (0, 1))
        self._labels = config.answers or ANSWERS.get(mode, ("", ""))
        required, optional = SLOTS.get(mode, SLOTS["rating"])
        own = {"rating_expected": "rating"}.get(mode, mode)
        self.template = templates.read_template(config.template or f"{own}_v1", required, (*optional, "principles"))
        column = config.principles if isinstance(config.principles, str) else None
        self._principle_column = None if column is None else column.removeprefix("column:")
        self.requires: tuple[str, ...] = () if self._principle_column is None else (self._principle_column,)
        if config.principles is not None and "principles" not in self.template.slots:
            raise RecipeError(
                f"reward 'judge': there are principles, and the template {self.template.name!r} has no slot "
                "'principles' for them"
            )
        self.answers = Answers(config.cache)

    def models(self) -> tuple[str, ...]:
        """Names of the run's models that it asks."""
        return (self.config.model, *([self.config.previous] if self.config.previous else []))

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; not valid where judgements could not be read. `info` holds the judge's words.

        Raises:
            RecipeError: there are no models to ask, or none of that name.
        """
        cases = [
            _case(templates.conversation(prompt), self._principles(rows, row), text)
            for row, (prompt, text) in enumerate(zip(rows.prompts, rows.completions, strict=True))
        ]
        members = members_of_groups(rows)
        askers = self._askers(need_models(models, "judge"), rows.step)
        found, *before = [self._judge_groups(asker, cases, members) for asker in askers]
        output = self._column(found)
        for name in found[0].parts if found else ():
            output.components[name] = torch.tensor([each.parts[name] for each in found])
        output.components["votes"] = torch.tensor([each.votes for each in found])
        output.components["length_correlation"] = _length_correlation(output, rows.completions, members)
        output.info = [{"judge": each.said} if each.said else {} for each in found]
        for others in before:
            column = self._column(others)
            output.components["previous"] = column.score
            output.valid &= column.valid
            output.info = [
                {**said, "previous": each.said} if each.said else said
                for said, each in zip(output.info, others, strict=True)
            ]
        return output

    def rate(self, prompts: Sequence[str], completions: Sequence[str], models: Models) -> list[float | None]:
        """[B]: the score of each completion by itself, None where it could not be read. Not pairwise, not listwise."""
        if self.config.mode in ("pairwise", "listwise"):
            raise RecipeError(f"reward 'judge': mode {self.config.mode} gives no score to an answer by itself")
        cases = [_case(*case) for case in zip(prompts, self._own_principles(prompts), completions, strict=True)]
        return [each.score for each in self._judge_alone(self._askers(models, 0)[0], cases)]

    def compare(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str], models: Models) -> list[float | None]:
        """[B]: how probably a is the better answer, None where that could not be read. Mode pairwise only."""
        if self.config.mode != "pairwise":
            raise RecipeError(f"reward 'judge': mode {self.config.mode} compares nothing, pairwise does")
        said = self._own_principles(prompts)
        pairs = [
            (_case(prompt, text, one), _case(prompt, text, other))
            for prompt, text, one, other in zip(prompts, said, a, b, strict=True)
        ]
        return [found.better for found in self._compare(self._askers(models, 0)[0], pairs)]

    def _askers(self, models: Models, step: int) -> list[Asker]:
        """The judge, and the previous one where there is one."""
        identities = {name: models.identity(name) for name in self.models()}
        self.answers.forget_others(identities.values())
        config = self.config
        return [
            Asker(
                models, name, identity, self.template.digest, config.temperature, config.max_tokens, step, self.answers
            )
            for name, identity in identities.items()
        ]

    def _column(self, found: Sequence[Judgement]) -> RewardOutput:
        scores = [self.config.invalid_score if each.score is None else each.score for each in found]
        return column_output(scores)

    def _own_principles(self, prompts: Sequence[str]) -> list[str]:
        if self._principle_column is not None:
            raise RecipeError("reward 'judge': its principles are in a column of the data, so score rows")
        return [principle_block(self.config.principles)] * len(prompts)

    def _principles(self, rows: RewardBatch, row: int) -> str:
        return principle_block(
            self.config.principles if self._principle_column is None else rows.columns[self._principle_column][row]
        )

    def _judge_groups(self, asker: Asker, cases: Sequence[Case], members: Sequence[list[int]]) -> list[Judgement]:
        """[B], with the rows of each group."""
        if self.config.mode == "pairwise":
            return self._judge_against(asker, cases, members)
        if self.config.mode == "listwise":
            return self._judge_listed(asker, cases, members)
        return self._judge_alone(asker, cases)

    def _judge_alone(self, asker: Asker, cases: Sequence[Case]) -> list[Judgement]:
        """Modes that look at one answer at a time."""
        prompts = [self._fill(case, answer=templates.quotable(case.answer)) for case in cases]
        if self.config.writes:
            return [
                self._mean(texts, [self._read(text) for text in texts])
                for texts in asker.texts(prompts, self.config.votes)
            ]
        if self.config.mode == "yes_no":
            scores = [difference(*pair) for pair in asker.choices(prompts, self._labels)]
        else:
            labels = [str(value) for value in range(self._low, self._high + 1)]
            scores = [expected_rating(logps, labels) for logps in asker.choices(prompts, labels)]
        return [Judgement(score, float(score is not None), [], {}) for score in scores]

    def _read(self, text: str) -> float | None:
        if self.config.mode == "rating":
            return templates.last_number(text, self._low, self._high)
        if self.config.mode == "rubric":
            return templates.score_line(text, self._low, self._high)
        chosen = templates.verdict(text, self._labels)
        return None if chosen is None else float(chosen == 0)

    def _mean(self, said: Sequence[str], values: Sequence[float | None], **parts: float) -> Judgement:
        """Of the votes that could be read: half of them must be, of a rubric one."""
        valid = [value for value in values if value is not None]
        enough = len(valid) >= (1 if self.config.mode == "rubric" else math.ceil(len(values) / 2))
        score = fmean(valid) if valid and enough else None
        return Judgement(score, len(valid) / len(values), list(said), dict(parts))

    def _judge_listed(self, asker: Asker, cases: Sequence[Case], members: Sequence[list[int]]) -> list[Judgement]:
        """All answers to a prompt in one list, or in several of equal size; in another order for each vote."""
        lists: list[list[int]] = []
        for rows in members:
            rows = sorted(rows, key=lambda row: cases[row].answer)  # so that the order they came in changes nothing
            texts = [cases[rows[0]].question, *(cases[row].answer for row in rows)]
            pieces = math.ceil(len(rows) / self.config.listed)
            for vote in range(self.config.votes):
                order = [rows[place] for place in permutation(len(rows), 0, "judge", vote, *texts)]
                lists += [order[piece::pieces] for piece in range(pieces)]
        prompts = [
            self._fill(
                cases[rows[0]], answers=templates.listed([cases[row].answer for row in rows]), count=str(len(rows))
            )
            for rows in lists
        ]
        values: list[list[float | None]] = [[] for _ in cases]
        said: list[list[str]] = [[] for _ in cases]
        biases: list[list[float]] = [[] for _ in cases]
        for rows, (text,) in zip(lists, asker.texts(prompts), strict=True):
            found = templates.scores_line(text, len(rows), self._low, self._high)
            found = templates.json_scores(text, len(rows), self._low, self._high) if found is None else found
            bias = 0.0 if found is None else _position_bias(found)
            for place, row in enumerate(rows):
                values[row].append(None if found is None else found[place])
                said[row].append(text)
                biases[row].append(bias)
        return [
            self._mean(texts, votes, position_bias=fmean(bias))
            for texts, votes, bias in zip(said, values, biases, strict=True)
        ]

    def _judge_against(self, asker: Asker, cases: Sequence[Case], members: Sequence[list[int]]) -> list[Judgement]:
        """Each answer against others to its prompt: the score is how probably it is better, on average."""
        opponents = {row: self._opponents(cases, row, rows) for rows in members for row in rows}
        pairs = list(dict.fromkeys((min(a, b), max(a, b)) for a, others in opponents.items() for b in others))
        found = dict(zip(pairs, self._compare(asker, [(cases[a], cases[b]) for a, b in pairs]), strict=True))
        judgements = []
        for row in range(len(cases)):
            mine = [(found[min(row, other), max(row, other)], row < other) for other in opponents[row]]
            wins = [each.better if first else 1 - each.better for each, first in mine if each.better is not None]
            parts = {
                "flips": fmean(each.flipped for each, _ in mine) if mine else 0.0,
                "position_bias": fmean(each.bias for each, _ in mine) if mine else 0.0,
            }
            votes = fmean(each.votes for each, _ in mine) if mine else 0.0
            said = [each.said for each, _ in mine if each.said]
            judgements.append(Judgement(fmean(wins) if wins else None, votes, said, parts))
        return judgements

    def _opponents(self, cases: Sequence[Case], row: int, rows: Sequence[int]) -> list[int]:
        """Rows that one is compared with, chosen by what the answers say, whatever their order."""
        mine = cases[row]
        others = [other for other in rows if other != row]
        if self.config.opponents is None or len(others) <= self.config.opponents:
            return others
        drawn = sorted(others, key=lambda other: key(0, "opponent", mine.question, mine.answer, cases[other].answer))
        return drawn[: self.config.opponents]

    def _compare(self, asker: Asker, pairs: Sequence[tuple[Case, Case]]) -> list[Comparison]:
        """Each pair in both orders. Equal texts are equally good, and nobody is asked."""
        prompts: list[str] = []
        orders: list[list[bool]] = []
        for a, b in pairs:
            swapped = [False, True] if self.config.both_orders else [self._swapped(a, b)]
            orders.append([] if a.answer == b.answer else swapped)
            for swap in orders[-1]:
                first, second = (templates.quotable(case.answer) for case in ((b, a) if swap else (a, b)))
                prompts.append(self._fill(a, first=first, second=second))
        leanings = iter(self._leanings(asker, prompts))
        return [self._weigh([(next(leanings), swap) for swap in each]) for each in orders]

    def _swapped(self, a: Case, b: Case) -> bool:
        """Which of two stands first where it is asked once: by their texts, so that it is the same for b and a."""
        turned = bool(key(0, "first", a.question, *sorted((a.answer, b.answer))) & 1)
        return (a.answer > b.answer) != turned

    def _leanings(self, asker: Asker, prompts: Sequence[str]) -> list[Judgement]:
        """How much the first answer of each prompt is preferred, above 0: in nats, or share of votes less ½."""
        if self.config.verdict == "logps":
            found = [difference(*pair) for pair in asker.choices(prompts, self._labels)]
            return [Judgement(each, float(each is not None), [], {}) for each in found]
        judgements = [
            self._mean(texts, [self._read(text) for text in texts]) for texts in asker.texts(prompts, self.config.votes)
        ]
        return [
            Judgement(None if each.score is None else each.score - 0.5, each.votes, each.said, {})
            for each in judgements
        ]

    def _weigh(self, orders: Sequence[tuple[Judgement, bool]]) -> Comparison:
        """One comparison of a and b from the orders it was asked in, `True` = b first."""
        if not orders:
            return Comparison(0.5, False, 0.0, 1.0, [])
        votes, said = fmean(found.votes for found, _ in orders), [found.said for found, _ in orders if found.said]
        first = [found.score for found, _ in orders if found.score is not None]
        if len(first) < len(orders):
            return Comparison(None, False, 0.0, votes, said)
        leaning = fmean(-score if swap else score for score, (_, swap) in zip(first, orders, strict=True))
        flipped = len(first) == 2 and first[0] * first[1] > 0
        if flipped and self.config.disagreement == "tie":
            leaning = 0.0
        bias = fmean(map(self._probability, first)) - 0.5
        return Comparison(self._probability(leaning), flipped, bias, votes, said)

    def _probability(self, leaning: float) -> float:
        return 1 / (1 + math.exp(-leaning)) if self.config.verdict == "logps" else 0.5 + leaning

    def _fill(self, case: Case, **slots: str) -> str:
        one, other = self._labels
        labels = {"first_label": one, "second_label": other, "yes_label": one, "no_label": other}
        numbers = {"low": str(self._low), "high": str(self._high)}
        texts = {"prompt": templates.quotable(case.question), "principles": case.principles}
        return self.template.fill({**labels, **numbers, **texts, **slots})


def principle_block(principles: Any) -> str:
    """Principles, one text or several, as the slot {principles} shows them; "" without any."""
    texts = [principles] if isinstance(principles, str) else list(principles or ())
    lines = "".join(f"- {text}\n" for text in texts)
    return f"What counts most:\n{lines}\n" if lines else ""


def difference(yes: float, no: float) -> float | None:
    """Of two log-probabilities in nats, within ±`CERTAIN`; None where both are impossible."""
    found = yes - no
    return None if math.isnan(found) else max(-CERTAIN, min(CERTAIN, found))


def expected_rating(logps: Sequence[float], labels: Sequence[str]) -> float | None:
    """Σ v·p(v) of whole numbers v, written as `labels`, with p over these alone; None where all are impossible.

    A model that writes digits one by one counts 10 as 1 too, so a number loses the share of those it is the beginning
    of. Where 10 is a token of its own that takes too much, at most p(10).
    """
    top = max(logps)
    if math.isinf(top):
        return None
    raw = {label: math.exp(logp - top) for label, logp in zip(labels, logps, strict=True)}
    shares = {
        label: max(0.0, p - sum(raw.get(f"{label}{digit}", 0.0) for digit in range(10))) for label, p in raw.items()
    }
    return sum(p * int(label) for label, p in shares.items()) / sum(shares.values())


def _length_correlation(output: RewardOutput, texts: Sequence[str], members: Sequence[list[int]]) -> Tensor:
    """[B]: Spearman's ρ between score and characters over the valid rows of its group."""
    found: Tensor = torch.zeros(len(texts))
    for rows in members:
        valid = [row for row in rows if bool(output.valid[row])]
        lengths = torch.tensor([float(len(texts[row])) for row in valid])
        found[rows] = ops.spearman_rho(output.score[valid], lengths)
    return found


def _position_bias(scores: Sequence[float]) -> float:
    """Spearman's ρ between scores and how early in the list they stand."""
    return float(ops.spearman_rho(torch.tensor(scores), -torch.arange(len(scores), dtype=torch.float32)))


def _case(question: str, principles: str, answer: str) -> Case:
    texts = (question, principles, templates.strip_thinking(answer))
    return Case(*(text.encode(errors="replace").decode() for text in texts))  # half a surrogate pair has no bytes
