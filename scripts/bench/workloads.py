"""What is raced over: model shapes, lengths and batches, and how they become folders and files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignkit.core.rng import generator, key, permutation

PAD, EOS = "<pad>", "</s>"
"""Tokens 0 and 1 of every vocabulary; the words w2, w3, … follow."""

STOP_HAZARD = 0.016
"""How likely a model that writes by itself is to stop, a token."""
STEADY, CALIBRATING = 0.1, 16
"""What the number is that makes it stop, beside others of about 0.02; and texts that it is tried on."""

Row = dict[str, str | bool]


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model built from its config, embeddings tied."""

    vocabulary: int
    hidden: int
    layers: int
    feed_forward: int
    heads: int
    key_value_heads: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row: the prompt log-normal and clipped, the completion uniform, its end token included."""

    prompt_median: int
    prompt_sigma: float
    prompt_range: tuple[int, int]
    completion_range: tuple[int, int]

    @property
    def longest(self) -> int:
        """Tokens of the longest row there can be."""
        return self.prompt_range[1] + self.completion_range[1]


@dataclass(frozen=True)
class Workload:
    """One race. `batch_size`: units of one optimizer step; `device`: where `all` runs it.

    `samples`: completions of each prompt that a side writes itself, of any length in range; 0: the rows hold them.
    """

    algorithm: Literal["dpo", "kto", "grpo"]
    shape: Shape
    lengths: Lengths
    batch_size: int
    device: Literal["cpu", "cuda"] = "cpu"
    samples: int = 0


MIXED = Lengths(200, 0.5, (32, 600), (50, 400))
LONG_PROMPT = Lengths(1000, 0.15, (700, 1400), (50, 250))
SHORT = Lengths(20, 0.5, (8, 40), (5, 30))
WRITTEN = Lengths(200, 0.0, (200, 200), (1, 128))
WRITTEN_AFTER_LONG_PROMPT = Lengths(1000, 0.0, (1000, 1000), (1, 128))
WRITTEN_SHORT = Lengths(20, 0.5, (8, 40), (1, 24))

SMALL = Shape(32000, 256, 6, 704, 4, 2)
BODY = Shape(2048, 320, 8, 864, 5, 1)
SMOKE = Shape(512, 64, 2, 128, 2, 1)

WORKLOADS: Mapping[str, Workload] = {
    "dpo": Workload("dpo", Shape(32000, 384, 8, 1024, 6, 2), MIXED, 4),
    "dpo-s": Workload("dpo", SMALL, MIXED, 4),
    "dpo-body-s": Workload("dpo", BODY, MIXED, 4),
    "dpo-longprompt-s": Workload("dpo", BODY, LONG_PROMPT, 2),
    "dpo-bigvocab-s": Workload("dpo", Shape(151936, 128, 4, 384, 2, 1), MIXED, 2),
    "kto-s": Workload("kto", SMALL, MIXED, 4),
    "grpo-s": Workload("grpo", SMALL, WRITTEN, 16, samples=8),
    "grpo-body-s": Workload("grpo", BODY, WRITTEN, 16, samples=8),
    "grpo-longprompt-s": Workload("grpo", BODY, WRITTEN_AFTER_LONG_PROMPT, 8, samples=8),
    "smoke-dpo": Workload("dpo", SMOKE, SHORT, 4),
    "smoke-kto": Workload("kto", SMOKE, SHORT, 4),
    "smoke-grpo": Workload("grpo", SMOKE, WRITTEN_SHORT, 16, samples=8),
    "dpo-0.5b": Workload("dpo", Shape(151936, 896, 24, 4864, 14, 2), MIXED, 8, "cuda"),
    "dpo-1.5b": Workload("dpo", Shape(151936, 1536, 28, 8960, 12, 2), MIXED, 4, "cuda"),
}


def make_rows(workload: Workload, count: int, seed: int) -> list[Row]:
    """The first `count` rows of a workload; row i is the same whatever the count."""
    return [_row(workload, seed, i) for i in range(count)]


def in_training_order(rows: list[Row], seed: int) -> list[Row]:
    """The rows as alignkit's first epoch meets them."""
    return [rows[i] for i in permutation(len(rows), seed, "shuffle", 0)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def even_share(completions: list[str], **_: object) -> list[float]:
    """A reward that does not ask for a length: words with an even number, as a share of all."""
    written = [text.split() for text in completions]
    return [sum(word[-1] in "02468" for word in words) / max(1, len(words)) for words in written]


def write_model(folder: Path, shape: Shape, longest: int, seed: int, written_after: int | None = None) -> None:
    """The randomly drawn model for rows of up to `longest` tokens and its word-level tokenizer, as both sides load.

    With `written_after`, the tokens of a prompt, it stops by itself where it writes behind one.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = [PAD, EOS, *(f"w{i}" for i in range(2, shape.vocabulary))]
    splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=splitter,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.feed_forward,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        pad_token_id=words.index(PAD),
        bos_token_id=None,
        eos_token_id=words.index(EOS),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "bench model"))
        model = Qwen2ForCausalLM(config)
        if written_after is not None:
            calibrate_stop(model, written_after, longest - written_after)
        model.save_pretrained(folder)


def calibrate_stop(model: Any, prompt: int, new: int) -> None:
    """Make the model end texts at `STOP_HAZARD` a token, in contexts such as real ones: its own texts, as long.

    One number of the state is the same for every token, no layer adds to it, and the end token listens to it alone.
    """
    import torch

    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[:, 0] = STEADY
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        prompts = torch.randint(2, len(rows), (CALIBRATING, prompt))
        texts = model.generate(prompts, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new)
        states = torch.cat([model.model(text[None]).last_hidden_state[0, prompt - 1 : -1] for text in texts])
        others = torch.cat([(some @ rows[2:].T).logsumexp(-1) for some in states.split(256)])
        low, high = 0.0, 1e3
        for _ in range(50):
            middle = (low + high) / 2
            hazard = (states[:, 0] * middle - others).sigmoid().mean()
            low, high = (middle, high) if hazard < STOP_HAZARD else (low, middle)
        rows[1] = 0.0
        rows[1, 0] = low


def _row(workload: Workload, seed: int, index: int) -> Row:
    lengths, rng = workload.lengths, generator(seed, "bench row", index)
    low, high = lengths.prompt_range
    drawn = round(rng.lognormvariate(math.log(lengths.prompt_median), lengths.prompt_sigma))
    counts = [rng.randint(*lengths.completion_range) - 1 for _ in range(2)]

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(2, workload.shape.vocabulary)}" for _ in range(count))

    prompt = words(min(max(drawn, low), high))
    first, second = (" " + words(count) for count in counts)
    if workload.samples:
        return {"prompt": prompt}
    if workload.algorithm == "kto":
        return {"prompt": prompt, "completion": first, "label": index % 2 == 0}
    return {"prompt": prompt, "chosen": first, "rejected": second}
