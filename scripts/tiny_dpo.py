"""DPO in one flat file: the mathematics of `algorithm: {name: dpo}` with torch and transformers and nothing else.

Read it first, then `alignkit/algorithms/dpo.py`. It is also the oracle that tests compare alignkit with.

    python scripts/tiny_dpo.py MODEL pairs.jsonl[.gz] --output OUT

MODEL is a folder or hub id; each line of the file holds the strings `prompt`, `chosen`, `rejected`.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class Pair(NamedTuple):
    """Token ids of one prompt and its two completions; each completion ends with the stop token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def tokenize(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Text → ids. Prompt and completion are encoded together, so the split is where prompt and both sequences part."""
    prompt = tokenizer(row["prompt"]).input_ids
    both = [tokenizer(row["prompt"] + row[side]).input_ids for side in ("chosen", "rejected")]
    shared = 0
    while shared < min(len(prompt), len(both[0]), len(both[1])) and (
        prompt[shared] == both[0][shared] == both[1][shared]
    ):
        shared += 1
    chosen, rejected = ([*ids[shared:], tokenizer.eos_token_id] for ids in both)
    return Pair(prompt[:shared], chosen, rejected)


def pad(pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs → tokens, attention and completion mask, each [2U, L]: all chosen, then all rejected, padded right."""
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    attention, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[i, :end] = torch.tensor(prompt + completion)
        attention[i, :end] = 1
        mask[i, len(prompt) : end] = True
    return tokens, attention, mask


def completion_logps(model: PreTrainedModel, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Summed log-probability in nats of every chosen and every rejected completion, [U] each."""
    tokens, attention, mask = pad(pairs)
    logits = model(input_ids=tokens, attention_mask=attention).logits
    # The logits at position t predict token t + 1: drop the last position, and look one token ahead.
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    chosen, rejected = logps.where(mask[:, 1:], 0.0).sum(-1).chunk(2)
    return chosen, rejected


def dpo_loss(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """Rafailov et al. 2023, eq. 7: −log σ(β·(Δ_chosen − Δ_rejected)), Δ = log-ratio of policy and reference. [U]."""
    chosen, rejected = policy[0] - reference[0], policy[1] - reference[1]
    return -logsigmoid(beta * (chosen - rejected))


def run(model: PreTrainedModel, batches: list[list[Pair]], beta: float, lr: float, max_grad_norm: float) -> list[float]:
    """Train `model` in place against a copy of its start, one AdamW step a batch; returns the loss before each step."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    model.eval()  # no dropout: at step 0 policy and reference must agree exactly
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for pairs in batches:
        with torch.no_grad():
            reference_logps = completion_logps(reference, pairs)
        loss = dpo_loss(completion_logps(model, pairs), reference_logps, beta).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        print(f"step {len(losses):4d}  loss {losses[-1]:.6f}", flush=True)
    return losses


def shuffled_batches(pairs: list[Pair], size: int, epochs: int, seed: int) -> list[list[Pair]]:
    """All pairs once an epoch, each epoch in a new order; the last batch of an epoch may be short."""
    rng, batches = random.Random(seed), []
    for _ in range(epochs):
        order = rng.sample(pairs, len(pairs))
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return batches


def main() -> None:
    """The command line: load, tokenise, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with gzip.open(args.data, "rt") if args.data.suffix == ".gz" else args.data.open() as lines:
        pairs = [tokenize(json.loads(line), tokenizer) for line in lines]
    fitting = [p for p in pairs if len(p.prompt) + max(len(p.chosen), len(p.rejected)) <= args.max_length]
    print(f"{len(fitting)} pairs, {len(pairs) - len(fitting)} left out as longer than {args.max_length} tokens")
    run(model, shuffled_batches(fitting, args.batch_size, args.epochs, args.seed), args.beta, args.lr, 1.0)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
