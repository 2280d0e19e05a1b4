"""Task T2 in two categories, even and odd digits, each with digits that are easy to begin with and hard ones."""

from functools import cached_property
from pathlib import Path
from statistics import fmean
from string import digits
from typing import Any

import torch

from alignkit.algorithms.grpo import GRPO
from alignkit.algorithms.grpo_s import GRPOS
from alignkit.core import Batch, Forward, Group, Metric, Metrics, Terms
from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.online import COPIES, OnlineTask

EASY, CHANCES = digits[:5], {True: (0.6, 0.25, 0.15), False: (0.2, 0.5, 0.3)}
"""Digits that the warmed-up model mostly writes, and how likely it writes a digit, the next one and the one after."""
CATEGORIES = {"even": digits[::2], "odd": digits[1::2]}
NUM_DEMONSTRATIONS, NUM_HELD_OUT = 200, 100
NUM_UPDATES, HALF_WAY, EARLY = 120, 60, 20
RL = {"max_steps": NUM_UPDATES, "learning_rate": 5e-4}
JUDGE = {"name": "rpo", "sft_normalization": "seq_mean", "eta": 1.0, "beta": 0.1}
KL = {"beta": 0.0, "kl_coef": 1.0}
"""The divergence is taken off the reward at the weight that it has in the game that the judges are learned in."""


def symbols(texts: list[str]) -> torch.Tensor:
    """How often each digit stands in a text."""
    return torch.tensor([[float(text.count(digit)) for digit in digits] for text in texts])


class Plain(GRPO):
    """GRPO that has demonstrations scored too: a judge's score depends, in its last bits, on the rows beside it."""

    needs = GRPOS.needs


class Watched(GRPOS):
    """Tells the α of easy digits from that of hard ones."""

    def _facts_of(self, group: Group, coverages: list[float]) -> list[dict[str, float]]:
        easy = float(str(group.messages[0]["content"]) in EASY)
        return [{**facts, "easy": easy} for facts in super()._facts_of(group, coverages)]

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        terms, metrics = super().loss(out, batch)
        for number, name in enumerate(self._categories):
            for kind, easy in (("easy", 1), ("hard", 0)):
                some = batch["row"] & (batch["category"] == number) & (batch["easy"] == easy)
                metrics[f"watched/{name}/{kind}"] = Metric.mean(batch["alpha"], some)
        return terms, metrics


class ScalingTask:
    """The start model, one judge a category learned from demonstrations, and runs under them.

    A prompt has a token in front: of equal tokens that nothing precedes, every position attends to the same, so that no
    model could tell the end of a demonstration from its middle.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.task = bench, OnlineTask(bench)

    @cached_property
    def start(self) -> Path:
        """500 steps of warm-up, as in T2."""
        draw, rows = generator(self.bench.seed, "hardness", "warm-up"), []
        for i in range(6_400):
            near = [digits[(i + step) % len(digits)] for step in range(3)]
            answer = "".join(draw.choices(near, CHANCES[near[0] in EASY], k=toys.COUNT_LENGTH))
            rows.append({"prompt": near[0], "completion": answer})
        model = toys.write_model(self.bench.folder / "hardness-random", self.bench.seed, digits, in_front=True)
        keys = {"max_steps": 500, "batch_size": 64, "learning_rate": 3e-3}
        return self._fit("hardness-warm-up", model, {"name": "sft"}, rows, **keys)

    def _fit(self, name: str, model: Path, algorithm: dict[str, Any], rows: list[dict[str, str]], **train: Any) -> Path:
        held_out = train.pop("held_out", None)
        data = toys.write_rows(self.bench.folder / f"{name}.jsonl", rows)
        usual = {"lr_scheduler": "constant", "max_length": 64, "save_steps": 0, "logging_steps": 50}
        recipe: dict[str, Any] = {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": [{"path": str(data)}],
            "algorithm": algorithm,
            "train": {**usual, **train},
        }
        if held_out is not None:
            aside = toys.write_rows(self.bench.folder / f"{name}-aside.jsonl", held_out)
            recipe["eval"] = {"data": [{"path": str(aside)}]}
        return self.bench.train(name, recipe)

    def samples(self, run: Path, num: int) -> dict[str, list[str]]:
        """`num` answers a digit at temperature 1."""
        from alignkit.run import sample

        drawn = sample(run, list(digits), num=num, temperature=1.0, max_tokens=12)
        return {digit: [one["completion"] for one in drawn if one["prompt"] == digit] for digit in digits}

    @cached_property
    def judges(self) -> dict[str, Path]:
        """A model for each category that has come to prefer demonstrations to the start model's own answers."""
        written, found = self.samples(self.start, (NUM_DEMONSTRATIONS + NUM_HELD_OUT) // len(EASY)), {}
        for name, members in CATEGORIES.items():
            pairs = [
                {"prompt": digit, "chosen": digit * toys.COUNT_LENGTH, "rejected": answer}
                for digit in members
                for answer in written[digit]
            ]
            pairs = toys.shuffled(pairs, generator(self.bench.seed, "hardness", name))
            keys = {"num_epochs": 8, "batch_size": 32, "learning_rate": 3e-4, "held_out": pairs[NUM_DEMONSTRATIONS:]}
            found[name] = self._fit(f"judge-{name}-implicit", self.start, JUDGE, pairs[:NUM_DEMONSTRATIONS], **keys)
        return found

    def train(self, name: str, algorithm: dict[str, Any]) -> Path:
        """120 updates under the judge of each row's category."""
        category = {digit: name for name, members in CATEGORIES.items() for digit in members}
        rows = [
            {
                "id": f"{digit}-{i}",
                "prompt": digit,
                "demonstration": digit * toys.COUNT_LENGTH,
                "category": category[digit],
            }
            for digit in digits
            for i in range(COPIES)
        ]
        rewards: list[dict[str, Any]] = [
            {"name": "implicit", "label": f"{name}_judge", "when": name, "args": {"model": name, "previous": None}}
            for name in CATEGORIES
        ]
        rewards += [{"name": f"{__name__}:{name}", "weight": 0.0} for name in ("every_digit", "hard_digits")]
        models = {name: {"from": str(run)} for name, run in {**self.judges, "base": self.start}.items()}
        keys = {"rewards": rewards, "combine": {"route": "category"}, "data": rows, "start": self.start}
        return self.task.train(name, {**algorithm, **KL}, models=models, **keys, **RL)


def every_digit(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """What an answer is worth in truth."""
    return [toys.count_reward(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def hard_digits(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    """The same of hard digits alone."""
    worth = every_digit(prompts, completions)
    return [None if prompt in EASY else value for prompt, value in zip(prompts, worth, strict=True)]


@method("grpo_s")
def measure(bench: Bench) -> list[Figure]:
    """Policies are trained under the judges alone; the true reward is logged.

    A judge's reward is how much likelier it has become to write an answer, as every reward of a KL-regularised game is
    (Rafailov et al. 2023, arXiv 2305.18290): a sum over tokens, so that six right symbols of eight are worth more than
    none. Score layers (`reward_model` of kind `irl`) are deceived by answers that they were not shown: under them the
    true reward ended at 0.37 on the one seed that was tried.
    """
    task = ScalingTask(bench)
    alpha = {"encoder": f"{__name__}:symbols"}
    runs = {
        "scaled": task.train("grpo-s", {"name": f"{__name__}:Watched", **alpha}),
        "plain": task.train("grpo-s-plain", {"name": f"{__name__}:Plain"}),
        "ones": task.train("grpo-s-ones", {"name": "grpo_s", **alpha, "alpha_clip": [1, 1]}),
    }
    logs, around = {name: task.task.log(run) for name, run in runs.items()}, task.task.around
    log, truth, hard = logs["scaled"], "rewards/every_digit/mean", "rewards/hard_digits/mean"
    same = [
        all(ours[name] == theirs[name] for name in ("loss", "grad_norm"))
        for ours, theirs in zip(logs["ones"], logs["plain"], strict=True)
    ]
    alphas = {name: [_early(log, f"watched/{name}/{kind}") for kind in ("hard", "easy")] for name in CATEGORIES}
    return [
        *(
            Figure(
                f"T2: judge of {name} digits, held-out accuracy",
                bench.evaluation(run)["eval_rewards/accuracies"],
                at_least=0.9,
            )
            for name, run in task.judges.items()
        ),
        Figure(
            "T2: true reward after 120 updates under the judges",
            around(runs["scaled"], NUM_UPDATES, truth),
            at_least=0.80,
            start=logs["plain"][0][truth],
        ),
        *(
            Figure(
                f"T2: hard digits − grpo's, after {step}",
                around(runs["scaled"], step, hard) - around(runs["plain"], step, hard),
                at_least=-0.02,
            )
            for step in (HALF_WAY, NUM_UPDATES)
        ),
        *(
            Figure(f"T2: α of hard − of easy {name} digits", hard_alpha - easy_alpha, at_least=0)
            for name, (hard_alpha, easy_alpha) in alphas.items()
        ),
        *(
            Figure(f"T2: mean α_D, {name} digits", _early(log, f"categories/{name}/alpha_data"), 0.95, 1.05)
            for name in CATEGORIES
        ),
        Figure("T2: share of losses and gradients that are grpo's where α = 1", fmean(same), at_least=1),
    ]


def _early(records: list[dict[str, Any]], name: str) -> float:
    """The mean over the first updates that log it."""
    return fmean(record[name] for record in records[:EARLY] if name in record)
