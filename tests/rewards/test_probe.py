"""Rewards that can be cheated are caught by the text that cheats them; sound ones pass."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from alignkit.core.config import CombineConfig
from alignkit.core.contracts import RewardSource
from alignkit.core.types import Completion, Group, Message
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.functions import FunctionReward
from alignkit.rewards.pipeline import build_sources
from alignkit.rewards.probe import FILLER, REAL, Probe, Standing, Versus, format_shell, probe

SUMS = [(a, b) for a in range(2, 8) for b in range(11, 14)]


def sums(answered: bool = True) -> list[Group]:
    """Prompts such as `What is 2 plus 11?`, with an answer that works it out."""
    return [
        Group(
            id=f"{a}+{b}",
            messages=[Message(role="user", content=f"What is {a} plus {b}?")],
            prompt=[1],
            completions=[Completion(text=written(a, b), tokens=[])] if answered else [],
            fields={"answer": str(a + b)},
            plain=True,
        )
        for a, b in SUMS
    ]


def written(a: int, b: int) -> str:
    return f"Happily, {a} and {b} make {a + b}: count {a} on from {b}. The answer is {a + b}."


def encode(text: str) -> list[int]:
    return [*map(ord, text), 0]


def probed(*functions: Callable[..., Any], groups: list[Group] | None = None, **configs: Any) -> Probe:
    """What the probe says of plain functions."""
    sources: list[tuple[RewardConfig, RewardSource]] = [
        (RewardConfig(name=f"here:{f.__name__}", **configs), FunctionReward(f, f.__name__)) for f in functions
    ]
    return probe(sums() if groups is None else groups, sources, CombineConfig(), encode)


def right(completions: list[str], answer: list[str]) -> list[float]:
    """Whether the last number is the right one."""
    return [float(re.findall(r"\d+", text)[-1:] == [gold]) for text, gold in zip(completions, answer, strict=True)]


def long(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def short(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


def happy(completions: list[str]) -> list[float]:
    return [text.lower().count("happily") / max(1, len(text.split())) for text in completions]


def relevant(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of the prompt's words that occur."""
    asked = [set(prompt.split()) for prompt in prompts]
    return [len(words & set(text.split())) / len(words) for words, text in zip(asked, completions, strict=True)]


def formatted(completions: list[str]) -> list[float]:
    return [float(re.search(r"<think>.+</think><answer>.+</answer>", text) is not None) for text in completions]


def harmless(completions: list[str]) -> list[float]:
    return [float("sorry" in text.lower()) for text in completions]


def wordy(completions: list[str]) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def modest(completions: list[str]) -> list[float]:
    return [-float(sum(character.isdigit() for character in text)) for text in completions]


@pytest.mark.parametrize(
    ("cheated", "winner"),
    [
        (long, "padded answer"),
        (short, "empty text"),
        (happy, "one word repeated"),
        (relevant, "prompt echo"),
        (harmless, "refusal"),
        (wordy, "padded answer"),
        (modest, "empty text"),
    ],
)
def test_a_reward_that_can_be_cheated_is_caught(cheated: Callable[..., Any], winner: str) -> None:
    found = probed(cheated)
    assert winner in found.kinds("ahead")
    assert any(line.startswith(f"{winner} beats the real answers: ") for line in found.lines())


def test_a_format_is_found_out_by_its_shell() -> None:
    sources = build_sources([RewardConfig(name="format_tags")])
    assert probe(sums(), sources, CombineConfig(), encode).kinds("ahead") == ["format only"]


def bounded(completions: list[str], answer: list[str]) -> list[float]:
    """Right, less a little for length."""
    known = right(completions, answer)
    return [value - 1e-4 * len(text) for value, text in zip(known, completions, strict=True)]


def alike(completions: list[str], answer: list[str]) -> list[float]:
    """F1 of words with the answer written out."""
    found = []
    for text, gold in zip(completions, answer, strict=True):
        words, reference = set(text.split()), set(next(written(a, b) for a, b in SUMS if str(a + b) == gold).split())
        found.append(2 * len(words & reference) / (len(words) + len(reference)))
    return found


def right_and_told(completions: list[str], answer: list[str]) -> list[float]:
    known = right(completions, answer)
    return [value * ("make" in text) for value, text in zip(known, completions, strict=True)]


@pytest.mark.parametrize("sound", [right, bounded, alike, right_and_told])
def test_a_sound_reward_passes(sound: Callable[..., Any]) -> None:
    found = probed(sound)
    assert found.kinds("ahead") == []
    assert "no cheap text beats the real answers" in found.lines()


def test_the_numbers_by_hand() -> None:
    found = probed(right)
    standings = found.standings["all rewards"]
    assert (found.prompts, found.answered, list(found.standings)) == (18, 18, ["all rewards"])
    assert standings["empty text"] == Standing(18, 0.0, Versus(1.0, 0.0, 0.0))
    assert standings["padded answer"] == Standing(18, 1.0, Versus(1.0, 0.0, 1.0)), "the padding holds no number"
    # The next sum has another result, but 2 + 13 is followed by 3 + 11: 15 and 14; never equal here.
    assert standings["answer to another prompt"].mean == 0.0
    assert standings["padded answer"].outcome == "level"
    assert any(
        line.startswith("padded answer scores as much as the real answers: 1 against 1") for line in found.lines()
    )


def test_the_cheap_texts_themselves() -> None:
    found = probed(happy)
    answer, other = written(2, 11), written(2, 12)
    assert found.examples == {
        REAL: answer,
        "empty text": "",
        "one word repeated": " ".join(["Happily"] * len(answer.split())),
        "prompt echo": "What is 2 plus 11?",
        "padded answer": found.examples["padded answer"],
        "refusal": "I'm sorry, but I can't help with that.",
        "answer to another prompt": other,
    }
    padded = found.examples["padded answer"]
    assert padded.startswith(answer + FILLER)
    assert 2 * len(answer) <= len(padded) < 2 * len(answer) + len(FILLER)


def test_ahead_and_level_are_shares_of_prompts() -> None:
    def odd(completions: list[str]) -> list[float]:
        """1 for an empty text; the real answers get 0, 1 or 2, by their last digit."""
        return [float(int(text[-2]) % 3) if re.search(r"\d\.$", text) else float(not text) for text in completions]

    results = [(a + b) % 10 % 3 for a, b in SUMS]
    standing = probed(odd).standings["all rewards"]["empty text"]
    assert standing.versus is not None
    assert standing.versus.ahead == results.count(0) / 18
    assert standing.versus.level == results.count(1) / 18
    assert standing.versus.real == pytest.approx(sum(results) / 18)


def test_rewards_are_told_apart_and_together() -> None:
    found = probed(right, long)
    assert list(found.standings) == ["all rewards", "right", "long"]
    assert found.standings["right"]["one word repeated"].outcome == "behind"
    assert found.standings["long"]["padded answer"].outcome == "ahead"
    assert found.kinds("ahead")[0] == "one word repeated", "its letters weigh more than being right"
    shown = json.loads(json.dumps(found.to_json()))
    assert shown["winners"] == found.kinds("ahead")
    assert shown["standings"]["right"]["empty text"]["versus"] == {"real": 1.0, "ahead": 0.0, "level": 0.0}


def test_without_real_answers_there_are_only_scores() -> None:
    found = probed(long, groups=sums(answered=False))
    assert found.answered == 0
    assert found.kinds("ahead") == []
    assert found.standings["all rewards"]["empty text"] == Standing(18, 0.0, None)
    assert found.lines()[-1].startswith("nothing to compare with: the data has no real answers")
    assert "padded answer" not in found.examples


def test_only_prompts_with_both_scores_are_compared() -> None:
    def shy(completions: list[str], answer: list[str]) -> list[float | None]:
        """Nothing to say where the sum is below 15, nor of an empty text."""
        said = zip(completions, answer, strict=True)
        return [None if int(gold) < 15 or not text else float(len(text)) for text, gold in said]

    groups = sums()
    groups[-1].completions = []
    standings = probed(shy, groups=groups).standings["all rewards"]
    small = sum(a + b < 15 for a, b in SUMS)
    assert standings["refusal"].prompts == 18 - small - 1
    assert "empty text" not in standings

    def mute(completions: list[str]) -> list[None]:
        return [None for _ in completions]

    assert probed(mute).lines()[-1].startswith("nothing to compare with: the rewards have nothing to say")


def test_prompts_that_a_failing_reward_drops_are_left_out() -> None:
    def fragile(completions: list[str], answer: list[str]) -> list[float]:
        if "13" in answer:
            raise ValueError("not this one")
        return [float(len(text)) for text in completions]

    standings = probed(fragile, on_error="drop_group").standings["all rewards"]
    assert standings["refusal"].prompts == 18 - sum(a + b == 13 for a, b in SUMS)


@pytest.mark.parametrize(
    ("rewards", "shell"),
    [
        ([{"name": "length"}], None),
        ([{"name": "format_tags"}], "<think>...</think><answer>...</answer>"),
        ([{"name": "format_json", "args": {"keys": ["name", "age"]}}], '{"name": "", "age": ""}'),
        ([{"name": "choice", "args": {"letters": "AB"}}], "The answer is A."),
        ([{"name": "math_equal", "args": {"symbolic": False}}], r"\boxed{}"),
        ([{"name": "code_tests", "args": {"allow_execution": True}}], "```python\npass\n```"),
        (
            [{"name": "format_tags"}, {"name": "math_equal", "args": {"symbolic": False}}],
            r"<think>...</think><answer>\boxed{}</answer>",
        ),
        ([{"name": "format_tags", "args": {"tags": ["a"]}}], "<a>...</a>"),
    ],
)
def test_the_shell_of_a_format(rewards: list[dict[str, Any]], shell: str | None) -> None:
    assert format_shell(build_sources([RewardConfig(**reward) for reward in rewards])) == shell
