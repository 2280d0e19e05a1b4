"""The DPO family on T1, robust and conservative DPO on T3's swapped labels, and the losses without a reference."""

from pathlib import Path
from typing import Any

from tests.acceptance.bench import Bench, Figure, Measure, method
from tests.acceptance.style import StyleTask

LEAST_UPPER, LEAST_ACCURACY = 0.85, 0.97
"""What P(U) and held-out accuracy on T1 must reach, whatever the loss."""
VALID = {"nca": 0.85, "apo_zero": 0.85}
"""Methods that must also keep answers well-formed."""
SETTINGS: dict[str, dict[str, Any]] = {
    "cdpo": {},
    "hinge": {},
    "ipo": {},
    "ipo_sum": {},
    "exo": {},
    "nca": {},
    "sppo": {},
    "apo_zero": {},
    "f_dpo": {},
    "dpo_norm": {},
    "wpo": {},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0},
    "cpo": {},
    "orpo": {},
    "slic": {},
    "aot": {},
    "aot_unpaired": {},
}
"""The keys of each on T1; the others are the defaults of its name."""


def accuracy(task: StyleTask, run: Path) -> float:
    """Share of clean held-out pairs whose order is right at the end of a run."""
    return task.bench.evaluation(run)["eval_rewards/accuracies"]


def on_style(task: StyleTask, name: str) -> list[Figure]:
    """P(U), held-out accuracy and valid answers after T1."""
    start_upper, _ = task.shares(task.start)
    run = task.prefer(name, {"name": name, **SETTINGS[name]})
    upper, valid = task.shares(run)
    return [
        Figure("T1: P(U)", upper, at_least=LEAST_UPPER, start=start_upper),
        Figure("T1: held-out accuracy", accuracy(task, run), at_least=LEAST_ACCURACY),
        Figure("T1: valid", valid, at_least=VALID.get(name)),
    ]


def plain_measure(name: str) -> Measure:
    """The experiment of a method that has T1 alone."""
    return lambda bench: on_style(StyleTask(bench), name)


for _name in SETTINGS:
    if _name != "cdpo":
        method(_name)(plain_measure(_name))


def noisy(task: StyleTask, name: str, algorithm: dict[str, Any]) -> tuple[float, float]:
    """Mean βh of clean held-out pairs and P(U) after T3 with 30 % of the training pairs swapped."""
    run = task.prefer(name, algorithm, swapped=0.3)
    upper, _ = task.shares(run)
    return task.bench.evaluation(run)["eval_rewards/margins"], upper


PLAIN = {"name": "dpo", "beta": 0.1}


@method("cdpo")
def measure_cdpo(bench: Bench) -> list[Figure]:
    task = StyleTask(bench)
    margin, upper = noisy(task, "dpo-noisy", PLAIN)
    smoothed_margin, smoothed_upper = noisy(task, "cdpo-named-noisy", {"name": "cdpo", "label_smoothing": 0.3})
    return [
        *on_style(task, "cdpo"),
        Figure("T3, 30 % swapped: mean βh of cDPO(0.3) ÷ of plain", smoothed_margin / margin, at_most=0.9),
        Figure("T3, 30 % swapped: P(U) of cDPO(0.3) − of plain", smoothed_upper - upper, at_least=-0.15),
    ]


@method("robust_dpo")
def measure_robust(bench: Bench) -> list[Figure]:
    task = StyleTask(bench)
    start_upper, _ = task.shares(task.start)
    margin, upper = noisy(task, "dpo-noisy", PLAIN)
    robust_margin, robust_upper = noisy(task, "robust-noisy", {"name": "robust_dpo", "label_smoothing": 0.3})
    return [
        Figure("T3, 30 % swapped: P(U)", robust_upper, start=start_upper),
        Figure("T3, 30 % swapped: mean βh of robust(0.3) ÷ of plain", robust_margin / margin, at_least=1.0),
        Figure("T3, 30 % swapped: P(U) of robust(0.3) − of plain", robust_upper - upper, at_least=0.0),
    ]


@method("discopop")
def measure_discopop(bench: Bench) -> list[Figure]:
    """With the published τ the loss falls towards the rejected answer first, and on T1 it stays there: reported alone.
    With τ = 1 it has no such dip."""
    task = StyleTask(bench)
    start_upper, _ = task.shares(task.start)
    published = task.prefer("discopop", {"name": "discopop"})
    smooth = task.prefer("discopop-tau-1", {"name": "discopop", "discopop_tau": 1.0})
    upper, valid = task.shares(smooth)
    return [
        Figure("T1: P(U)", task.shares(published)[0]),
        Figure("T1: held-out accuracy", accuracy(task, published)),
        Figure("T1, τ = 1: P(U)", upper, at_least=LEAST_UPPER, start=start_upper),
        Figure("T1, τ = 1: held-out accuracy", accuracy(task, smooth), at_least=LEAST_ACCURACY),
        Figure("T1, τ = 1: valid", valid),
    ]


@method("apo_down")
def measure_apo_down(bench: Bench) -> list[Figure]:
    """Made for chosen answers that are worse than the model's own, it lowers both: the order is what it must learn."""
    task = StyleTask(bench)
    run = task.prefer("apo_down", {"name": "apo_down"})
    upper, valid = task.shares(run)
    return [
        Figure("T1: held-out accuracy", accuracy(task, run), at_least=LEAST_ACCURACY),
        Figure("T1: reward of chosen answers", bench.evaluation(run)["eval_rewards/chosen"]),
        Figure("T1: P(U)", upper),
        Figure("T1: valid", valid),
    ]
