"""Sixteen clues with one right symbol each; of half of them the start model is sure of a wrong one."""

from functools import cached_property
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.online import OnlineTask

CLUES, SYMBOLS = "ABCDEFGHIJKLMNOP", "abcdefghijklmnop"
SURE, KNOWN = 0.95, 0.6
"""How likely the start model writes the wrong symbol of a trapped clue, and the right one of another."""
ASK, COMMA, MOST, LONGEST = ",", ",", 4, 8
"""What asks for several answers stands between them too, so that each is written behind the same symbol."""
NUM_WARM_UP, NUM_UPDATES, NUM_SAMPLES, COPIES = 12_800, 200, 50, 100


class ClueTask:
    """The start model, which answers with one symbol, or with one to four where it is asked to."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.task = bench, OnlineTask(bench)
        self.right = dict(zip(CLUES, toys.shuffled(list(SYMBOLS), generator(bench.seed, "clues")), strict=True))
        self.trapped = CLUES[::2]

    def _symbols(self, clue: str, count: int, draw: Random) -> str:
        """Different symbols, the next always drawn from those that are left."""
        right = self.right[clue]
        liked = SYMBOLS[(SYMBOLS.index(right) + 1) % len(SYMBOLS)] if clue in self.trapped else right
        chance, chosen = SURE if clue in self.trapped else KNOWN, ""
        weights = {s: chance if s == liked else (1 - chance) / (len(SYMBOLS) - 1) for s in SYMBOLS}
        for _ in range(count):
            chosen += draw.choices(list(weights), list(weights.values()))[0]
            del weights[chosen[-1]]
        return chosen

    @cached_property
    def start(self) -> Path:
        """600 steps on both kinds of answers."""
        draw, rows = generator(self.bench.seed, "clues", "warm-up"), []
        for i in range(NUM_WARM_UP):
            clue, asked = CLUES[i % len(CLUES)], i // len(CLUES) % 2 == 1
            count = draw.randint(1, MOST) if asked else 1
            rows.append({"prompt": f"{clue}:{ASK * asked}", "completion": COMMA.join(self._symbols(clue, count, draw))})
        data = toys.write_rows(self.bench.folder / "clues.jsonl", toys.shuffled(rows, draw))
        model = toys.write_model(self.bench.folder / "clues-random", self.bench.seed, [*CLUES, *SYMBOLS, ":", ASK])
        train = {"max_steps": 600, "batch_size": 64, "num_epochs": 10, "learning_rate": 1e-3, "max_length": 64}
        return self.bench.train(
            "clues-warm-up",
            {
                "model": {"name_or_path": str(model), "dtype": "float32"},
                "data": [{"path": str(data)}],
                "algorithm": {"name": "sft"},
                "train": {**train, "save_steps": 0, "logging_steps": 50},
            },
        )

    def train(self, name: str, reward: dict[str, Any], ask: str) -> Path:
        """Updates of 8 clues with 8 answers each under the aepo bundle."""
        rows = [{"prompt": f"{clue}:{ask}", "answer": symbol} for clue, symbol in self.right.items()] * COPIES
        rollout = {"max_completion_length": LONGEST}
        return self.task.train(
            name,
            {"name": "aepo"},
            rewards=[reward],
            data=rows,
            start=self.start,
            rollout=rollout,
            max_steps=NUM_UPDATES,
        )

    def answers(self, run: Path, ask: str) -> dict[str, list[str]]:
        """Samples at temperature 1 by clue."""
        from alignkit.run import sample

        drawn = sample(run, [f"{clue}:{ask}" for clue in CLUES], num=NUM_SAMPLES, temperature=1.0, max_tokens=LONGEST)
        return {clue: [one["completion"] for one in drawn if one["prompt"][0] == clue] for clue in CLUES}

    def first_right(self, answers: dict[str, list[str]], *, trapped: bool) -> float:
        """How often the first symbol is right."""
        return fmean(
            text[:1] == self.right[clue]
            for clue, texts in answers.items()
            if (clue in self.trapped) == trapped
            for text in texts
        )

    def mean_count(self, answers: dict[str, list[str]], *, trapped: bool) -> float:
        """How many different symbols are written."""
        some = [text for clue, texts in answers.items() if (clue in self.trapped) == trapped for text in texts]
        return fmean(len(set(text) - {COMMA}) for text in some)


@method("aepo")
def measure(bench: Bench) -> list[Figure]:
    task = ClueTask(bench)
    search = {"name": "aer", "args": {"separator": COMMA, "max_answers": MOST}}
    ours, theirs = task.train("aepo", search, ASK), task.train("aepo-single", {"name": "exact"}, "")
    start, several, single = task.answers(task.start, ASK), task.answers(ours, ASK), task.answers(theirs, "")
    first, alone = (task.first_right(answers, trapped=True) for answers in (several, single))
    return [
        Figure("clues: first right where trapped", first, start=task.first_right(start, trapped=True)),
        Figure("clues: first right where trapped − of single answers", first - alone, at_least=0.2),
        Figure("clues: answers where not trapped, at the start", task.mean_count(start, trapped=False)),
        Figure("clues: answers where not trapped", task.mean_count(several, trapped=False), at_most=1.5),
        Figure("clues: first right where not trapped", task.first_right(several, trapped=False)),
    ]
