"""What is said to judges, and what is read from their answers. Pure text, standard library only.

Text that somebody else wrote, a prompt or a completion, stands between fences, `<<answer>>` … `<<end of answer>>`, and
goes through `quotable` last, so that it can neither end its quotation nor begin another. No parser raises, whatever
the text: what cannot be read is None.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from alignkit.core.errors import RecipeError
from alignkit.core.types import Message

SLOT = re.compile(r"\{([a-z_]+)\}")
FENCE = re.compile(r"<<\s*(?:end\s+of\s+)?(?:question|answer)(?:\s*\d+)?\s*>>", re.IGNORECASE)
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
NUMBER = r"-?\d+(?:\.\d+)?"
SCORE = re.compile(rf"\bscore\b[\s*_]*:[\s*_]*({NUMBER})", re.IGNORECASE)
SCORES = re.compile(rf"\bscores\b[\s*_]*:[\s*_\[]*({NUMBER}(?:\s*,\s*{NUMBER})*)", re.IGNORECASE)
NOT_A_RATING = re.compile(r"(?:/|\bout\s+of\b)\s*\d+(?:\.\d+)?|\b\d+\s*(?:[-–—]|\bto\b)\s*\d+\b", re.IGNORECASE)
"""The 10 of 8/10 and 8 out of 10, and scales such as 1-10."""
MOST_LISTS = 64
"""How many opening brackets are tried, from the end, for a list: a text of nothing else must not take for ever."""


@dataclass(frozen=True)
class Template:
    """A text with `{slots}`. `name` is for messages."""

    name: str
    text: str

    @property
    def slots(self) -> frozenset[str]:
        """Names of its slots."""
        return frozenset(SLOT.findall(self.text))

    @property
    def digest(self) -> str:
        """Tells it from templates of another wording."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, texts: Mapping[str, str]) -> str:
        """The text with every slot replaced, in one pass: what was put in is not read again, whatever braces it has."""
        return SLOT.sub(lambda match: texts[match[1]], self.text)


def read_template(name: str, required: Sequence[str], optional: Sequence[str] = ()) -> Template:
    """A template shipped with alignkit, by its name, or a file of the user's, by a path that ends in .txt.

    Raises:
        RecipeError: there is none, it lacks a required slot, or has one that nothing will fill.
    """
    shipped = resources.files("alignkit.rewards").joinpath("templates")
    file = Path(name).expanduser() if name.endswith(".txt") else shipped.joinpath(f"{name}.txt")
    if not file.is_file():
        known = ", ".join(sorted(each.name.removesuffix(".txt") for each in shipped.iterdir()))
        raise RecipeError(
            f"there is no template {name!r} (looked in {Path.cwd()} for a path, among alignkit's own for a name); "
            f"expected {known}, or the path of a file that ends in .txt"
        )
    template = Template(name, file.read_text(encoding="utf-8").rstrip("\n"))
    slots = f"its slots here are {', '.join([*required, *optional])}, each in braces"
    if unknown := sorted(template.slots - {*required, *optional}):
        raise RecipeError(f"template {name!r} has the slot {unknown[0]!r}, which nothing fills; {slots}")
    if missing := sorted(set(required) - template.slots):
        raise RecipeError(f"template {name!r} lacks the slot {missing[0]!r}, which it must have; {slots}")
    return template


def quotable(text: str) -> str:
    """Somebody's text as it may stand between fences: fences of its own are left out."""
    while FENCE.search(text):  # again: taking out an inner fence may close the halves of an outer one
        text = FENCE.sub("", text)
    return text


def conversation(messages: Sequence[Message]) -> str:
    """The turns of a prompt as one text: a lone one as it is, several each behind its role."""
    if len(messages) == 1:
        return messages[0].get("content", "")
    return "\n".join(f"{turn.get('role', 'user')}: {turn.get('content', '')}" for turn in messages)


def listed(answers: Sequence[str]) -> str:
    """Answers between fences numbered from 1."""
    return "\n".join(
        f"<<answer {number}>>\n{quotable(answer)}\n<<end of answer {number}>>"
        for number, answer in enumerate(answers, start=1)
    )


def strip_thinking(text: str) -> str:
    """The text without `<think>…</think>`, and without what a lone tag leaves open before or behind it."""
    return THOUGHT.sub("", text).rpartition("</think>")[2].partition("<think>")[0].strip()


def last_number(text: str, low: float, high: float) -> float | None:
    """The last number in low … high; the 10 of `8/10` and of `on a scale of 1-10` is none."""
    plain = NOT_A_RATING.sub(" ", text)
    found = [float(number) for number in re.findall(rf"(?<![\w.])({NUMBER})(?!\w)", plain)]
    return next((number for number in reversed(found) if low <= number <= high), None)


def score_line(text: str, low: float, high: float) -> float | None:
    """n of the last `Score: n`; None where that one is outside low … high."""
    found = _within([float(number) for number in SCORE.findall(text)[-1:]], low, high)
    return found[0] if found else None


def scores_line(text: str, count: int, low: float, high: float) -> list[float] | None:
    """The numbers of the last `scores: s1, …, sN`; None unless there are `count`, each in low … high."""
    found = SCORES.findall(text)
    scores = [float(number) for number in found[-1].split(",")] if found else []
    return _within(scores, low, high) if len(scores) == count else None


def json_scores(text: str, count: int, low: float, high: float) -> list[float] | None:
    """The last JSON list of `count` numbers, each in low … high."""
    starts = [match.start() for match in re.finditer(r"\[", text)][-MOST_LISTS:]
    for start in reversed(starts):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):  # the second for brackets nested thousands deep
            continue
        if len(found) == count and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in found):
            return _within(found, low, high)
    return None


def verdict(text: str, labels: Sequence[str]) -> int | None:
    """Which label the text decides for; None where it names none, or several without a verdict.

    It decides by `[[LABEL]]`, else by `verdict: LABEL` (also winner, answer or choice, with `:` or `is`), else by
    `LABEL is better`, the last one of these, else by naming no other label. Case counts where a label is one letter
    only: `a` is a word.
    """
    same = (lambda word: word) if min(map(len, labels)) == 1 else str.lower
    places = {same(label): place for place, label in enumerate(labels)}
    word = rf"(?<!\w)({'|'.join(map(re.escape, sorted(labels, key=len, reverse=True)))})(?!\w)"
    for pattern in (
        rf"\[\[\s*{word}\s*\]\]",
        rf"\b(?i:verdict|winner|answer|choice)\b[\s*_]*(?::|\bis\b)[\s*_\"'(]*(?i:answer\s+)?{word}",
        rf"{word}\s+(?i:is|was)\s+(?i:the\s+|clearly\s+|slightly\s+|much\s+)*(?i:better)\b",
    ):
        found = re.findall(pattern, text, re.IGNORECASE if same is str.lower else 0)
        if found:
            return places[same(found[-1])]
    named = {places[same(each)] for each in re.findall(word, text, re.IGNORECASE if same is str.lower else 0)}
    return named.pop() if len(named) == 1 else None


def _within(numbers: Sequence[float], low: float, high: float) -> list[float] | None:
    """The numbers as floats, None where one is outside; comes before `float`, which no integer of 400 digits fits."""
    return [float(number) for number in numbers] if all(low <= number <= high for number in numbers) else None
