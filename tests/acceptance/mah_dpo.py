"""Task T4, two objectives: answers in upper case, and long ones. Each has pairs of its own; no pair shows both.

β and the rate of T1 (0.1, 2e-4) destroy a third of the answers or more in 300 steps, whatever the head; with a tighter
tether that rate saturates the backbone in both objectives, and weights have nothing left to steer.
"""

from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from alignkit.core.rng import generator
from tests.acceptance import toys
from tests.acceptance.bench import Bench, Figure, method

NUM_WARM_UP, NUM_PAIRS, NUM_HELD_OUT = 12_800, 512, 400
UPPER, LONG = "upper", "long"
OBJECTIVES = (UPPER, LONG)
BETA, RATE = 0.5, 2e-5
SAMPLES = 4
"""Answers to each held-out prompt; the same random numbers for every mixture."""
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of the head of `upper`; the other's are what is left of 1."""


def answer(prompt: str, *, upper: bool, long: bool) -> str:
    """The prompt's letters in one of two styles, once or twice."""
    return toys.style_answer(prompt, upper=upper) * (2 if long else 1)


class TwoObjectives:
    """Copy four letters, in upper case or as they are, once or twice."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seed = bench, bench.seed
        self.held_out = toys.style_prompts(self.seed, "held-out", NUM_HELD_OUT)

    @cached_property
    def start(self) -> Path:
        """SFT from random weights on all four kinds of answers alike: 800 steps of 64."""
        model = toys.write_model(self.bench.folder / "objectives-random", self.seed)
        rng, rows = generator(self.seed, "objectives", "warm-up"), []
        for prompt in toys.style_prompts(self.seed, "warm-up", NUM_WARM_UP, without=self.held_out):
            rows.append(
                {"prompt": prompt, "completion": answer(prompt, upper=rng.random() < 0.5, long=rng.random() < 0.5)}
            )
        data = toys.write_rows(self.bench.folder / "objectives-warm-up.jsonl", rows)
        recipe = self._recipe(model, data, {"name": "sft"}, max_steps=800, batch_size=64, learning_rate=3e-3)
        return self.bench.train("objectives-warm-up", recipe)

    def pairs(self, prompts: list[str], purpose: str) -> list[dict[str, Any]]:
        """Two rows a prompt: upper case before lower of one length, and long before short of one style."""
        rng, rows = generator(self.seed, "objectives", purpose), []
        for prompt in prompts:
            long, upper = rng.random() < 0.5, rng.random() < 0.5
            both = {True: answer(prompt, upper=True, long=long), False: answer(prompt, upper=False, long=long)}
            rows.append({"prompt": prompt, "chosen": both[True], "rejected": both[False], "objective": UPPER})
            both = {True: answer(prompt, upper=upper, long=True), False: answer(prompt, upper=upper, long=False)}
            rows.append({"prompt": prompt, "chosen": both[True], "rejected": both[False], "objective": LONG})
        return rows

    def prefer(self, name: str, algorithm: dict[str, Any]) -> Path:
        """300 steps of 32 pairs, half of each objective; evaluated on pairs of held-out prompts."""
        prompts = toys.style_prompts(self.seed, "pairs", NUM_PAIRS, without=self.held_out)
        data = toys.write_rows(self.bench.folder / "objectives.jsonl", self.pairs(prompts, "pairs"))
        clean = toys.write_rows(
            self.bench.folder / "objectives-held-out.jsonl", self.pairs(self.held_out, "held-out pairs")
        )
        recipe = self._recipe(self.start, data, algorithm, max_steps=300, batch_size=32, learning_rate=RATE)
        return self.bench.train(name, {**recipe, "eval": {"data": [{"path": str(clean)}]}})

    def shares(self, run: Path, upper_weight: float | None = None) -> tuple[float, float]:
        """P(U) and P(long), at least eight symbols, among samples for held-out prompts."""
        from alignkit.run import sample

        weights = None if upper_weight is None else {UPPER: upper_weight, LONG: 1 - upper_weight}
        drawn = sample(run, self.held_out, num=SAMPLES, temperature=1.0, max_tokens=12, head_weights=weights)
        prompts, answers = [one["prompt"] for one in drawn], [one["completion"] for one in drawn]
        return toys.upper_share(prompts, answers), sum(len(text) >= 8 for text in answers) / len(answers)

    def _recipe(self, model: Path, data: Path, algorithm: dict[str, Any], **train: Any) -> dict[str, Any]:
        usual = {"lr_scheduler": "constant", "max_length": 64, "save_steps": 0, "logging_steps": 50, "num_epochs": 20}
        return {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": [{"path": str(data)}],
            "algorithm": algorithm,
            "train": {**usual, **train},
        }


def likeness(start: Path, run: Path) -> float:
    """Cosine between what training added to one head and to the other."""
    before = load_file(start / "model.safetensors")["lm_head.weight"]
    first, second = (head.sub(before).flatten() for head in load_file(run / "heads.safetensors").values())
    return float(nn.functional.cosine_similarity(first, second, dim=0))


@method("mah_dpo")
def measure(bench: Bench) -> list[Figure]:
    task = TwoObjectives(bench)
    start_upper, start_long = task.shares(task.start)
    heads = task.prefer("mah_dpo", {"name": "mah_dpo", "objectives": list(OBJECTIVES), "beta": BETA})
    merged = task.prefer("dpo-merged", {"name": "dpo", "beta": BETA})
    base_upper, base_long = task.shares(merged)
    swept = [task.shares(heads, weight) for weight in SWEEP]
    uppers, longs = [upper for upper, _ in swept], [long for _, long in swept]
    even_upper, even_long = swept[SWEEP.index(0.5)]
    found = bench.evaluation(heads)
    accuracy = {
        (head, pairs): found[f"eval_mah_dpo/{head}/accuracy_on/{pairs}"] for head in OBJECTIVES for pairs in OBJECTIVES
    }
    return [
        Figure("T4, head of style alone: P(U)", uppers[-1], at_least=0.85, start=start_upper),
        Figure("T4, head of length alone: P(long)", longs[0], at_least=0.85, start=start_long),
        Figure("T4, even mixture: P(U)", even_upper, at_least=0.70, start=start_upper),
        Figure("T4, even mixture: P(long)", even_long, at_least=0.70, start=start_long),
        Figure("T4, style's weight 0 to 1 by quarters: least rise of P(U)", _least_rise(uppers), at_least=-0.05),
        Figure(
            "T4, length's weight 0 to 1 by quarters: least rise of P(long)", _least_rise(longs[::-1]), at_least=-0.05
        ),
        Figure("T4, head of length alone: P(U)", uppers[0]),
        Figure("T4, head of style alone: P(long)", longs[-1]),
        Figure("T4, dpo on all pairs: P(U)", base_upper),
        Figure("T4, dpo on all pairs: P(long)", base_long),
        Figure(
            "T4, smaller of P(U) and P(long): even mixture − dpo",
            min(even_upper, even_long) - min(base_upper, base_long),
            at_least=-0.05,
        ),
        Figure("T4, P(U): head of style − dpo", uppers[-1] - base_upper, at_least=0.0),
        Figure("T4, P(long): head of length − dpo", longs[0] - base_long, at_least=0.0),
        Figure("T4, held-out accuracy: style's head on style", accuracy[UPPER, UPPER], at_least=0.95),
        Figure("T4, held-out accuracy: length's head on length", accuracy[LONG, LONG], at_least=0.95),
        Figure("T4, held-out accuracy: style's head on length", accuracy[UPPER, LONG], at_least=0.5),
        Figure("T4, held-out accuracy: length's head on style", accuracy[LONG, UPPER], at_least=0.5),
        Figure("T4, cosine between the changes of the heads", likeness(task.start, heads)),
    ]


def _least_rise(shares: list[float]) -> float:
    return min(after - before for before, after in pairwise(shares))
