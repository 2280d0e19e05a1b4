"""Rewards that are a rule on the text: no model, no network, the same number every time."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.lazy import torch
from alignkit.core.registry import register
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.calls import members_of_groups
from alignkit.rewards.functions import column_output

WORD = re.compile(r"[a-z']+")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class WordValenceConfig(Config):
    """Keys of `word_valence`."""

    lexicon: str | None = Field(
        None, description="file of lines word<TAB>valence, a header line allowed; null = a short built-in list"
    )


@register.reward("word_valence")
class WordValence:
    """How pleasant the words of a completion are: the sum of their valences divided by the number of *all* its words.

    Words are runs of `[a-z']` in the lower-cased text; one that the lexicon lacks counts as 0, and a text without words
    scores 0. So neither a longer text nor one rare pleasant word wins by itself.
    """

    config_type: ClassVar[type[Config]] = WordValenceConfig
    requires: tuple[str, ...] = ()

    def __init__(self, config: WordValenceConfig) -> None:
        self.lexicon = read_lexicon(config.lexicon)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; always valid."""
        del models
        return _valid_everywhere([word_valence(text, self.lexicon) for text in rows.completions])


def word_valence(text: str, lexicon: dict[str, float]) -> float:
    """Sum of the valences of the words of `text` / number of its words; 0 without words."""
    words = WORD.findall(text.lower())
    return sum(lexicon.get(word, 0.0) for word in words) / max(len(words), 1)


def read_lexicon(path: str | None) -> dict[str, float]:
    """Words and their valences from a tab-separated file; None = the built-in list (−3 … 3).

    Raises:
        RecipeError: the file is missing, or a line is not `word<TAB>number`.
    """
    if path is None:
        text = resources.files("alignkit.rewards").joinpath("words.tsv").read_text(encoding="utf-8")
    elif Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"reward 'word_valence': there is no lexicon file {path!r} (looked in {Path.cwd()}); expected a file of "
            "lines word<TAB>valence, or null for the built-in list"
        )
    lexicon: dict[str, float] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        word, _, valence = line.partition("\t")
        try:
            lexicon[word.lower()] = float(valence)
        except ValueError:
            if number > 1:
                raise RecipeError(
                    f"reward 'word_valence': {path}:{number} is {line!r}; expected word<TAB>valence (happy<TAB>2.5)"
                ) from None
    return lexicon


class LengthConfig(Config):
    """Keys of `length`."""

    form: Literal["count", "overlong_soft", "salmon_bonus", "target_band", "linear"] = Field(
        "count", description="what is made of a completion's length n; see `length_score`"
    )
    unit: Literal["words", "characters", "tokens"] = Field(
        "words", description="what is counted; words are split at white space"
    )
    maximum: int | None = Field(None, ge=1, description="m, of overlong_soft, salmon_bonus and linear")
    buffer: int = Field(0, ge=0, description="c of overlong_soft: the penalty begins so far below m")
    target: float | str | None = Field(
        None, description="L of target_band: a number, 'column:NAME', or 'median' of the prompt's completions"
    )
    tolerance: float = Field(0.1, ge=0, description="share of L that costs nothing; ours")
    power: float = Field(1.0, gt=0, description="p of target_band; ours")
    side: Literal["both", "over", "under"] = Field("both", description="which side of L target_band punishes")
    scale: float = Field(5.0, description="s of salmon_bonus")
    cap: float = Field(0.8, gt=0, description="share of m from which salmon_bonus grows no more")
    alpha: float = Field(1.0, ge=0, description="α of linear")

    @model_validator(mode="after")
    def _has_its_bound(self) -> LengthConfig:
        if self.form in ("overlong_soft", "salmon_bonus", "linear") and self.maximum is None:
            raise ValueError(f"form {self.form} needs `maximum`")
        if self.maximum is not None and self.buffer > self.maximum:
            raise ValueError(f"buffer {self.buffer} is more than maximum {self.maximum}")
        target = self.target
        if self.form == "target_band" and (
            target is None or (isinstance(target, str) and target != "median" and not target.startswith("column:"))
        ):
            raise ValueError("form target_band needs `target`: a number, 'column:NAME' or 'median'")
        if isinstance(target, float) and target <= 0:
            raise ValueError(f"target {target:g} is not above 0")
        return self


@register.reward("length")
class Length:
    """How long a completion is: a baseline beside another reward, or a price. A price alone shortens to nothing."""

    config_type: ClassVar[type[Config]] = LengthConfig

    def __init__(self, config: LengthConfig) -> None:
        self.config = config
        target = config.target
        self._column = target.removeprefix("column:") if isinstance(target, str) and ":" in target else None
        self.requires: tuple[str, ...] = () if self._column is None else (self._column,)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; not valid where the column of targets has no number above 0."""
        del models
        lengths = self._lengths(rows)
        targets = self._targets(rows, lengths)
        return column_output(
            [
                None if target is None else length_score(length, target, self.config)
                for length, target in zip(lengths, targets, strict=True)
            ]
        )

    def _lengths(self, rows: RewardBatch) -> list[int]:
        if self.config.unit == "words":
            return [len(text.split()) for text in rows.completions]
        if self.config.unit == "characters":
            return [len(text) for text in rows.completions]
        if rows.completion_mask is None:
            raise RunFailed("reward 'length': unit tokens, and these completions come without tokens; use words")
        counts: list[int] = rows.completion_mask.sum(-1).tolist()
        return counts

    def _targets(self, rows: RewardBatch, lengths: Sequence[int]) -> list[float | None]:
        target = self.config.target
        if self._column is not None:
            values = rows.columns[self._column]
            return [float(value) if isinstance(value, (int, float)) and value > 0 else None for value in values]
        if target == "median":
            found: list[float | None] = [None] * len(lengths)
            for members in members_of_groups(rows):
                for row in members:
                    found[row] = max(float(median(lengths[i] for i in members)), 1.0)
            return found
        return [float(target) if target is not None else 1.0] * len(lengths)


def length_score(length: int, target: float, config: LengthConfig) -> float:
    """The score of a length n, with target L (read by target_band alone).

    count: n; linear: −α·n/m; salmon_bonus: s·min(n/m, cap), arXiv 2310.05910; overlong_soft: 0 up to m − c, then down
    to −1 at m and beyond, arXiv 2503.14476; target_band: −min(1, (max(0, abs(n − L) − tolerance·L)/L)^p), our reading
    of the penalty of arXiv 2510.05283, whose form is not published.
    """
    most = config.maximum or 1
    match config.form:
        case "count":
            return float(length)
        case "linear":
            return -config.alpha * length / most
        case "salmon_bonus":
            return config.scale * min(length / most, config.cap)
        case "overlong_soft":
            over = length - (most - config.buffer)
            return -1.0 if length > most else -over / config.buffer if over > 0 else 0.0
        case "target_band":
            gap = length - target
            if (config.side == "over" and gap < 0) or (config.side == "under" and gap > 0):
                return 0.0
            outside: float = max(0.0, abs(gap) - config.tolerance * target) / target
            return -min(1.0, float(outside**config.power))


class RepetitionConfig(Config):
    """Keys of `repetition`."""

    ngram: int = Field(3, ge=1, description="words of a phrase")
    penalty: float = Field(-1.0, le=0, description="the score of a text in which every phrase is the same")


@register.reward("repetition")
class Repetition:
    """A price on phrases that come again: penalty · (1 − distinct phrases / phrases); 0 where there are none."""

    config_type: ClassVar[type[Config]] = RepetitionConfig
    requires: tuple[str, ...] = ()

    def __init__(self, config: RepetitionConfig) -> None:
        self.config = config

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; always valid."""
        del models
        repeated = [1 - distinct_ratio(text, self.config.ngram) for text in rows.completions]
        return _valid_everywhere([self.config.penalty * share if share else 0.0 for share in repeated])


def distinct_ratio(text: str, ngram: int) -> float:
    """Distinct phrases of `ngram` lower-cased words / all of them; 1 for a text too short to have one."""
    words = text.lower().split()
    phrases = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return len(set(phrases)) / len(phrases) if phrases else 1.0


class ExactConfig(Config):
    """Keys of `exact`."""

    column: str = Field("answer", description="data column of the right answer")
    strip: bool = Field(True, description="ignore white space around, and how wide it is inside")
    casefold: bool = Field(True, description="ignore upper and lower case")
    punctuation: bool = Field(False, description="punctuation counts")


@register.reward("exact")
class Exact:
    """1 where the completion is the answer of the data, else 0."""

    config_type: ClassVar[type[Config]] = ExactConfig

    def __init__(self, config: ExactConfig) -> None:
        self.config = config
        self.requires: tuple[str, ...] = (config.column,)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """1 or 0 a completion; not valid where the data has no answer."""
        del models
        pairs = zip(rows.completions, rows.columns[self.config.column], strict=True)
        return column_output(
            [None if answer is None else float(self._plain(text) == self._plain(str(answer))) for text, answer in pairs]
        )

    def _plain(self, text: str) -> str:
        text = text if self.config.punctuation else text.translate(PUNCTUATION)
        text = " ".join(text.split()) if self.config.strip else text
        return text.casefold() if self.config.casefold else text


class RegexConfig(Config):
    """Keys of `regex`."""

    pattern: str | None = Field(None, description="a regular expression; null = each row's own, from `column`")
    column: str = Field("pattern", description="data column of the expression, where `pattern` is null")
    mode: Literal["fullmatch", "search"] = Field("search", description="whether it must match the whole completion")
    ignore_case: bool = False
    dotall: bool = Field(False, description="a dot matches line breaks too")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            _compile(value, 0)
        return value


@register.reward("regex")
class Regex:
    """1 where a regular expression matches, else 0."""

    config_type: ClassVar[type[Config]] = RegexConfig

    def __init__(self, config: RegexConfig) -> None:
        self.config = config
        self.requires: tuple[str, ...] = () if config.pattern is not None else (config.column,)
        self._flags = (re.IGNORECASE if config.ignore_case else 0) | (re.DOTALL if config.dotall else 0)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """1 or 0 a completion; not valid where the data has no expression. Raises RunFailed for one that is none."""
        del models
        own = [self.config.pattern] * len(rows.completions)
        patterns = own if self.config.pattern is not None else rows.columns[self.config.column]
        return column_output(
            [self._matches(pattern, text) for pattern, text in zip(patterns, rows.completions, strict=True)]
        )

    def _matches(self, pattern: Any, text: str) -> float | None:
        if pattern is None:
            return None
        try:
            compiled = _compile(str(pattern), self._flags)
        except ValueError as error:
            raise RunFailed(f"reward 'regex': column {self.config.column!r}: {error}") from None
        found = compiled.fullmatch(text) if self.config.mode == "fullmatch" else compiled.search(text)
        return float(found is not None)


def _compile(pattern: str, flags: int) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


class ChoiceConfig(Config):
    """Keys of `choice`."""

    column: str = Field("answer", description="data column of the right letter")
    letters: str = Field("ABCDE", pattern="^[A-Z]+$", description="the letters there are to choose from")


@register.reward("choice")
class Choice:
    """1 where the last letter that a completion chooses is the right one, else 0."""

    config_type: ClassVar[type[Config]] = ChoiceConfig

    def __init__(self, config: ChoiceConfig) -> None:
        self.config = config
        self.requires: tuple[str, ...] = (config.column,)

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """1 or 0 a completion; not valid where the data has no letter."""
        del models
        right = [
            None if answer is None else chosen_letter(str(answer), self.config.letters)
            for answer in rows.columns[self.config.column]
        ]
        given = [chosen_letter(after_thinking(text), self.config.letters) for text in rows.completions]
        return column_output([None if a is None else float(a == b) for a, b in zip(right, given, strict=True)])


def chosen_letter(text: str, letters: str) -> str | None:
    """The last of `(B)`, `B.`, `B)`, `answer: B`, `the answer is B` or a text that is only B; None without any."""
    letter = f"([{letters}])"
    forms = (
        rf"\({letter}\)",
        rf"(?i:\b(?:answer|choice|option)\b(?:\s+is)?)\s*:?\s*\(?{letter}\b",
        rf"(?<![\w']){letter}(?=[.):](?:\s|$))",
        rf"\A\s*{letter}\s*\Z",
    )
    found = [(match.start(1), match[1]) for form in forms for match in re.finditer(form, text)]
    return max(found)[1] if found else None


def after_thinking(text: str) -> str:
    """What stands behind the last closing think tag; the whole text without one."""
    return text.rpartition("</think>")[2]


class FormatTagsConfig(Config):
    """Keys of `format_tags`."""

    tags: list[str] = Field(["think", "answer"], min_length=1, description="names of the tags, in their order")
    gradual: bool = Field(False, description="the share of conditions met, in place of all or nothing")


@register.reward("format_tags")
class FormatTags:
    """1 where each tag opens and closes once, in order, with text inside and none before the first, else 0.

    Keep its weight small (0.1): above about 0.2 it is what gets learnt.
    """

    config_type: ClassVar[type[Config]] = FormatTagsConfig
    requires: tuple[str, ...] = ()

    def __init__(self, config: FormatTagsConfig) -> None:
        self.config = config

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score in 0 … 1 a completion; always valid."""
        del models
        found = [tag_conditions(text, self.config.tags) for text in rows.completions]
        if self.config.gradual:
            return _valid_everywhere([sum(met) / len(met) for met in found])
        return _valid_everywhere([float(all(met)) for met in found])


def tag_conditions(text: str, tags: Sequence[str]) -> list[bool]:
    """What a format asks for: each tag once, each with text inside, all in order, nothing before the first."""
    once = [text.count(f"<{tag}>") == 1 and text.count(f"</{tag}>") == 1 for tag in tags]
    spans = [(text.find(f"<{tag}>"), text.find(f"</{tag}>")) for tag in tags]
    places = [place for span in spans for place in span]
    in_order = -1 not in places and places == sorted(places)
    filled = [
        0 <= start < end and bool(text[start + len(tag) + 2 : end].strip())
        for tag, (start, end) in zip(tags, spans, strict=True)
    ]
    first = spans[0][0]
    return [*once, *filled, in_order, first >= 0 and not text[:first].strip()]


class FormatJsonConfig(Config):
    """Keys of `format_json`."""

    keys: list[str] = Field([], description="keys the object must have")


@register.reward("format_json")
class FormatJson:
    """1 where the completion is a JSON object with the keys asked for, else 0; what was thought before is left out."""

    config_type: ClassVar[type[Config]] = FormatJsonConfig
    requires: tuple[str, ...] = ()

    def __init__(self, config: FormatJsonConfig) -> None:
        self.config = config

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """1 or 0 a completion; always valid."""
        del models
        return _valid_everywhere([float(has_keys(after_thinking(text), self.config.keys)) for text in rows.completions])


def has_keys(text: str, keys: Sequence[str]) -> bool:
    """Whether a text is a JSON object with all of these keys."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # the second for brackets nested thousands deep
        return False
    return isinstance(found, dict) and all(key in found for key in keys)


def _valid_everywhere(scores: list[float]) -> RewardOutput:
    return RewardOutput(
        score=torch.tensor(scores, dtype=torch.float32), valid=torch.ones(len(scores), dtype=torch.bool)
    )
