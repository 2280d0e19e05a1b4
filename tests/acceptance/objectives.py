"""Words under several rewards: how many vowels they have, how near to twelve letters they come, how loud they are."""

from collections.abc import Callable, Sequence
from functools import cached_property
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from string import ascii_lowercase
from typing import Any

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench
from tests.acceptance.online import OnlineTask

VOWELS, PROMPTS = "aeiou", "abcdefgh"
WORD_SYMBOLS = [*ascii_lowercase, "!", ":"]
SCALE, GOAL_LENGTH = 20.0, 12
NUM_WORDS, NUM_SAMPLES, COPIES = 6_400, 50, 60

Measured = Callable[[str], float]


def vowels(word: str) -> float:
    """How many there are."""
    return float(sum(letter in VOWELS for letter in word))


def vowel_share(word: str) -> float:
    """Of all its symbols."""
    return vowels(word) / max(1, len(word))


def exclamations(word: str) -> float:
    """How many there are."""
    return float(word.count("!"))


def length(word: str) -> float:
    """In symbols."""
    return float(len(word))


def near_goal(word: str) -> float:
    """0 for a word of twelve symbols, −1 for one of none."""
    return -((len(word) - GOAL_LENGTH) ** 2) / GOAL_LENGTH**2


def many_vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The number of vowels in units that outweigh everything else."""
    return [SCALE * vowels(word) for word in completions]


def right_length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """How near to twelve."""
    return [near_goal(word) for word in completions]


def drawn_words(seed: int, purpose: str, count: int) -> list[str]:
    """Four to ten symbols, one of ten an exclamation mark."""
    draw = generator(seed, "words", purpose)
    weights = [1.0] * len(ascii_lowercase) + [len(ascii_lowercase) / 9]
    return ["".join(draw.choices([*ascii_lowercase, "!"], weights, k=draw.randint(4, 10))) for _ in range(count)]


class WordTask:
    """A model that writes random words, and runs on rewards."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.task = bench, OnlineTask(bench)

    @cached_property
    def start(self) -> Path:
        """300 steps on random words, whatever the prompt."""
        words = drawn_words(self.bench.seed, "warm-up", NUM_WORDS)
        rows = [{"prompt": f"{PROMPTS[i % len(PROMPTS)]}:", "completion": word} for i, word in enumerate(words)]
        data = toys.write_rows(self.bench.folder / "words.jsonl", rows)
        model = toys.write_model(self.bench.folder / "words-random", self.bench.seed, WORD_SYMBOLS)
        train = {"max_steps": 300, "batch_size": 64, "learning_rate": 3e-3, "lr_scheduler": "constant"}
        return self.bench.train(
            "words-warm-up",
            {
                "model": {"name_or_path": str(model), "dtype": "float32"},
                "data": [{"path": str(data)}],
                "algorithm": {"name": "sft"},
                "train": {**train, "max_length": 64, "save_steps": 0, "logging_steps": 50},
            },
        )

    def train(self, name: str, algorithm: dict[str, Any], rewards: Sequence[dict[str, Any]], **more: Any) -> Path:
        """Updates of 8 prompts with 8 words each, of 24 symbols at most."""
        rows = [{"prompt": f"{letter}:"} for letter in PROMPTS for _ in range(COPIES)]
        rollout = {"max_completion_length": 24}
        return self.task.train(name, algorithm, rewards=rewards, data=rows, start=self.start, rollout=rollout, **more)

    def words(self, run: Path) -> list[str]:
        """Samples at temperature 1, equally many a prompt."""
        from alignkit.run import sample

        prompts = [f"{letter}:" for letter in PROMPTS]
        return [one["completion"] for one in sample(run, prompts, num=NUM_SAMPLES, temperature=1.0, max_tokens=24)]


def gain_in_errors(before: Sequence[str], after: Sequence[str], measured: Measured) -> float:
    """How much a mean has risen, in standard errors of the difference."""
    old, new = ([measured(word) for word in words] for words in (before, after))
    return (fmean(new) - fmean(old)) / max(1e-9, sqrt(stdev(old) ** 2 / len(old) + stdev(new) ** 2 / len(new)))


def gain_in_deviations(before: Sequence[str], after: Sequence[str], measured: Measured) -> float:
    """How much a mean has risen, in standard deviations of the start."""
    old = [measured(word) for word in before]
    return (fmean(map(measured, after)) - fmean(old)) / stdev(old)
