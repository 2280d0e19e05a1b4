"""Task T5: task T2 of a model that also compares answers, by a verdict and by what it has come to prefer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.acceptance import toys
from tests.acceptance.bench import Bench
from tests.acceptance.online import OnlineTask

NUM_WARM_UP, NUM_EXAMPLES, NUM_HELD_OUT = 6_400, 60, 500
"""Answers, of either warm-up; pairs that the judge learns from, in both orders; pairs that it is measured on."""
BETA = 0.1
"""Scale of an implicit reward beside a verdict, dimensionless."""


@dataclass(frozen=True)
class Opinions:
    """Of pairs of answers, what share a model gets right by its verdict in both orders (`judge`), by its implicit
    reward and by both together (`consensus`); in what share the two say the same (`consistency`) and the verdict goes
    by position (`flips`)."""

    judge: float
    implicit: float
    consensus: float
    consistency: float
    flips: float


class JudgeTask(OnlineTask):
    """Answer a digit with eight of the same, of one's own opinion of answers."""

    layers = 2
    """Of the model."""
    symbols: Sequence[str] = toys.JUDGE_SYMBOLS
    """What it reads and writes."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.held_out = toys.judge_pairs(self.seed, "held-out", NUM_HELD_OUT)

    @cached_property
    def random(self) -> Path:
        """Random weights, and the tokenizer."""
        folder = self.bench.folder / f"judge-random-{self.layers}"
        toys.tiny_model(self.seed, self.symbols, layers=self.layers).save_pretrained(folder)
        toys.tiny_tokenizer(self.symbols).save_pretrained(folder)
        return folder

    @cached_property
    def base(self) -> Path:
        """Before the warm-up of T2: SFT from random weights on other answers, 250 steps of 64."""
        rows = toys.base_warm_up(self.seed, NUM_WARM_UP)
        name = f"judge-base-{self.layers}"
        return self._sft(name, self.random, [(rows, 1)], max_steps=250, lr_scheduler="constant")

    @cached_property
    def start(self) -> Path:
        """SFT of the base on the answers of T2 and, as often, on verdicts on few pairs of all digits: 400 steps."""
        answers = toys.count_warm_up(self.seed, NUM_WARM_UP)
        verdicts = toys.judge_rows(toys.judge_pairs(self.seed, "examples", NUM_EXAMPLES))
        data = [(answers, 1), (verdicts, NUM_WARM_UP // len(verdicts))]
        return self._sft("judge-warm-up", self.base, data, max_steps=400, lr_scheduler="cosine")

    @property
    def models(self) -> dict[str, Any]:
        """A recipe's block: implicit rewards are what was gained on the base."""
        return {"base": {"from": str(self.base)}}

    @cached_property
    def template(self) -> Path:
        """What the model is asked of two answers, as a file."""
        path = self.bench.folder / "judge.txt"
        path.write_text(toys.JUDGE_TEMPLATE)
        return path

    @property
    def judge(self) -> dict[str, Any]:
        """A recipe's reward: the policy's verdicts on the other answers to the prompt."""
        return {"name": "judge", "args": {"mode": "pairwise", "template": str(self.template)}}

    def opinions(self, run: Path, pairs: Sequence[Mapping[str, Any]] | None = None, beta: float = BETA) -> Opinions:
        """What the model of a run, or of a folder, thinks of scored pairs, those held out unless others are given."""
        pairs = self.held_out if pairs is None else pairs
        now, base = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (run, self.base))
        triples = [(pair["prompt"], *pair["completions"]) for pair in pairs]
        first = _verdicts(now, triples)
        second = -_verdicts(now, [(prompt, b, a) for prompt, a, b in triples])
        verdict = (first + second) / 2
        answers = [(prompt, f"{answer}</s>") for prompt, *both in triples for answer in both]
        gains = (_logps(now, answers) - _logps(base, answers)).view(-1, 2)
        implicit = gains[:, 0] - gains[:, 1]
        truth = torch.tensor([pair["scores"][0] > pair["scores"][1] for pair in pairs])
        return Opinions(
            judge=_agreement(verdict > 0, truth),
            implicit=_agreement(implicit > 0, truth),
            consensus=_agreement(verdict + beta * implicit > 0, truth),
            consistency=_agreement(verdict > 0, implicit > 0),
            flips=1 - _agreement(first > 0, second > 0),
        )

    def _sft(self, name: str, model: Path, data: list[tuple[toys.Rows, float]], **train: Any) -> Path:
        usual = {"max_length": 64, "batch_size": 64, "learning_rate": 3e-3, "save_steps": 0, "logging_steps": 50}
        entries = []
        for i, (rows, weight) in enumerate(data):
            path = toys.write_rows(self.bench.folder / f"{name}-{i}.jsonl", rows)
            entries.append({"path": str(path), "weight": weight})
        return self.bench.train(
            name,
            {
                "model": {"name_or_path": str(model), "dtype": "float32"},
                "data": entries,
                "algorithm": {"name": "sft"},
                "train": {**usual, **train},
            },
        )


def _verdicts(model: Any, triples: Sequence[tuple[str, str, str]]) -> torch.Tensor:
    """[B]: log-odds that the first answer is the better one."""
    asked = [(toys.judge_prompt(*triple), verdict) for triple in triples for verdict in "12"]
    first, second = _logps(model, asked).view(-1, 2).unbind(1)
    return first - second


@torch.no_grad()
def _logps(model: Any, rows: Sequence[tuple[str, str]]) -> torch.Tensor:
    """[B]: log-probability in nats of each text right behind its prompt."""
    tokenizer = toys.tiny_tokenizer(toys.JUDGE_SYMBOLS)
    prompts, whole = (tokenizer(texts).input_ids for texts in ([p for p, _ in rows], [p + text for p, text in rows]))
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in whole], batch_first=True)
    logps = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    place = torch.arange(1, tokens.shape[1])
    counts = torch.tensor([[len(prompt), len(row)] for prompt, row in zip(prompts, whole, strict=True)])
    return (logps * ((place >= counts[:, :1]) & (place < counts[:, 1:]))).sum(1)


def _agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a == b).double().mean().item()
