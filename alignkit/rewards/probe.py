"""What cheap texts score beside real answers, before anything is trained: what they win, a policy will find.

Cheap is a text that needs no understanding of the prompt. All texts of a prompt are scored together, so that transforms
within a prompt see them side by side.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

from alignkit.core.config import CombineConfig
from alignkit.core.types import Completion, Group
from alignkit.rewards.maths import MathEqual
from alignkit.rewards.pipeline import Sources, reward_name, score_groups
from alignkit.rewards.programs import CodeTests
from alignkit.rewards.rules import Choice, FormatJson, FormatTags

Outcome = Literal["ahead", "level", "behind"]

COMBINED = "all rewards"
"""Beside the names of rewards; no function can be called that."""
REAL = "real answer"
REPEATED = "one word repeated"
FILLER = " As has been said before, all of this is so for the reasons that were given."
REFUSAL = "I'm sorry, but I can't help with that."
CANDIDATES = 64
"""Words among which the one to repeat is chosen: by what the rewards say of each of them alone."""
SHOWN = 48
"""Characters of an example."""


@dataclass(frozen=True)
class Versus:
    """Real answers beside a kind of text: their mean, and the shares of prompts where they are beaten, or equalled."""

    real: float
    ahead: float
    level: float


@dataclass(frozen=True)
class Standing:
    """What a kind of text scored on average, over the prompts on which it and the real answer have a score.

    `versus` is None where the data has no real answers; then it is over all prompts.
    """

    prompts: int
    mean: float
    versus: Versus | None

    @property
    def outcome(self) -> Outcome | None:
        """How it stands to the real answers on average; None without them."""
        if self.versus is None:
            return None
        if math.isclose(self.mean, self.versus.real, rel_tol=1e-6, abs_tol=1e-9):
            return "level"
        return "ahead" if self.mean > self.versus.real else "behind"


@dataclass(frozen=True)
class Probe:
    """What came out: by reward, and for all of them together, kind of text → how it stands.

    A kind that no prompt has, or that a reward has nothing to say of, is not there. `examples`: of the first prompt.
    """

    prompts: int
    answered: int
    standings: Mapping[str, Mapping[str, Standing]]
    examples: Mapping[str, str]

    def kinds(self, outcome: Outcome) -> list[str]:
        """The cheap texts whose combined reward stands so to that of the real answers, on average."""
        return [kind for kind, standing in self.standings[COMBINED].items() if standing.outcome == outcome]

    def to_json(self) -> dict[str, Any]:
        """Plain data, with `winners`: the kinds that beat the real answers."""
        return {**asdict(self), "winners": self.kinds("ahead"), "level": self.kinds("level")}

    def lines(self) -> list[str]:
        """A table for each reward, and what follows from that of all together."""
        found = [f"{self.prompts} prompts, {self.answered} of them with a real answer"]
        for name, standings in self.standings.items():
            found += ["", *_table(name, standings, self.examples if name == COMBINED else {})]
        return [*found, "", *self._conclusions()]

    def _conclusions(self) -> list[str]:
        combined = self.standings[COMBINED]
        if not self.answered:
            return ["nothing to compare with: the data has no real answers, so these are only scores"]
        if not combined:
            return ["nothing to compare with: the rewards have nothing to say of the real answers"]
        winners = [f"{kind} beats the real answers: {_told(combined[kind])}" for kind in self.kinds("ahead")]
        level = [f"{kind} scores as much as the real answers: {_told(combined[kind])}" for kind in self.kinds("level")]
        return [*(winners or ["no cheap text beats the real answers"]), *level]


def probe(
    groups: Sequence[Group], sources: Sources, combine: CombineConfig, encode: Callable[[str], list[int]]
) -> Probe:
    """Score cheap texts beside real answers.

    Args:
        groups: prompts, each with its real answer as the only completion, or with none.
        encode: text → the tokens of a completion, its stop token included.

    Raises: what `score_groups` raises.
    """
    word, shell = _best_word(groups, sources, combine, encode), format_shell(sources)
    texts = [_texts(group, other, word, shell) for group, other in zip(groups, _others(groups), strict=True)]
    filled = [
        replace(group, completions=[_completion(text, encode) for text in mine.values()])
        for group, mine in zip(groups, texts, strict=True)
    ]
    score_groups(filled, sources, 0, stop_ids=(), combine=combine)
    by_text = [dict(zip(mine, group.completions, strict=True)) for mine, group in zip(texts, filled, strict=True)]
    kinds = list(dict.fromkeys(kind for mine in texts for kind in mine if kind != REAL))
    answered = sum(REAL in mine for mine in texts)
    standings = {}
    for name in [COMBINED, *(reward_name(config) for config, _ in sources if len(sources) > 1)]:
        rows = [_scores(mine, name) for mine in by_text]
        rows = [row for row in rows if REAL in row or not answered]
        standings[name] = {kind: _stand(kind, found) for kind in kinds if (found := [r for r in rows if kind in r])}
    return Probe(len(groups), answered, standings, texts[0] if texts else {})


def format_shell(sources: Sources) -> str | None:
    """The emptiest text in the format that the rewards ask for; None where none of them names one."""
    body, tags = None, None
    for _, source in sources:
        match source:
            case FormatTags():
                tags = source.config.tags
            case FormatJson():
                body = json.dumps(dict.fromkeys(source.config.keys, ""))
            case Choice():
                body = f"The answer is {source.config.letters[0]}."
            case MathEqual():
                body = r"\boxed{}"
            case CodeTests():
                body = "```python\npass\n```"
    if tags is None:
        return body
    inside = [*(["..."] * (len(tags) - 1)), body or "..."]  # an empty tag would not even look right
    return "".join(f"<{tag}>{text}</{tag}>" for tag, text in zip(tags, inside, strict=True))


def _texts(group: Group, other: str | None, word: str, shell: str | None) -> dict[str, str]:
    """Kind → text for one prompt; the real answer first, where there is one."""
    answer = group.completions[0].text if group.completions else None
    length = len(answer.split()) if answer is not None else 32
    texts = {
        REAL: answer,
        "empty text": "",
        REPEATED: " ".join([word] * max(length, 8)),
        "prompt echo": group.messages[-1].get("content") or "" if group.messages else "",
        "padded answer": None if answer is None else answer + FILLER * math.ceil(len(answer) / len(FILLER)),
        "format only": shell,
        "refusal": REFUSAL,
        "answer to another prompt": other,
    }
    return {kind: text for kind, text in texts.items() if text is not None}


def _others(groups: Sequence[Group]) -> list[str | None]:
    """For each prompt the next answer that belongs to another prompt and is not its own; None where there is none."""
    found = []
    for position, group in enumerate(groups):
        own = [completion.text for completion in group.completions]
        others = [other for other in (*groups[position + 1 :], *groups[:position]) if other.messages != group.messages]
        answers = (completion.text for other in others for completion in other.completions)
        found.append(next((text for text in answers if text not in own), None))
    return found


def _best_word(
    groups: Sequence[Group], sources: Sources, combine: CombineConfig, encode: Callable[[str], list[int]]
) -> str:
    """The word of the real answers (of the prompts, where there are none) that the rewards like best by itself."""
    texts = [group.completions[0].text for group in groups if group.completions]
    texts = texts or [message.get("content") or "" for group in groups for message in group.messages]
    words = [word for word, _ in Counter(re.findall(r"[^\W\d_]+", " ".join(texts))).most_common(CANDIDATES)]
    if not words:
        return "the"
    trial = replace(groups[0], completions=[_completion(word, encode) for word in words])
    score_groups([trial], sources, 0, stop_ids=(), combine=combine)
    rewards = [c.reward if math.isfinite(c.reward) else -math.inf for c in trial.completions]
    best: str = words[rewards.index(max(rewards))]
    return best


def _completion(text: str, encode: Callable[[str], list[int]]) -> Completion:
    return Completion(text=text, tokens=encode(text), ended=True)


def _scores(texts: Mapping[str, Completion], name: str) -> dict[str, float]:
    """What a reward, or all of them together, said of the texts of a prompt; without those of which it said nothing."""
    if name == COMBINED:
        return {kind: c.reward for kind, c in texts.items() if math.isfinite(c.reward)}
    return {kind: c.scores[name].value for kind, c in texts.items() if c.scores[name].valid}


def _stand(kind: str, rows: Sequence[Mapping[str, float]]) -> Standing:
    """How a kind of text stands, by the scores of prompts that all have one of it, and all or none of a real answer."""
    mean = fmean(row[kind] for row in rows)
    if REAL not in rows[0]:
        return Standing(len(rows), mean, None)
    ahead = sum(row[kind] > row[REAL] for row in rows) / len(rows)
    level = sum(row[kind] == row[REAL] for row in rows) / len(rows)
    return Standing(len(rows), mean, Versus(fmean(row[REAL] for row in rows), ahead, level))


def _table(name: str, standings: Mapping[str, Standing], examples: Mapping[str, str]) -> list[str]:
    lines = [f"{name:<26}{'mean':>10}{'real':>10}{'ahead':>8}{'level':>8}"]
    for kind, standing in standings.items():
        versus = standing.versus
        beside = (
            f"{versus.real:>10.4g}{_percent(versus.ahead):>8}{_percent(versus.level):>8}" if versus is not None else ""
        )
        text = json.dumps(examples[kind], ensure_ascii=False) if kind in examples else ""
        text = text if len(text) <= SHOWN else text[: SHOWN - 2] + '…"'
        lines.append(f"  {kind:<24}{standing.mean:>10.4g}{beside}  {text}".rstrip())
    return lines


def _told(standing: Standing) -> str:
    assert standing.versus is not None, "it stands ahead of or level with real answers"
    means = f"{standing.mean:.4g} against {standing.versus.real:.4g} on average"
    ahead, level = _percent(standing.versus.ahead), _percent(standing.versus.level)
    return f"{means}, ahead on {ahead} and level on {level} of {standing.prompts} prompts"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
