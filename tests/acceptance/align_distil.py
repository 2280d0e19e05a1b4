"""AlignDistil where all answers can be gone through: three symbols of three kinds, and rewards without sampling."""

from collections.abc import Callable
from functools import cached_property
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method

LETTERS, ANSWER_LENGTH, LONGEST = "abc", 3, 4
NUM_PAIRS, COPIES, STEEPNESS = 2_000, 400, 1.0
"""Pairs; rows of each prompt; the slope of the Bradley–Terry labels."""

Logits = Callable[[Tensor], Tensor]
"""Rows of tokens [n, T] → logits [n, V] of what comes next."""
VARIANTS: dict[str, dict[str, Any]] = {
    "theorem, a = 2": {"anchor": "ref", "weight": "fixed", "fixed_weight": 2.0},
    "contrast, w = 1": {"weight": "fixed", "fixed_weight": 1.0},
    "adaptive, gain 2": {"adapt_gain": 2.0, "loss_reweight": "none"},
}
CODE = {"adapt_gain": 2.0}
"""The same with the factor of the authors' code: tokens on which both models agree, which say nothing, weigh most."""


def reward(letter: str, answer: str) -> int:
    """How many symbols are the prompt's letter."""
    return answer.count(letter)


class LetterTask:
    """Answer one of three letters with three symbols, of which as many as can be are the letter."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def answers(self, purpose: str, count: int) -> list[str]:
        """Three symbols, each as likely as the others."""
        draw = generator(self.bench.seed, "letters", purpose)
        return ["".join(draw.choices(LETTERS, k=ANSWER_LENGTH)) for _ in range(count)]

    @cached_property
    def start(self) -> Path:
        """SFT from random weights on such answers, whatever the letter."""
        model = toys.write_model(self.bench.folder / "letters-random", self.bench.seed, LETTERS)
        answers = self.answers("warm-up", 6_400)
        rows = [{"prompt": LETTERS[i % 3], "completion": answer} for i, answer in enumerate(answers)]
        return self._train("letters-warm-up", model, {"name": "sft"}, rows, max_steps=200, learning_rate=3e-3)

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """Two answers to a letter, in the order a noisy judge puts them."""
        draw = generator(self.bench.seed, "letters", "labels")
        rows = []
        answers = [self.answers(purpose, NUM_PAIRS) for purpose in ("first", "second")]
        for i, (first, second) in enumerate(zip(*answers, strict=True)):
            letter = LETTERS[i % 3]
            apart = reward(letter, first) - reward(letter, second)
            better, worse = (first, second) if draw.random() < 1 / (1 + exp(-STEEPNESS * apart)) else (second, first)
            rows.append({"prompt": letter, "chosen": better, "rejected": worse})
        return rows

    def prefer(self, name: str, fields: dict[str, str]) -> Path:
        """DPO on the pairs, with their columns named by `fields`."""
        algorithm = {"name": "dpo", "beta": 0.5}
        settings = {"max_steps": 150, "learning_rate": 3e-4}
        return self._train(name, self.start, algorithm, self.pairs, fields=fields, **settings)

    @cached_property
    def teacher(self) -> Path:
        """DPO."""
        return self.prefer("letters-dpo", {})

    @cached_property
    def contrast(self) -> Path:
        """DPO on the pairs turned round."""
        return self.prefer("letters-reverse", {"chosen": "rejected", "rejected": "chosen"})

    def distil(self, name: str, algorithm: dict[str, Any]) -> Path:
        """400 steps of 64 answers."""
        contrast = self.start if algorithm.get("anchor") == "ref" else self.contrast
        more: dict[str, Any] = {
            "models": {"teacher": {"from": str(self.teacher)}, "contrast": {"from": str(contrast)}},
            "rollout": {"num_generations": 1, "max_completion_length": LONGEST},
        }
        rows: list[dict[str, Any]] = [{"prompt": letter} for letter in LETTERS for _ in range(COPIES)]
        if algorithm.get("mode") == "off_policy":
            del more["rollout"]
            rows = self.pairs
        settings = {"max_steps": 400, "learning_rate": 3e-3, "lr_scheduler": "cosine"}
        return self._train(name, self.start, {"name": "align_distil", **algorithm}, rows, more=more, **settings)

    def expected(self, logits: Logits) -> float:
        """The reward of an answer that is written so, exactly, mean over the letters."""
        ids = toys.tiny_tokenizer(LETTERS).convert_tokens_to_ids
        return fmean(expected_reward(ids(letter), ids("</s>"), logits) for letter in LETTERS)

    def taught(self, algorithm: dict[str, Any]) -> Logits:
        """What the synthetic teacher says."""
        toward = next_logits(self.teacher)
        away = next_logits(self.start if algorithm.get("anchor") == "ref" else self.contrast)
        anchor = next_logits(self.start) if algorithm.get("anchor") == "ref" else toward

        def logits(rows: Tensor) -> Tensor:
            near, far = toward(rows), away(rows)
            weight = torch.tensor(algorithm.get("fixed_weight", 0.0), dtype=near.dtype)
            if "adapt_gain" in algorithm:
                weight = algorithm["adapt_gain"] * (near.softmax(-1) - far.softmax(-1)).abs().sum(-1, True) + 0.001
            return anchor(rows) + weight * (near - far)

        return logits

    def _train(
        self,
        name: str,
        model: Path,
        algorithm: dict[str, Any],
        rows: list[dict[str, Any]],
        *,
        fields: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
        **train: Any,
    ) -> Path:
        data = toys.write_rows(self.bench.folder / f"{name}.jsonl", rows)
        usual = {"batch_size": 64, "lr_scheduler": "constant", "max_length": 16, "save_steps": 0, "logging_steps": 50}
        recipe = {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": [{"path": str(data), "fields": fields or {}}],
            "algorithm": algorithm,
            "train": {**usual, **train},
        }
        return self.bench.train(name, {**recipe, **(more or {})})


def next_logits(run: Path) -> Logits:
    """What a saved model says of the next token, in float64."""
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float64).eval()

    def logits(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return model(rows).logits[:, -1]

    return logits


def expected_reward(letter: int, end: int, logits: Logits) -> float:
    """The mean count of a token in what is written behind it, over every answer of `LONGEST` tokens at most."""
    rows, chances, total = torch.tensor([[letter]]), torch.ones(1, dtype=torch.float64), 0.0
    for _ in range(LONGEST):
        following = chances[:, None] * logits(rows).softmax(-1)
        total += float((following[:, end] * _count(rows, letter)).sum())
        others = torch.tensor([token for token in range(following.shape[1]) if token != end])
        chances = following[:, others].flatten()
        rows = torch.cat([rows.repeat_interleave(len(others), 0), others.repeat(len(rows))[:, None]], 1)
    return total + float((chances * _count(rows, letter)).sum())


def _count(rows: Tensor, letter: int) -> Tensor:
    return (rows[:, 1:] == letter).sum(-1)


@method("align_distil")
def measure(bench: Bench) -> list[Figure]:
    task = LetterTask(bench)
    start, dpo = (task.expected(next_logits(run)) for run in (task.start, task.teacher))
    figures = [Figure("letters: E[R] of the start, exact", start), Figure("letters: E[R] of dpo, exact", dpo)]
    for name, algorithm in VARIANTS.items():
        student = task.expected(next_logits(task.distil(f"letters-{name.split(',')[0]}", algorithm)))
        taught = task.expected(task.taught(algorithm))
        figures += [
            Figure(f"letters, {name}: E[R], exact", student),
            Figure(f"letters, {name}: E[R] off its teacher's", abs(student - taught), at_most=0.01),
        ]
    reweighted = task.expected(next_logits(task.distil("letters-code", CODE)))
    off = abs(reweighted - task.expected(task.taught(CODE)))
    figures.append(Figure("letters, adaptive with the code's factor: E[R] off its teacher's", off))
    given = {"mode": "off_policy", **VARIANTS["contrast, w = 1"]}
    student = task.expected(next_logits(task.distil("letters-given", given)))
    taught = task.expected(task.taught(given))
    return [*figures, Figure("letters, answers of the data, w = 1: E[R] off its teacher's", abs(student - taught))]
