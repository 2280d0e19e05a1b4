"""KTO on T1 with labels: balanced, nine good answers to a bad one, and labels turned."""

from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.labelled import LabelTask


@method("kto")
def measure(bench: Bench) -> list[Figure]:
    task = LabelTask(bench)
    start_upper, _ = task.shares(task.start)
    algorithm = {"name": "kto", "beta": 0.1}

    balanced = task.learn("kto", algorithm, task.rows())
    upper, valid = task.shares(balanced)
    unequal = task.learn("kto-90-10", {**algorithm, "undesirable_weight": 9.0}, task.rows(0.9))
    unequal_upper, _ = task.shares(unequal)
    flipped = task.learn("kto-flipped", algorithm, task.rows(flipped=True))
    flipped_upper, _ = task.shares(flipped)
    return [
        Figure("T1: P(U)", upper, at_least=0.85, start=start_upper),
        Figure("T1: valid", valid, at_least=0.85),
        Figure("T1: held-out rewards/rejected", bench.evaluation(balanced)["eval_rewards/rejected"], at_most=-3.0),
        Figure("T1, 90 % good, λ_U = 9: P(U) − balanced", unequal_upper - upper, at_least=-0.05, at_most=0.05),
        Figure(
            "T1, 90 % good, λ_U = 9: held-out rewards/rejected",
            bench.evaluation(unequal)["eval_rewards/rejected"],
            at_most=-2.5,
        ),
        Figure("T1, labels turned: P(U)", flipped_upper, at_most=0.15),
    ]
