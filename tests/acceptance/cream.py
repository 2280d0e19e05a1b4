"""CREAM on T5: three rounds by its implicit reward with an error of one nat, beside plain self-rewarding."""

from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from alignkit.core.rng import key
from alignkit.rewards.implicit import Implicit, ImplicitConfig
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.judge_task import JudgeTask
from tests.acceptance.self_rewarding import by_round, learn

NUM_GENERATIONS = 5


class ErringConfig(ImplicitConfig):
    """Keys of `Erring`."""

    sigma: float = 1.0


class Erring(Implicit):
    """The implicit reward with a normal error of `sigma` nats, another one for the round before: each judge errs."""

    config_type = ErringConfig

    def score(self, rows: Any, models: Any) -> Any:
        """As of `Implicit`; errors are keyed by round and answer."""
        told = super().score(rows, models)
        for part, scores in (("now", told.score), ("before", told.components["previous"])):
            for i, (name, text) in enumerate(zip(rows.ids, rows.completions, strict=True)):
                scores[i] += Random(key(0, "erring", part, rows.step, name, i, text)).gauss(0, self.config.sigma)
        return told


def rounds(task: JudgeTask, name: str, algorithm: dict[str, Any], sigma: float = 1.0, **settings: Any) -> Path:
    """A run by the erring judge, three passes over each round at 5e-4: plain self-rewarding learns the errors too.

    Before the first round there is the start, not the base: this base, made to prefer other symbols, ranks answers the
    other way round, and C would be below ½.
    """
    judge = {"name": f"{__name__}:Erring", "label": "implicit", "args": {"sigma": sigma}}
    models = {**task.models, "previous": {"from": "policy", "refresh": "round"}}
    usual = {"learning_rate": 5e-4, "epochs_per_round": 3, "rollout": {"num_generations": NUM_GENERATIONS}}
    return learn(task, name, [judge], algorithm, models=models, **{**usual, **settings})


def worst_drop(task: JudgeTask, run: Path) -> float:
    """The largest loss of reward in one round; negative where there is none."""
    curve = [*by_round(task, run), task.reward(run)]
    return max(before - after for before, after in pairwise(curve))


@method("cream")
def measure(bench: Bench) -> list[Figure]:
    task = JudgeTask(bench)
    cream, plain = rounds(task, "cream", {"name": "cream"}), rounds(task, "cream-plain", {})
    exact = [
        rounds(task, f"{name}-exact", {"name": name}, 0.0, learning_rate=1e-4, epochs_per_round=1)
        for name in ("cream", "self_rewarding")
    ]
    certain = rounds(task, "cream-certain", {"name": "cream", "fixed_consistency": 1.0})
    agreed = by_round(task, cream, "cream/consistency")
    losses = [[record["loss"] for record in task.log(run)] for run in (certain, plain)]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    reward, plain_reward, start = task.reward(cream), task.reward(plain), task.reward(task.start)
    return [
        Figure("T5: reward after three rounds", reward, start=start),
        Figure("T5: reward − plain self-rewarding's", reward - plain_reward, at_least=0.0),
        Figure("T5: plain's worst round − cream's", worst_drop(task, plain) - worst_drop(task, cream), at_least=0.0),
        Figure("T5: consistency in round 3 − in round 1", agreed[2] - agreed[0], at_least=0.0),
        Figure(
            "T5, no error: reward − plain's",
            task.reward(exact[0]) - task.reward(exact[1]),
            at_least=-0.05,
            at_most=0.05,
        ),
        Figure("T5, certain labels: loss − plain's, largest", apart, at_most=0.0),
    ]
