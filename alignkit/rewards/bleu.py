"""Likeness to reference texts as a reward: BLEU. Source: BLEUBERI, arXiv 2505.11080.

Sentence BLEU-4 with add-one smoothing of every order and a brevity penalty against the *shortest* reference. The
n-grams are counted by sacrebleu, whose own smoothing (from the second order on) and penalty (closest length) differ.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import RunFailed
from alignkit.core.registry import register
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.extras import need
from alignkit.rewards.functions import column_output


class BleuConfig(Config):
    """Keys of `bleu`."""

    references: str = Field("references", description="data column of a reference text, or of a list of them")
    max_order: int = Field(4, ge=1, description="longest n-gram")
    smooth: bool = Field(True, description="add 1 to matches and totals of every order")
    tokenize: str = Field("13a", description="sacrebleu's tokenizer: 13a, none (white space), char, intl, zh, …")


@register.reward("bleu")
class Bleu:
    """How much of a completion stands in the references, 0 … 1; of `<answer>…</answer>` where there is one."""

    config_type: ClassVar[type[Config]] = BleuConfig

    def __init__(self, config: BleuConfig) -> None:
        need("sacrebleu", "sacrebleu", "bleu")
        self.config = config
        self.requires: tuple[str, ...] = (config.references,)
        self._metric: Any = None

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; not valid where the data has no reference. Raises RunFailed where it is no text."""
        del models
        if self._metric is None:
            self._metric = counter(self.config.tokenize, self.config.max_order)
        found: list[float | None] = []
        for row, (text, given) in enumerate(zip(rows.completions, rows.columns[self.config.references], strict=True)):
            references = [given] if isinstance(given, str) else given or []
            if not all(isinstance(reference, str) for reference in references):
                raise RunFailed(
                    f"reward 'bleu': column {self.config.references!r} of row {row} is {str(given)[:60]!r}; expected "
                    "a text or a list of texts"
                )
            answer = _answer(text)
            found.append(sentence_bleu(self._metric, answer, references, self.config.smooth) if references else None)
        return column_output(found)


def counter(tokenize: str, max_order: int) -> Any:
    """sacrebleu's BLEU, as what counts n-grams."""
    bleu = importlib.import_module("sacrebleu.metrics").BLEU
    # effective_order changes its own score alone, which is not read; without it every sentence is warned about
    return bleu(tokenize=tokenize, smooth_method="none", max_ngram_order=max_order, effective_order=True, force=True)


def sentence_bleu(metric: Any, text: str, references: Sequence[str], smooth: bool) -> float:
    """BP · exp(mean log p_n), p_n = (matches + 1)/(n-grams + 1); 0 for an empty text. Source: arXiv 2505.11080."""
    if not text.strip():
        return 0.0
    counted = metric.sentence_score(text, list(references))
    added = 1 if smooth else 0
    if not smooth and not all(counted.counts):
        return 0.0
    precisions = [(c + added) / (t + added) for c, t in zip(counted.counts, counted.totals, strict=True)]
    shortest = min(len(metric.tokenizer(reference.rstrip()).split()) for reference in references)
    length = counted.sys_len
    penalty = 1.0 if length > shortest else math.exp(1 - shortest / length) if length else 0.0
    return float(penalty * math.exp(sum(map(math.log, precisions)) / len(precisions)))


def _answer(text: str) -> str:
    _, opening, rest = text.rpartition("<answer>")
    inside, closing, _ = rest.partition("</answer>")
    return inside if opening and closing else text
