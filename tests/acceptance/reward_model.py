"""Reward models of every kind on truths that can be counted: letters that are worth something, steps that add up."""

import json
import math
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method

NUM_PAIRS, NUM_HELD_OUT, NUM_CLEAR_HELD_OUT = 3072, 2000, 1000
NOISE = [(0.2, 0.08, 768, 24), (0.4, 0.15, 1536, 14)]
"""Share of turned pairs, what two models must gain on them, and how many pairs are seen how often."""
WORD_LENGTH, CLEARLY = 6, 3.0
"""Letters of a word whose judgement may be turned, and by how much the worthier is worth more: near 0.6 deviations of a
difference. Nobody can tell which of two nearly equal words was turned, and pairs of them hide what choosing does."""
NUM_CHAINS, CHAIN_STEPS = 2048, 4
CHAIN_SYMBOLS = [*digits, "+", "=", "\n\n"]


def letter_worth(seed: int) -> dict[str, float]:
    """What each letter of a word adds to its worth."""
    draw = generator(seed, "reward model", "worth")
    return {letter: draw.gauss(0, 1.5) for letter in ascii_lowercase}


def words(seed: int, purpose: str, count: int) -> list[str]:
    """Random words, 4 to 8 letters each."""
    draw = generator(seed, "reward model", purpose)
    return ["".join(draw.choices(ascii_lowercase, k=draw.randint(4, 8))) for _ in range(count)]


def word_worth(seed: int, word: str) -> float:
    """The sum over its letters."""
    worth = letter_worth(seed)
    return sum(worth[letter] for letter in word)


def drawn_pairs(seed: int, purpose: str, count: int) -> list[dict[str, object]]:
    """Pairs of words of which the worthier is chosen as often as Bradley and Terry say: σ of the difference."""
    draw, found = generator(seed, "reward model", purpose, "choice"), []
    drawn = words(seed, purpose, 2 * count)
    for a, b in zip(drawn[::2], drawn[1::2], strict=True):
        wins = draw.random() < 1 / (1 + math.exp(word_worth(seed, b) - word_worth(seed, a)))
        found.append({"prompt": ":", "chosen": a if wins else b, "rejected": b if wins else a})
    return found


def worth_pairs(seed: int, purpose: str, count: int, *, turned: float = 0.0) -> list[dict[str, object]]:
    """Pairs of words of which the clearly worthier is chosen; an exact share `turned` is the other way round."""
    draw = generator(seed, "reward model", purpose)
    which = generator(seed, "reward model", purpose, "turned")
    some = iter(toys.shuffled([i < round(turned * count) for i in range(count)], which))
    worth, found = letter_worth(seed), list[dict[str, object]]()
    while len(found) < count:
        pair = ["".join(draw.choices(ascii_lowercase, k=WORD_LENGTH)) for _ in range(2)]
        worst, best = sorted(pair, key=lambda word: sum(worth[letter] for letter in word))
        if sum(worth[letter] for letter in best) - sum(worth[letter] for letter in worst) >= CLEARLY:
            is_turned = next(some)
            chosen, rejected = (worst, best) if is_turned else (best, worst)
            found.append({"prompt": ":", "chosen": chosen, "rejected": rejected, "is_noisy": is_turned})
    return found


def graded_words(seed: int, purpose: str, count: int) -> list[dict[str, object]]:
    """Words with the logarithm of their length and their worth; every third row lacks one of the two."""
    worth, rows = letter_worth(seed), []
    for i, word in enumerate(words(seed, purpose, count)):
        grades: dict[str, object] = {
            "log_length": math.log(len(word)),
            "worth": sum(worth[letter] for letter in word) / len(word),
        }
        if i % 3 == 2:
            grades[("log_length", "worth")[i // 3 % 2]] = None
        rows.append({"prompt": ":", "completion": word, **grades})
    return rows


def chains(seed: int, purpose: str, count: int) -> list[dict[str, object]]:
    """Additions of 1 or 2 modulo 10, each from where the last one ended; four chains of five go wrong at a step, and
    stay wrong."""
    draw, rows = generator(seed, "reward model", purpose), []
    for i in range(count):
        value, wrong_at = draw.randrange(10), draw.randrange(CHAIN_STEPS) if i % 5 else CHAIN_STEPS
        prompt, steps = str(value), []
        for t in range(CHAIN_STEPS):
            added = draw.randint(1, 2)
            result = (value + added + (draw.randint(1, 9) if t == wrong_at else 0)) % 10
            steps.append(f"{value}+{added}={result}")
            value = result
        rows.append({"prompt": prompt, "completions": steps, "labels": [t < wrong_at for t in range(CHAIN_STEPS)]})
    return rows


class RewardTask:
    """Runs of the tiny model from random weights on these rows."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seed = bench, bench.seed
        self.model = toys.write_model(bench.folder / "reward-start", self.seed)

    def learn(
        self,
        name: str,
        keys: dict[str, Any],
        rows: list[dict[str, object]],
        held_out: list[dict[str, object]],
        model: Path | None = None,
        **train: Any,
    ) -> dict[str, float]:
        """The last held-out evaluation, and the last logged numbers of training, of a run."""
        folder = self.bench.folder
        data = toys.write_rows(folder / f"{name}.jsonl", rows)
        aside = toys.write_rows(folder / f"{name}-held-out.jsonl", held_out)
        settings = {"batch_size": 64, "learning_rate": 1e-3, "max_length": 64, "save_steps": 0, "logging_steps": 10}
        run = self.bench.train(
            name,
            {
                "model": {"name_or_path": str(model or self.model), "dtype": "float32"},
                "data": [{"path": str(data)}],
                "algorithm": {"name": "reward_model", **keys},
                "train": {**settings, **train},
                "eval": {"data": [{"path": str(aside)}]},
            },
        )
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        trained: dict[str, float] = next(record for record in reversed(records) if "loss" in record)
        return {**trained, **self.bench.evaluation(run)}


@method("reward_model")
def measure(bench: Bench) -> list[Figure]:
    return [*pairs(bench), *noise(bench), *grades(bench), *steps(bench)]


def pairs(bench: Bench) -> list[Figure]:
    """Bradley–Terry with and without centering."""
    task = RewardTask(bench)
    rows, held_out = (
        drawn_pairs(bench.seed, name, count) for name, count in (("pairs", NUM_PAIRS), ("aside", NUM_HELD_OUT))
    )
    truth = [word_worth(bench.seed, str(r["chosen"])) > word_worth(bench.seed, str(r["rejected"])) for r in held_out]
    centred = task.learn("rm-centred", {}, rows, held_out, num_epochs=5)
    free = task.learn("rm-free", {"center": 0.0}, rows, held_out, num_epochs=5)
    return [
        Figure("pairs: held-out accuracy", centred["eval_rewards/accuracies"], at_least=0.85),
        Figure("pairs: accuracy of the truth", sum(truth) / len(truth)),
        Figure("pairs: accuracy by length", centred["eval_rewards/length_accuracies"]),
        Figure("pairs: calibration error", centred["eval_calibration/ece"], at_most=0.10),
        Figure("pairs: |mean score|, centred", abs(centred["eval_mean_reward"]), at_most=0.05),
        Figure("pairs: |mean score|, not centred", abs(free["eval_mean_reward"])),
    ]


def noise(bench: Bench) -> list[Figure]:
    """Two models that choose each other's pairs against one that takes them all."""
    task, figures = RewardTask(bench), []
    model = toys.write_small_model(bench.folder / "small-start", bench.seed)
    held_out = worth_pairs(bench.seed, "held-out", NUM_CLEAR_HELD_OUT)
    for turned, gain, count, epochs in NOISE:
        percent = round(100 * turned)
        rows = worth_pairs(bench.seed, "noisy", count, turned=turned)
        length = {"num_epochs": epochs, "lr_scheduler": "constant", "learning_rate": 3e-3}
        plain = task.learn(f"rm-plain-{percent}", {}, rows, held_out, model, **length)
        keys = {"collaborative": {"noise_rate": turned, "warmup_steps": 100}}
        pair = task.learn(f"rm-collaborative-{percent}", keys, rows, held_out, model, **length)
        accuracy, alone = pair["eval_rewards/accuracies"], plain["eval_rewards/accuracies"]
        figures += [
            Figure(f"{percent} % turned: accuracy of one model", alone),
            Figure(f"{percent} % turned: gain of two that choose for each other", accuracy - alone, at_least=gain),
            Figure(
                f"{percent} % turned: clean share of what they keep",
                pair["collaborative/clean"],
                at_least=0.80 if turned == 0.4 else None,
            ),
        ]
    return figures


def grades(bench: Bench) -> list[Figure]:
    """Two attributes of single answers."""
    keys = {"kind": "attribute_regression", "attributes": ["log_length", "worth"]}
    rows, held_out = (graded_words(bench.seed, name, count) for name, count in (("graded", 1024), ("aside", 300)))
    found = RewardTask(bench).learn("rm-attributes", keys, rows, held_out, num_epochs=6)
    return [
        Figure(f"attributes: held-out error of {name} ÷ variance", 1 - found[f"eval_r2/{name}"], at_most=0.5)
        for name in ("log_length", "worth")
    ]


def steps(bench: Bench) -> list[Figure]:
    """The first wrong step of a chain of additions."""
    model = toys.write_model(bench.folder / "chain-start", bench.seed, CHAIN_SYMBOLS)
    rows, held_out = chains(bench.seed, "chains", NUM_CHAINS), chains(bench.seed, "chains aside", 300)
    length = {"num_epochs": 10, "learning_rate": 3e-3}
    found = RewardTask(bench).learn("rm-steps", {"kind": "prm"}, rows, held_out, model, **length)
    return [
        Figure("steps: first error found", found["eval_steps/first_error"], at_least=0.80),
        Figure("steps: held-out accuracy", found["eval_rewards/accuracies"]),
        Figure("steps: accuracy of the majority", found["eval_rewards/majority_accuracies"]),
    ]
