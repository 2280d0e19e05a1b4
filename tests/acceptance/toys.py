"""Toy models and tasks of the acceptance experiments: small enough for one core, with answers that can be counted.

Everything is drawn by key, so a seed means the same model and the same rows on every machine.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from string import ascii_lowercase, ascii_uppercase

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit.core.rng import generator, key

SPECIAL = ["<pad>", "<s>", "</s>"]
SYMBOLS = [*ascii_lowercase, *ascii_uppercase, ":", " "]

Rows = list[dict[str, str]]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, 57 in all, no token in front."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(seed: int) -> LlamaForCausalLM:
    """TinyLM: two layers of width 64 with two heads, context 64, about 0.14 million weights, drawn as torch draws them.

    The scale matters: from the ten times smaller weights that transformers draws, the rate of the experiments is so
    large that DPO destroys the answers whatever its β.
    """
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(SYMBOLS),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "tiny model") % 2**32)
        model = LlamaForCausalLM(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.reset_parameters()
        return model


def write_model(folder: Path, seed: int) -> Path:
    """The tiny model and its tokenizer as a folder that plain transformers loads."""
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def style_prompts(seed: int, purpose: str, count: int, *, without: Iterable[str] = ()) -> list[str]:
    """Task T1's prompts: four of 26 letters and a colon, none twice and none of `without`."""
    rng, seen, prompts = generator(seed, "style", purpose), set(without), []
    while len(prompts) < count:
        prompt = "".join(rng.choices(ascii_lowercase, k=4)) + ":"
        if prompt not in seen:
            seen.add(prompt)
            prompts.append(prompt)
    return prompts


def style_answer(prompt: str, *, upper: bool) -> str:
    """The prompt's letters in upper case (style U) or as they are (style L)."""
    letters = prompt.removesuffix(":")
    return letters.upper() if upper else letters


def style_warm_up(seed: int, prompts: list[str]) -> Rows:
    """Half the prompts answered in style U, half in style L, in no order."""
    rng = generator(seed, "style", "warm-up style")
    uppers = shuffled([i % 2 == 0 for i in range(len(prompts))], rng)
    return [{"prompt": p, "completion": style_answer(p, upper=u)} for p, u in zip(prompts, uppers, strict=True)]


def style_pairs(seed: int, prompts: list[str], *, swapped: float = 0.0) -> Rows:
    """Style U preferred to style L; an exact share `swapped` of the pairs is turned round (task T3)."""
    turned = [i < round(swapped * len(prompts)) for i in range(len(prompts))]
    turned = shuffled(turned, generator(seed, "style", "swapped"))
    return [
        {"prompt": p, "chosen": style_answer(p, upper=not t), "rejected": style_answer(p, upper=t)}
        for p, t in zip(prompts, turned, strict=True)
    ]


def upper_share(prompts: list[str], answers: list[str]) -> float:
    """P(U): share of answers without a lower-case letter that hold an upper-case one."""
    return _share(lambda prompt, answer: answer.isupper(), prompts, answers)


def valid_share(prompts: list[str], answers: list[str]) -> float:
    """Share of answers that are exact copies, in either style."""
    return _share(
        lambda prompt, answer: answer in {style_answer(prompt, upper=True), style_answer(prompt, upper=False)},
        prompts,
        answers,
    )


def _share(holds: Callable[[str, str], bool], prompts: list[str], answers: list[str]) -> float:
    return sum(holds(p, a) for p, a in zip(prompts, answers, strict=True)) / len(prompts)


def shuffled(values: list[bool], rng: Random) -> list[bool]:
    """A shuffled copy."""
    return rng.sample(values, len(values))
