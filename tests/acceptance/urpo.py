"""URPO on T5: a rule scores the answers to five digits, the model itself those to the five others."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from string import digits
from typing import Any

from tests.acceptance import online, toys
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.judge_task import NUM_HELD_OUT, NUM_WARM_UP, JudgeTask

KNOWN, HIDDEN = digits[:5], digits[5:]
ROUNDS, STEPS, NUM_SAMPLES = 50, 3, 100
"""Rounds of writing, optimizer steps in each; samples a digit."""
NUM_PROMPTS = {"verifiable": 8, "open": 8, "preference": 104}
"""Prompts of a round. A verdict is one token and needs many questions, none asked twice, to be learned as a rule."""
BETA, WEIGHTS = 0.1, {"verifiable": 1, "open": 2}
"""Weight of the divergence from the start; what the advantages of a task are multiplied by."""
VOTES = 7
"""Others of a group of eight that an answer is judged against: all there are."""
MIN_STD = 0.1
"""Spread of rewards below which a group teaches nothing, since a judge's noise would count as much as a difference."""
MIN_P = 0.1
"""What is less likely than a tenth of the likeliest is not drawn: the player tries nothing its warm-up never had."""
FORM = r"\d{8}"
"""What an open answer must look like: the judge has met no others."""
NUM_COMPARED, NUM_EXAMPLES = 2_400, 15
"""Steps in which the base learns to compare; pairs from which it learns to say so in a verdict."""


class RefereeTask(JudgeTask):
    """T5 with a base that can compare answers and has no verdicts yet, as a pretrained model is before it is a judge.

    It departs from T5 in two ways. The base was taught to compare answers to all ten digits by the true rule, in two
    other words: what is shown is that preference rows on five digits bring this out in verdicts on the other five, not
    that the rule is learned from them. And pairs hold any number of the digit among any others: a judge that has seen
    answers of the warm-up alone goes by their other symbols, and is fooled by better players.
    """

    layers = 3
    symbols = (*toys.JUDGE_SYMBOLS, "<", ">")
    """Those of T5 and the words of the base for the better answer, the first or the second."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.held_out = toys.mixed_pairs(self.seed, "held-out", NUM_HELD_OUT)

    @cached_property
    def base(self) -> Path:
        """SFT from random weights on other answers and on comparisons, of which a third are easy."""
        easy = toys.mixed_pairs(self.seed, "easy", NUM_COMPARED * 8, margin=4)
        hard = toys.mixed_pairs(self.seed, "hard", NUM_COMPARED * 16)
        answers = toys.base_warm_up(self.seed, NUM_WARM_UP)
        data = [(answers, 1.0), (toys.judge_rows(easy, "<>"), 1.0), (toys.judge_rows(hard, "<>"), 2.0)]
        return self._sft("referee-base", self.random, data, max_steps=NUM_COMPARED, lr_scheduler="cosine")

    @cached_property
    def start(self) -> Path:
        """SFT of the base on the answers of T2 and, as often, on verdicts on few pairs of all digits: 45 steps."""
        answers = toys.count_warm_up(self.seed, NUM_WARM_UP)
        verdicts = toys.judge_rows(toys.mixed_pairs(self.seed, "examples", NUM_EXAMPLES))
        data = [(answers, 1.0), (verdicts, NUM_WARM_UP / len(verdicts))]
        return self._sft("referee-warm-up", self.base, data, max_steps=45, lr_scheduler="cosine", learning_rate=1e-3)

    def learn(self, name: str, *, preference: bool = True) -> Path:
        """The run on all three tasks, or on the other two; open prompts wait for nothing, since the start can judge."""
        form = {"template": self.judge["args"]["template"]}
        num = {kind: ROUNDS * count for kind, count in NUM_PROMPTS.items() if preference or kind != "preference"}
        pairs = toys.mixed_pairs(self.seed, "preference", num.get("preference", 0), KNOWN)
        entries: list[tuple[str, toys.Rows | list[dict[str, Any]], dict[str, Any]]] = [
            ("verifiable", [{"prompt": KNOWN[i % len(KNOWN)]} for i in range(num["verifiable"])], {}),
            ("open", [{"prompt": HIDDEN[i % len(HIDDEN)]} for i in range(num["open"])], {}),
            ("preference", pairs, {"operations": [{"name": "referee", **form}]}),
        ]
        data = []
        for kind, rows, keys in entries:
            if rows:
                path = toys.write_rows(self.bench.folder / f"{name}-{kind}.jsonl", rows)
                data.append({"path": str(path), "fields": {"task": f"={kind}"}, **keys})
        prompts = sum(num.values()) // ROUNDS
        recipe: dict[str, Any] = {
            "model": {"name_or_path": str(self.start), "dtype": "float32"},
            "data": data,
            "algorithm": {
                "name": "urpo",
                "min_referee_acc": 0,
                "ramp_steps": 0,
                "task_weights": WEIGHTS,
                "min_std": MIN_STD,
                "beta": BETA,
                "prompts_per_round": prompts,
            },
            "rewards": [
                {"name": f"{online.__name__}:count", "when": "verifiable"},
                {"name": "referee_rank", "when": "preference", "args": form},
                {"name": "self_referee", "when": "open", "args": {**form, "max_tokens": 2, "votes": VOTES}},
                {"name": "regex", "when": "open", "args": {"pattern": FORM, "mode": "fullmatch"}},
            ],
            "combine": {"route": "task"},
            "rollout": {
                "num_generations": online.NUM_GENERATIONS,
                "max_completion_length": online.LONGEST,
                "min_p": MIN_P,
            },
            "train": {
                "max_steps": ROUNDS * STEPS,
                "batch_size": prompts * online.NUM_GENERATIONS // STEPS,
                "learning_rate": 1e-3,
                "lr_scheduler": "linear",
                "max_length": 64,
                "save_steps": 0,
                "logging_steps": 1,
            },
        }
        return self.bench.train(name, recipe)

    def hidden_reward(self, run: Path) -> float:
        """Mean reward of samples to the digits that the rule was kept from."""
        from alignkit.run import sample

        drawn = sample(run, list(HIDDEN), num=NUM_SAMPLES, temperature=1.0, max_tokens=online.LONGEST)
        return fmean(toys.count_reward(one["prompt"], one["completion"]) for one in drawn)

    def accuracy(self, run: Path, pairs: Sequence[Mapping[str, Any]] | None = None) -> float:
        """Share of right verdicts, the likeliest one on each pair of the known digits in either order: held-out pairs
        unless others are given."""
        from alignkit.run import sample

        rows = toys.judge_rows(pair for pair in pairs or self.held_out if pair["prompt"] in KNOWN)
        asked = {row["prompt"]: row["completion"] for row in rows}
        drawn = sample(run, list(asked), num=1, temperature=0.0, max_tokens=2)
        return fmean(one["completion"] == asked[one["prompt"]] for one in drawn)


@method("urpo")
def measure(bench: Bench) -> list[Figure]:
    task = RefereeTask(bench)
    run, alone = task.learn("urpo"), task.learn("urpo-alone", preference=False)
    start, judged = task.hidden_reward(task.start), task.accuracy(task.start)
    hidden, right = task.hidden_reward(run), task.accuracy(run)
    plain = toys.judge_pairs(task.seed, "held-out", NUM_HELD_OUT)
    return [
        Figure("T5, start: verdicts that are right", judged, at_least=0.6, at_most=0.7),
        Figure("T5: verdicts that are right", right, at_least=0.85, start=judged),
        Figure("T5: the same of pairs of warm-up answers", task.accuracy(run, plain), at_least=0.85),
        Figure("T5: reward where the rule is hidden, over the start's", hidden - start, at_least=0.25),
        Figure("T5: the same over that without preference rows", hidden - task.hidden_reward(alone), at_least=0.01),
        Figure("T5: right verdicts over those without preference rows", right - task.accuracy(alone), at_least=0.01),
    ]
