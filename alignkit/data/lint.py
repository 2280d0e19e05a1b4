"""What is worth knowing of a data set before training on it: duplicates, contradictions, truncation, biases, leaks."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkit.core.types import Message
from alignkit.data.config import DataConfig
from alignkit.data.groups import CHUNK, fit
from alignkit.data.render import Rendered, Renderer
from alignkit.data.report import DROPPED, Tally
from alignkit.data.shapes import BadRow, Example, Text, choose_format, to_example
from alignkit.data.sources import Table, read_rows

CHECKS = {
    "unusable rows": "rows a run would drop",
    "duplicate rows": "an earlier row has the same prompt and the same answers",
    "duplicate prompts": "an earlier row has the same prompt",
    "near-duplicate prompts": "most of their words in a row are those of an earlier prompt",
    "contradictions": "another row judges the same answers the other way round",
    "scores against order": "the rejected answer has no lower score than the chosen one",
    "truncated prompts": "they lose their beginning to fit train.max_length",
    "overlong answers": "they do not fit train.max_length, and the row is dropped",
    "lost stop tokens": "they do not fit train.max_length, and lose their end and stop token",
    "label imbalance": "one label is much rarer than the other",
    "length bias": "length tells good answers from bad ones",
    "overlap with evaluation": "the prompt, or one near it, is in the evaluation set",
}
"""What is looked for, in the order of the report."""

RARE_LABEL = 0.2
"""A smaller share of one label is an imbalance."""
NEAR = 0.8
"""Jaccard similarity of word triples from which on two prompts are near."""
EFFECTS = ((0.2, "negligible"), (0.5, "small"), (0.8, "medium"), (math.inf, "large"))
"""Cohen's words for |d| below a bound; from medium on it is a warning."""
SINGLE_ANSWER = ("unpaired", "prompt_completion", "stepwise", "messages", "text")
"""Shapes in which rows share a prompt, or have none, as a matter of course."""


@dataclass(slots=True)
class Finding:
    """The result of one of `CHECKS`: how many of how many, `warning` or not, and what to say and show."""

    check: str
    count: int
    total: int
    warning: bool
    verdict: str
    examples: list[str] = field(default_factory=list)
    numbers: dict[str, float | None] = field(default_factory=dict)


@dataclass(slots=True)
class LintReport:
    """The findings on one data entry. Lengths are in `unit`s: tokens, or characters where no tokenizer was given."""

    path: str
    format: str
    layout: str | None
    rows: int
    unit: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def warnings(self) -> list[Finding]:
        """The findings that call for a look."""
        return [finding for finding in self.findings if finding.warning]

    def lines(self) -> list[str]:
        """The report for a console."""
        layout = f" from {self.layout}" if self.layout else ""
        count = len(self.warnings)
        warnings = f"{count} warning{'' if count == 1 else 's'}"
        lines = [f"{self.path}: {self.rows} rows as {self.format}{layout}, {warnings}"]
        for finding in self.findings:
            lines.append(f"  {'warning' if finding.warning else 'ok':<8} {finding.check:<24} {finding.verdict}")
            if finding.examples:
                more = "; …" if finding.count > len(finding.examples) else ""
                lines.append(f"           {'; '.join(finding.examples)}{more}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The report as plain numbers, strings and lists."""
        return {
            "path": self.path,
            "format": self.format,
            "layout": self.layout,
            "rows": self.rows,
            "unit": self.unit,
            "findings": [
                {
                    "check": finding.check,
                    "warning": finding.warning,
                    "count": finding.count,
                    "of": finding.total,
                    "verdict": finding.verdict,
                    "examples": finding.examples,
                    **finding.numbers,
                }
                for finding in self.findings
            ],
        }


@dataclass(slots=True)
class _Row:
    """A usable row: where it is, its prompt as plain text, its answers, and how long each answer is."""

    where: str
    prompt: str
    example: Example
    rendered: Rendered | None = None

    @property
    def answers(self) -> list[str]:
        return [_plain(answer) for answer in self.example.completions]

    @property
    def lengths(self) -> list[int]:
        if self.rendered is not None:
            return [len(tokens) for tokens in self.rendered.completions]
        return [len(_spoken(answer)) for answer in self.example.completions]


def lint(
    config: DataConfig,
    held_out: Sequence[DataConfig] = (),
    renderer: Renderer | None = None,
    max_length: int | None = None,
) -> LintReport:
    """Look at the rows of one data entry, as they are before any operation.

    `held_out`: the evaluation set. Without `renderer` nothing is tokenised: lengths are characters, and nothing can be
    said of truncation; nor without `max_length`.

    Raises: DataError when the source is missing or its columns do not fit.
    """
    table = read_rows(config)
    shape = choose_format(config.format, table.columns, config.path)
    report = LintReport(
        config.path, shape, table.layout, len(table.rows), "characters" if renderer is None else "tokens"
    )
    unusable: dict[str, Tally] = {}
    rows = _usable(table, shape, renderer, unusable)
    report.findings.append(_unusable(unusable, len(table.rows)))
    report.findings += [finding for check in _checks(shape) for finding in check(rows)]
    if renderer is not None and max_length is not None:
        report.findings += _truncation(rows, renderer, max_length, config)
    if shape == "unpaired":
        report.findings.append(_imbalance(rows))
    report.findings += _length_bias(rows, shape, report.unit)
    if held_out:
        report.findings.append(_overlap(rows, held_out))
    return report


def _checks(shape: str) -> list[Callable[[Sequence[_Row]], list[Finding]]]:
    checks: list[Callable[[Sequence[_Row]], list[Finding]]] = [_duplicate_rows]
    if shape not in SINGLE_ANSWER:
        checks.append(_duplicate_prompts)
    if shape != "text":
        checks.append(_near_duplicates)
    if shape in ("preference", "unpaired"):
        checks.append(_contradictions)
    if shape == "preference":
        checks.append(_scores_against_order)
    return checks


def _usable(table: Table, shape: str, renderer: Renderer | None, unusable: dict[str, Tally]) -> list[_Row]:
    """The rows that can be used, rendered if there is a renderer; every other one is counted."""
    rows: list[_Row] = []
    for i, columns in enumerate(table.rows):
        try:
            if i in table.faults:
                raise table.faults[i]
            example = to_example(columns, shape)
            rows.append(_Row(table.where(i), _plain(example.prompt), example))
        except BadRow as bad:
            unusable.setdefault(bad.reason, Tally()).add(f"{table.where(i)}{f': {bad.note}' if bad.note else ''}")
    if renderer is None:
        return rows
    kept = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for row, rendered in zip(chunk, renderer.render([row.example for row in chunk]), strict=True):
            if isinstance(rendered, BadRow):
                unusable.setdefault(rendered.reason, Tally()).add(row.where)
                continue
            row.rendered = rendered
            kept.append(row)
    return kept


def _plain(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in text)


def _spoken(answer: Text) -> str:
    """What the assistant says in an answer."""
    if isinstance(answer, str):
        return answer
    return "\n".join(_content(message) for message in answer if message["role"] == "assistant")


def _content(message: Message) -> str:
    return message.get("content") or ""


def _unusable(unusable: Mapping[str, Tally], total: int) -> Finding:
    count = sum(tally.count for tally in unusable.values())
    reasons = "; ".join(f"{tally.count} {reason}: {DROPPED[reason]}" for reason, tally in unusable.items())
    examples = [example for tally in unusable.values() for example in tally.examples]
    return Finding("unusable rows", count, total, count > 0, _share(count, total, reasons), examples)


def _share(count: int, total: int, note: str = "") -> str:
    if not count:
        return "none"
    return f"{count} of {total} ({100 * count / total:.1f} %)" + (f": {note}" if note else "")


def _finding(check: str, tally: Tally, total: int) -> Finding:
    verdict = _share(tally.count, total, CHECKS[check])
    return Finding(check, tally.count, total, tally.count > 0, verdict, tally.examples)


def _duplicate_rows(rows: Sequence[_Row]) -> list[Finding]:
    return [_repeated("duplicate rows", rows, lambda row: (row.prompt, *row.answers))]


def _duplicate_prompts(rows: Sequence[_Row]) -> list[Finding]:
    return [_repeated("duplicate prompts", rows, lambda row: row.prompt)]


def _repeated(check: str, rows: Sequence[_Row], key: Callable[[_Row], Any]) -> Finding:
    first: dict[Any, str] = {}
    tally = Tally()
    for row in rows:
        before = first.setdefault(key(row), row.where)
        if before is not row.where:
            tally.add(f"{row.where} as {before}")
    return _finding(check, tally, len(rows))


def _near_duplicates(rows: Sequence[_Row]) -> list[Finding]:
    """Prompts near an earlier one; exact copies are another check's."""
    index, seen, tally = Neighbours(), set[str](), Tally()
    for row in rows:
        if row.prompt in seen:
            continue
        seen.add(row.prompt)
        before = index.find(row.prompt)
        if before is None:
            index.add(row.prompt, row.where)
        else:
            tally.add(f"{row.where} near {before}")
    return [_finding("near-duplicate prompts", tally, len(rows))]


def _contradictions(rows: Sequence[_Row]) -> list[Finding]:
    """(a, b) here and (b, a) there, or one answer labelled true here and false there."""
    first: dict[Any, str] = {}
    tally = Tally()
    for row in rows:
        judged = (row.prompt, *row.answers, *([row.example.rewards[0]] if len(row.answers) == 1 else []))
        first.setdefault(judged, row.where)
        other = (
            (row.prompt, *row.answers[::-1]) if len(row.answers) > 1 else (*judged[:-1], 1.0 - row.example.rewards[0])
        )
        if other in first:
            tally.add(f"{row.where} against {first[other]}")
    return [_finding("contradictions", tally, len(rows))]


def _scores_against_order(rows: Sequence[_Row]) -> list[Finding]:
    tally, total = Tally(), 0
    for row in rows:
        chosen, rejected = (scores.get("score") for scores in row.example.scores)
        if chosen is None or rejected is None:
            continue
        total += 1
        if chosen <= rejected:
            tally.add(f"{row.where}: {chosen:g} and {rejected:g}")
    return [_finding("scores against order", tally, total)] if total else []


def _truncation(rows: Sequence[_Row], renderer: Renderer, max_length: int, config: DataConfig) -> Iterator[Finding]:
    tallies = {"truncated prompts": Tally(), "overlong answers": Tally(), "lost stop tokens": Tally()}
    names = {"prompt cut": "truncated prompts", "completion cut": "lost stop tokens"}
    for row in rows:
        assert row.rendered is not None
        whole = row.rendered
        rendered = Rendered(list(whole.prompt), list(whole.completions), list(whole.trained))
        try:
            changes = fit(rendered, renderer.bos_id, max_length, config.overlong)
        except BadRow as bad:
            if bad.reason == "overlong":
                tallies["overlong answers"].add(f"{row.where}: {bad.note}")
            continue
        for change in changes:
            if change in names:
                tallies[names[change]].add(row.where)
    for check, tally in tallies.items():
        yield _finding(check, tally, len(rows))


def _imbalance(rows: Sequence[_Row]) -> Finding:
    good = sum(row.example.rewards[0] > 0 for row in rows)
    share = good / len(rows) if rows else 0.0
    warning = min(share, 1 - share) < RARE_LABEL
    verdict = f"{good} true, {len(rows) - good} false ({100 * share:.1f} % true)"
    if warning:
        verdict += f": {CHECKS['label imbalance']}; weigh the two, or add rows of the rarer one"
    return Finding("label imbalance", good, len(rows), warning, verdict, numbers={"share_true": share})


def _length_bias(rows: Sequence[_Row], shape: str, unit: str) -> Iterator[Finding]:
    """Lengths of good against bad answers: chosen and rejected, best and worst, labelled true and false."""
    if shape in ("preference", "ranked"):
        pairs = [pair for row in rows if (pair := _best_and_worst(row)) is not None]
        good, bad = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        longer = sum(a > b for a, b in pairs) + 0.5 * sum(a == b for a, b in pairs)
        wins = longer / len(pairs) if pairs else None
    elif shape == "unpaired":
        good = [row.lengths[0] for row in rows if row.example.rewards[0] > 0]
        bad = [row.lengths[0] for row in rows if row.example.rewards[0] <= 0]
        wins = None
    else:
        return
    if len(good) < 2 or len(bad) < 2:
        return
    d = cohens_d(good, bad)
    size = next(word for bound, word in EFFECTS if abs(d) < bound or bound == math.inf)
    warning = abs(d) >= EFFECTS[1][0]
    verdict = f"d = {d:.2f}, {size}: good answers have {fmean(good):.0f} {unit}, bad ones {fmean(bad):.0f}"
    if wins is not None:
        verdict += f"; the longer one wins {100 * wins:.0f} %"
    if warning:
        verdict += f". {CHECKS['length bias'].capitalize()}, and a model may learn little else"
    numbers = {"cohens_d": d if math.isfinite(d) else None, "longer_wins": wins}
    yield Finding("length bias", len(good), len(rows), warning, verdict, numbers=numbers)


def _best_and_worst(row: _Row) -> tuple[int, int] | None:
    """Lengths of the best and the worst answer; None when they are equally good."""
    rewards = row.example.rewards
    best, worst = max(rewards), min(rewards)
    return None if best == worst else (row.lengths[rewards.index(best)], row.lengths[rewards.index(worst)])


def cohens_d(first: Sequence[float], second: Sequence[float]) -> float:
    """(mean of first − mean of second) / pooled standard deviation; at least two numbers each."""
    difference = fmean(first) - fmean(second)
    freedom = len(first) + len(second) - 2
    pooled = ((len(first) - 1) * variance(first) + (len(second) - 1) * variance(second)) / freedom
    if pooled == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(pooled)


def _overlap(rows: Sequence[_Row], held_out: Sequence[DataConfig]) -> Finding:
    index, exact = Neighbours(), dict[str, str]()
    for config in held_out:
        table = read_rows(config)
        shape = choose_format(config.format, table.columns, config.path)
        for row in _usable(table, shape, None, {}):
            if exact.setdefault(row.prompt, f"{config.path} {row.where}") and index.find(row.prompt) is None:
                index.add(row.prompt, exact[row.prompt])
    tally = Tally()
    for row in rows:
        found = exact.get(row.prompt)
        near = None if found is not None else index.find(row.prompt)
        if found is not None or near is not None:
            tally.add(f"{row.where} {'as' if found is not None else 'near'} {found or near}")
    return _finding("overlap with evaluation", tally, len(rows))


class Neighbours:
    """Texts by likeness: MinHash signatures (Broder 1997) in bands, then the Jaccard similarity itself.

    With 8 bands of 4 a text of similarity 0.8 is met with probability 1 − (1 − 0.8⁴)⁸ = 0.985, one of 0.4 with 0.19.
    """

    BANDS, DEPTH = 8, 4

    def __init__(self) -> None:
        # fixed multipliers: the same texts are found in every process
        numbers = np.random.default_rng(0).integers(1, 2**61, size=(2, self.BANDS * self.DEPTH), dtype=np.uint64)
        self._factor, self._shift = numbers[0] | np.uint64(1), numbers[1]
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        self._texts: list[tuple[NDArray[np.uint64], str]] = []

    def add(self, text: str, where: str) -> None:
        """Keep a text under the name that `find` returns."""
        triples = _triples(text)
        for key in self._keys(triples):
            self._buckets.setdefault(key, []).append(len(self._texts))
        self._texts.append((triples, where))

    def find(self, text: str) -> str | None:
        """The name of the first text kept whose similarity is at least `NEAR`."""
        triples = _triples(text)
        met = sorted({number for key in self._keys(triples) for number in self._buckets.get(key, ())})
        for number in met:
            kept, where = self._texts[number]
            common = np.intersect1d(triples, kept, assume_unique=True).size
            if common >= NEAR * (triples.size + kept.size - common):
                return where
        return None

    def _keys(self, triples: NDArray[np.uint64]) -> Iterator[tuple[int, bytes]]:
        hashed = triples[:, None] * self._factor + self._shift  # modulo 2⁶⁴
        signature = (hashed >> np.uint64(20)).min(0).reshape(self.BANDS, self.DEPTH)
        return ((band, row.tobytes()) for band, row in enumerate(signature))


def _triples(text: str) -> NDArray[np.uint64]:
    """Hashes of every three words in a row, capitals and punctuation aside; the words themselves of a shorter text."""
    words = re.findall(r"\w+", text.casefold()) or [text]
    size = min(3, len(words))
    found = {zlib.crc32(" ".join(words[i : i + size]).encode()) for i in range(len(words) - size + 1)}
    return np.array(sorted(found), dtype=np.uint64)
