"""SFT on T1: from random weights to exact copies, keeping the mix of styles it was shown."""

from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.style import StyleTask


@method("sft")
def measure(bench: Bench) -> list[Figure]:
    task = StyleTask(bench)
    upper, valid = task.shares(task.start)
    return [
        Figure("T1 warm-up: held-out valid", valid, at_least=0.95),
        Figure("T1 warm-up: P(U)", upper, at_least=0.35, at_most=0.65),
    ]
