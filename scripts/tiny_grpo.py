"""GRPO in one flat file: the mathematics of `algorithm: {name: grpo}` with torch and transformers and nothing else.

Read it first, then `alignkit/algorithms/grpo.py`. It is also the oracle that tests compare alignkit with.

    python scripts/tiny_grpo.py MODEL prompts.jsonl[.gz] --word happy --output OUT

MODEL is a folder or hub id; each line of the file holds the string `prompt`. An answer is right when the word occurs.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class Answer(NamedTuple):
    """Token ids of a prompt and of one answer to it, its stop token included if it came to one."""

    prompt: list[int]
    completion: list[int]


class Settings(NamedTuple):
    """β of the divergence, ε of the clip on both sides, optimizer steps a round, AdamW's rate, longest gradient."""

    beta: float = 0.04
    epsilon: float = 0.2
    passes: int = 1
    lr: float = 5e-4
    max_grad_norm: float = 1.0


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], count: int, longest: int
) -> list[Answer]:
    """`count` answers at temperature 1, of at most `longest` tokens."""
    written = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=count,
        max_new_tokens=longest,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    answers = []
    for ids in written[:, len(prompt) :].tolist():
        stop = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        answers.append(Answer(prompt, ids[:stop]))
    return answers


def pad(answers: list[Answer]) -> tuple[Tensor, Tensor, Tensor]:
    """Answers → tokens, attention and completion mask, each [N, L], padded right."""
    length = max(len(prompt) + len(completion) for prompt, completion in answers)
    tokens = torch.zeros(len(answers), length, dtype=torch.long)
    attention, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(answers):
        end = len(prompt) + len(completion)
        tokens[i, :end] = torch.tensor(prompt + completion)
        attention[i, :end] = 1
        mask[i, len(prompt) : end] = True
    return tokens, attention, mask


def token_logps(model: PreTrainedModel, answers: list[Answer]) -> tuple[Tensor, Tensor]:
    """Log-probability in nats of every token but the first, and which of them are the answer's, [N, L − 1] each."""
    tokens, attention, mask = pad(answers)
    logits = model(input_ids=tokens, attention_mask=attention).logits
    # The logits at position t predict token t + 1: drop the last position, and look one token ahead.
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return logps, mask[:, 1:]


def group_advantages(rewards: list[list[float]]) -> Tensor:
    """Rewards by prompt → (r − mean) / (std + 1e-4) within each, [N]."""
    scores = torch.tensor(rewards)
    return ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)).flatten()


def grpo_loss(
    logps: Tensor, old: Tensor, reference: Tensor, mask: Tensor, advantages: Tensor, settings: Settings
) -> Tensor:
    """Shao et al. 2024, eq. 3: the clipped surrogate and β·k3, mean over answers of the mean over their tokens."""
    ratio = (logps - old).exp()
    clipped = ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon)
    surrogate = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    away = reference - logps
    value = -surrogate + settings.beta * (away.exp() - away - 1)
    return (value.where(mask, 0.0).sum(1) / mask.sum(1)).mean()


class Learner:
    """A policy, a copy of its start, and AdamW."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self.model, self.settings = model.eval(), settings  # no dropout: the first ratios must be 1
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)

    def learn(self, answers: list[Answer], rewards: list[list[float]]) -> list[float]:
        """One round: the answers in order of `rewards`, which are by prompt. Returns the loss before each step."""
        advantages, losses = group_advantages(rewards), []
        with torch.no_grad():
            reference, _ = token_logps(self.reference, answers)
            old, _ = token_logps(self.model, answers)
        for _ in range(self.settings.passes):
            logps, mask = token_logps(self.model, answers)
            loss = grpo_loss(logps, old, reference, mask, advantages, self.settings)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def rounds(prompts: list[list[int]], size: int, count: int, seed: int) -> Iterable[list[list[int]]]:
    """`count` times `size` prompts, none twice before all have come."""
    rng, waiting = random.Random(seed), list[list[int]]()
    for _ in range(count):
        while len(waiting) < size:
            waiting += rng.sample(prompts, len(prompts))
        yield waiting[:size]
        waiting = waiting[size:]


def main() -> None:
    """The command line: load, then sample, score and learn, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--word", default="happy")
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--prompts", type=int, default=4, help="a round")
    parser.add_argument("--answers", type=int, default=8, help="a prompt")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with gzip.open(args.data, "rt") if args.data.suffix == ".gz" else args.data.open() as lines:
        prompts = [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines]
    learner = Learner(model, Settings(beta=args.beta, lr=args.lr))
    for number, some in enumerate(rounds(prompts, args.prompts, args.rounds, args.seed), start=1):
        answers = [
            answer for prompt in some for answer in sample(model, tokenizer, prompt, args.answers, args.max_tokens)
        ]
        texts = [tokenizer.decode(answer.completion, skip_special_tokens=True) for answer in answers]
        scores = [float(args.word in text.lower()) for text in texts]
        by_prompt = [scores[i : i + args.answers] for i in range(0, len(scores), args.answers)]
        (loss,) = learner.learn(answers, by_prompt)
        print(f"round {number:4d}  reward {sum(scores) / len(scores):.3f}  loss {loss:.6f}", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
