"""Task D, two rewards: the share of vowels in an answer, and its length. A direction before the prompt weighs them."""

from functools import cached_property
from math import cos, radians, sin
from pathlib import Path
from statistics import correlation, fmean, pstdev
from string import ascii_lowercase
from typing import Any

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method

NUM_WARM_UP, NUM_PROMPTS, NUM_DIRECTIONS, ROUNDS = 12_800, 200, 6, 3
"""Rows of the warm-up, prompts of a round (each round has its own), directions of a prompt, rounds."""
SHORTEST, LONGEST, MOST = 4, 14, 16
"""Letters of an answer of the warm-up, and of any."""
VOWELS, CONSONANTS, VOWEL_CHANCE = "aeiou", "bcdfghjklmnpqrstvwxyz", 0.3
ANGLES, NUM_ASKED = (-45, -30, -15, 0, 15, 30, 45), 600
WIDEST, NUM_NEAR = 60, 5
"""The warm-up's angles to either side, more than asked for, so that no number is rare; consonants of one angle."""
OBJECTIVES = ["V", "L"]
"""Names of the rewards."""
OPERATION = {
    "name": "direction",
    "objectives": OBJECTIVES,
    "placement": "user_prefix",
    "text": "{weights}",
    "separator": ";",
}
Point = tuple[float, float]


def vowels(completions: list[str], **_: Any) -> list[float]:
    """r₁: vowels of all letters; 0 of none."""
    return [sum(map(answer.count, VOWELS)) / max(1, len(answer)) for answer in completions]


def lengths(completions: list[str], **_: Any) -> list[float]:
    """r₂: letters of the most there may be."""
    return [len(answer) / MOST for answer in completions]


def hypervolume(points: list[Point]) -> float:
    """The area between the origin and what some point reaches in both rewards."""
    area = highest = 0.0
    for first, second in sorted(points, reverse=True):
        area += first * max(0.0, second - highest)
        highest = max(highest, second)
    return area


def spearman(values: list[float]) -> float:
    """The rank correlation of values with their places; equal ones share the mean of their ranks."""
    ranks = [sum((other < value) + (other == value) / 2 for other in values) for value in values]
    return correlation(range(len(values)), ranks)


class DirectionTask:
    """Answer four letters with up to 16, as the weights of the prompt ask for."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seed = bench, bench.seed

    @cached_property
    def start(self) -> Path:
        """SFT from random weights, which learn to read directions: they say which consonants to use.

        Share of vowels and length are drawn apart from them. Every number is one token.
        """
        symbols = [*ascii_lowercase, *"VL*+:; ", *map(str, range(-100, 101))]
        model = toys.write_model(self.bench.folder / "direction-random", self.seed, symbols, pattern="-?[0-9]+|.")
        rng, rows = generator(self.seed, "direction", "warm-up"), []
        for prompt in self._prompts("warm-up", NUM_WARM_UP):
            share, length = rng.random(), rng.randint(SHORTEST, LONGEST)
            first = round(share * (len(CONSONANTS) - NUM_NEAR))
            near = CONSONANTS[first : first + NUM_NEAR]
            letters = [rng.choice(VOWELS if rng.random() < VOWEL_CHANCE else near) for _ in range(length)]
            asked = self._text((2 * share - 1) * WIDEST)
            rows.append({"prompt": f"{asked};{prompt}", "completion": "".join(letters)})
        data = toys.write_rows(self.bench.folder / "direction-warm-up.jsonl", rows)
        settings = {"max_steps": 600, "batch_size": 64, "learning_rate": 3e-3}
        return self.bench.train("direction-warm-up", self._recipe(model, data, {"name": "sft"}, settings))

    def learn(self, rounds: int) -> Path:
        """The first rounds of three, rewards standardised by the moments of the start's answers."""
        prompts = self._prompts("rounds", NUM_PROMPTS * ROUNDS)
        rows = [{"prompt": prompt} for prompt in prompts for _ in range(NUM_DIRECTIONS)]
        data = toys.write_rows(self.bench.folder / "direction.jsonl", rows)
        answers = [answer for angle in ANGLES for answer in self._answers(self.start, angle)]
        rewards = []
        for reward in (vowels, lengths):
            scores = reward(answers)
            moments = {"name": "whiten", "mean": fmean(scores), "std": pstdev(scores)}
            rewards.append({"name": f"{__name__}:{reward.__name__}", "transforms": [moments]})
        algorithm = {"name": "raft", "rounds": rounds, "prompts_per_round": NUM_PROMPTS * NUM_DIRECTIONS}
        settings = {"max_steps": None, "epochs_per_round": 1, "batch_size": 16, "learning_rate": 1e-3}
        recipe = self._recipe(self.start, data, algorithm, settings)
        recipe["data"][0]["operations"] = [OPERATION]
        recipe |= {
            "rewards": rewards,
            "combine": {"mode": "direction"},
            "rollout": {"num_generations": 8, "max_completion_length": MOST + 1},
        }
        return self.bench.train(f"direction-{rounds}", recipe)

    def front(self, run: Path) -> list[Point]:
        """Mean rewards of samples at every angle."""
        drawn = [self._answers(run, angle) for angle in ANGLES]
        return [(fmean(vowels(answers)), fmean(lengths(answers))) for answers in drawn]

    def _answers(self, run: Path, angle: float) -> list[str]:
        prompts = [f"{self._text(angle)};{prompt}" for prompt in self._prompts("asked", NUM_ASKED)]
        return self.bench.answers(run, prompts, max_tokens=MOST + 1)

    def _text(self, angle: float) -> str:
        from alignkit.data.operations.direction import weights_text

        return weights_text((cos(radians(angle)), sin(radians(angle))), OBJECTIVES)

    def _prompts(self, purpose: str, count: int) -> list[str]:
        rng = generator(self.seed, "direction", f"{purpose} prompts")
        return ["".join(rng.choices(ascii_lowercase, k=4)) + ":" for _ in range(count)]

    def _recipe(self, model: Path, data: Path, algorithm: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
        usual = {"lr_scheduler": "constant", "max_length": 64, "save_steps": 0, "logging_steps": 5}
        return {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": [{"path": str(data)}],
            "algorithm": algorithm,
            "train": {**usual, **train},
        }


@method("dpa")
def measure(bench: Bench) -> list[Figure]:
    task = DirectionTask(bench)
    start, first, last = (task.front(run) for run in (task.start, task.learn(1), task.learn(ROUNDS)))
    return [
        Figure("D: Spearman of angle and mean length", spearman([point[1] for point in last]), at_least=0.9),
        Figure("D, angle −45: mean length, share of 16 − start", last[0][1] - start[0][1], at_most=0.0),
        Figure("D, angle 45: mean length, share of 16 − start", last[-1][1] - start[-1][1], at_least=0.0),
        Figure("D, angle 0: mean share of vowels − start", last[3][0] - start[3][0], at_least=0.0),
        Figure("D: hypervolume, round 1 − start", hypervolume(first) - hypervolume(start), at_least=0.0),
        Figure("D: hypervolume, round 3 − round 1", hypervolume(last) - hypervolume(first), at_least=0.0),
    ]
