"""RPO on T1 at a rate where plain DPO destroys the answers."""

from itertools import pairwise

from alignkit.testing import read_metrics
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.style import StyleTask

RATE = 4e-4
"""At 1e-3 our plain DPO keeps more than half of its answers valid (0.54 and 0.65 on two seeds): less to protect."""


@method("rpo")
def measure(bench: Bench) -> list[Figure]:
    task = StyleTask(bench)
    start_upper, _ = task.shares(task.start)
    control = task.prefer("dpo-fast", {"name": "dpo", "beta": 0.1}, learning_rate=RATE)
    keys = {"name": "rpo", "beta": 0.1, "sft_normalization": "seq_mean"}
    light, full = (task.prefer(f"rpo-{eta}", {**keys, "eta": eta}, learning_rate=RATE) for eta in (0.02, 0.2))
    upper, valid = task.shares(full)
    valids = [task.shares(control)[1], task.shares(light)[1], valid]
    before = next(record for record in read_metrics(full) if "eval_loss" in record)
    after = bench.evaluation(full)
    return [
        Figure("T1, dpo at this rate: valid", valids[0], at_most=0.5),
        Figure("T1: valid", valid, at_least=0.95),
        Figure("T1: P(U)", upper, at_least=0.95, start=start_upper),
        Figure("T1: held-out accuracy", after["eval_rewards/accuracies"], at_least=0.97),
        Figure("T1: held-out log π(chosen) − its start", after["eval_logps/chosen"] - before["eval_logps/chosen"], 0.0),
        Figure("T1, η = 0.02: valid", valids[1]),
        Figure("T1: least rise of valid as η goes over 0, 0.02, 0.2", min(b - a for a, b in pairwise(valids)), 0.0),
    ]
