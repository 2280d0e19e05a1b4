"""Toy models and tasks of the acceptance experiments: small enough for one core, with answers that can be counted.

Everything is drawn by key, so a seed means the same model and the same rows on every machine.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any, TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit.core.rng import generator, key

SPECIAL = ["<pad>", "<s>", "</s>"]
SYMBOLS = [*ascii_lowercase, *ascii_uppercase, ":", " "]
COUNT_LENGTH, COUNT_CHANCES = 8, (0.34, 0.42, 0.24)
"""Task T2: symbols of an answer, and how likely each is the digit, the next one or the one after that in the warm-up.

The others' mean log-probability, (0.42·ln 0.42 + 0.24·ln 0.24) / 0.66, is that of the digit, ln 0.34, to within a
hundredth: to begin with, likelihood says nothing of the reward.
"""

RANKING_ERROR = 2.25
"""Task T2 with wrong ranks: standard error, in symbols, of what a ranker sees; near 30 % of the pairs are turned."""
GOAL_LETTERS = ascii_lowercase[:10]
"""Task R: prompts."""
JUDGE_SYMBOLS = [*digits, "J", "|", "?"]
JUDGE_TEMPLATE = "J{prompt}|{first}|{second}?"
"""Task T5: what the model is asked of two answers; it says `1` or `2`."""
BASE_CHANCES = ((0.30, 0.32, 0.38), (0.30, 0.54, 0.16))
"""Task T5: how likely the three symbols are before the warm-up of T2, in the first half of an answer and in the second.

From there the warm-up makes the digit likelier, and one other symbol nearly as much, in each half another. So what the
model has come to prefer is wrong of every third pair, although it gains on no symbol more than on the digit.
"""

Rows = list[dict[str, str]]
T = TypeVar("T")


def tiny_tokenizer(
    symbols: Sequence[str] = SYMBOLS, *, pattern: str = ".", in_front: bool = False
) -> PreTrainedTokenizerFast:
    """One token a match of `pattern`, a character unless told otherwise, 57 in all unless others are named.

    No token stands in front, or `<s>` does.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *symbols])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    if in_front:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    seed: int, symbols: Sequence[str] = SYMBOLS, *, width: int = 64, layers: int = 2, name: str = "tiny model"
) -> LlamaForCausalLM:
    """TinyLM: two layers of width 64 with two heads, context 64, about 0.14 million weights, drawn as torch draws them.

    The scale matters: from the ten times smaller weights that transformers draws, the rate of the experiments is so
    large that DPO destroys the answers whatever its β.
    """
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(symbols),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, name) % 2**32)
        model = LlamaForCausalLM(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.reset_parameters()
        return model


def write_model(folder: Path, seed: int, symbols: Sequence[str] = SYMBOLS, **tokens: Any) -> Path:
    """The tiny model and its tokenizer as a folder that plain transformers loads."""
    tiny_model(seed, symbols).save_pretrained(folder)
    tiny_tokenizer(symbols, **tokens).save_pretrained(folder)
    return folder


def write_small_model(folder: Path, seed: int) -> Path:
    """One layer of width 32: it learns what letters are worth before it knows pairs by heart."""
    tiny_model(seed, width=32, layers=1, name="small model").save_pretrained(folder)
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


def count_warm_up(seed: int, count: int) -> Rows:
    """Task T2: a digit, answered by eight symbols drawn from it and the two digits after it, 0 following 9."""
    rng, rows = generator(seed, "count", "warm-up"), []
    for i in range(count):
        near = _near(digits[i % len(digits)])
        answer = "".join(rng.choices(near, COUNT_CHANCES, k=COUNT_LENGTH))
        rows.append({"prompt": near[0], "completion": answer})
    return rows


def count_reward(prompt: str, answer: str) -> float:
    """Symbols equal to the digit, as a share of eight or of all there are, whichever is more; 0 to 1."""
    return answer.count(prompt) / max(COUNT_LENGTH, len(answer))


def counted(row: Mapping[str, Any]) -> dict[str, Any]:
    """A scored list of T2 with symbols in place of shares: scores of 0 to 8."""
    return {**row, "scores": [COUNT_LENGTH * score for score in row["scores"]]}


def misranked(seed: int, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lists with `ranks` by scores that a normal error of `RANKING_ERROR` is added to: near ones are confused."""
    rng, ranked = generator(seed, "count", "ranks"), []
    for row in rows:
        seen = [score + rng.gauss(0, RANKING_ERROR) for score in row["scores"]]
        ranked.append({**row, "ranks": [1 + sum(other > mine for other in seen) for mine in seen]})
    return ranked


def goal_rows(seed: int, purpose: str, count: int) -> Rows:
    """Task R: a letter, answered by eight symbols of which some are `1`: how many is anything from 0 to 8."""
    rng, rows = generator(seed, "goal", purpose), []
    for _ in range(count):
        ones = rng.randint(0, COUNT_LENGTH)
        symbols = ["1"] * ones + rng.choices(digits.replace("1", ""), k=COUNT_LENGTH - ones)
        rows.append({"prompt": f"{rng.choice(GOAL_LETTERS)}:", "completion": "".join(shuffled(symbols, rng))})
    return rows


def goal_pairs(seed: int, purpose: str, count: int) -> list[dict[str, Any]]:
    """Two answers of task R to one prompt, the one with more `1` chosen; how many is their score."""
    answers, pairs = iter(goal_rows(seed, purpose, 4 * count)), []
    while len(pairs) < count:
        first, second = sorted((next(answers), next(answers)), key=lambda row: -row["completion"].count("1"))
        scores = {"score_chosen": first["completion"].count("1"), "score_rejected": second["completion"].count("1")}
        if scores["score_chosen"] > scores["score_rejected"]:
            answered = {"chosen": first["completion"], "rejected": second["completion"]}
            pairs.append({"prompt": first["prompt"], **answered, **scores})
    return pairs


def base_warm_up(seed: int, count: int) -> Rows:
    """Task T5 before the warm-up of T2: the same symbols, with chances that say otherwise."""
    rng, rows = generator(seed, "judge", "base"), []
    for i in range(count):
        near = _near(digits[i % len(digits)])
        halves = ["".join(rng.choices(near, chances, k=COUNT_LENGTH // 2)) for chances in BASE_CHANCES]
        rows.append({"prompt": near[0], "completion": "".join(halves)})
    return rows


def judge_pairs(seed: int, purpose: str, count: int, prompts: str = digits, *, margin: int = 1) -> list[dict[str, Any]]:
    """Two answers as the warm-up of T2 has them, scored by the task: `margin` symbols or more between them."""
    rng = generator(seed, "judge", purpose)

    def answer(prompt: str) -> str:
        return "".join(rng.choices(_near(prompt), COUNT_CHANCES, k=COUNT_LENGTH))

    return _scored_pairs(answer, count, prompts, margin)


def mixed_pairs(seed: int, purpose: str, count: int, prompts: str = digits, *, margin: int = 1) -> list[dict[str, Any]]:
    """Two answers with any number of the digit among two other digits, scored by the task, `margin` or more apart."""
    rng = generator(seed, "judge", "broad", purpose)

    def answer(prompt: str) -> str:
        right = rng.randint(0, COUNT_LENGTH)
        others = rng.sample(digits.replace(prompt, ""), 2)
        return "".join(shuffled([prompt] * right + rng.choices(others, k=COUNT_LENGTH - right), rng))

    return _scored_pairs(answer, count, prompts, margin)


def _scored_pairs(answer: Callable[[str], str], count: int, prompts: str, margin: int) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = []
    while len(pairs) < count:
        prompt = prompts[len(pairs) % len(prompts)]
        answers = [answer(prompt), answer(prompt)]
        if abs(answers[0].count(prompt) - answers[1].count(prompt)) >= margin:
            scores = [count_reward(prompt, one) for one in answers]
            pairs.append({"prompt": prompt, "completions": answers, "scores": scores})
    return pairs


def judge_prompt(prompt: str, first: str, second: str) -> str:
    """What the model is asked of two answers."""
    return JUDGE_TEMPLATE.format(prompt=prompt, first=first, second=second)


def judge_rows(pairs: Iterable[Mapping[str, Any]], verdicts: str = "12") -> Rows:
    """Every pair in both orders, with the verdict that is right: the first of two words, or the second."""
    rows = []
    for pair in pairs:
        (first, second), better = pair["completions"], int(pair["scores"][1] > pair["scores"][0])
        rows.append({"prompt": judge_prompt(pair["prompt"], first, second), "completion": verdicts[better]})
        rows.append({"prompt": judge_prompt(pair["prompt"], second, first), "completion": verdicts[1 - better]})
    return rows


def _near(digit: str) -> list[str]:
    return [digits[(int(digit) + step) % len(digits)] for step in range(len(COUNT_CHANCES))]


def _share(holds: Callable[[str, str], bool], prompts: list[str], answers: list[str]) -> float:
    return sum(holds(p, a) for p, a in zip(prompts, answers, strict=True)) / len(prompts)


def shuffled(values: list[T], rng: Random) -> list[T]:
    """A shuffled copy."""
    return rng.sample(values, len(values))
