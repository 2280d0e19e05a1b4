"""Rewards that are a rule on the text: no model, no network, the same number every time."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import RecipeError
from alignkit.core.lazy import torch
from alignkit.core.registry import register
from alignkit.core.types import RewardBatch, RewardOutput

WORD = re.compile(r"[a-z']+")


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

    unit: Literal["words", "characters"] = Field("words", description="what is counted; words are split at white space")


@register.reward("length")
class Length:
    """How long a completion is. Useful as a baseline beside another reward, and with a negative weight as a price."""

    config_type: ClassVar[type[Config]] = LengthConfig
    requires: tuple[str, ...] = ()

    def __init__(self, config: LengthConfig) -> None:
        self.unit = config.unit

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One count a completion; always valid."""
        del models
        counts = [len(text.split()) if self.unit == "words" else len(text) for text in rows.completions]
        return _valid_everywhere([float(count) for count in counts])


def _valid_everywhere(scores: list[float]) -> RewardOutput:
    return RewardOutput(
        score=torch.tensor(scores, dtype=torch.float32), valid=torch.ones(len(scores), dtype=torch.bool)
    )
