"""DPO on T1, and conservative DPO against plain DPO on T3's swapped labels."""

from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.style import StyleTask


@method("dpo")
def measure(bench: Bench) -> list[Figure]:
    task = StyleTask(bench)
    start_upper, _ = task.shares(task.start)

    plain = task.prefer("dpo", {"name": "dpo", "beta": 0.1})
    upper, valid = task.shares(plain)
    tight = task.prefer("dpo-beta-0.5", {"name": "dpo", "beta": 0.5})
    tight_upper, tight_valid = task.shares(tight)

    noisy = task.prefer("dpo-noisy", {"name": "dpo", "beta": 0.1}, swapped=0.3)
    smoothed = task.prefer("cdpo-noisy", {"name": "dpo", "beta": 0.1, "label_smoothing": 0.3}, swapped=0.3)
    noisy_margin, smoothed_margin = (bench.evaluation(run)["eval_rewards/margins"] for run in (noisy, smoothed))
    noisy_upper, _ = task.shares(noisy)
    smoothed_upper, _ = task.shares(smoothed)
    return [
        Figure("T1: P(U)", upper, at_least=0.90, start=start_upper),
        Figure("T1: held-out accuracy", bench.evaluation(plain)["eval_rewards/accuracies"], at_least=0.97),
        Figure("T1: valid", valid),
        Figure("T1, β = 0.5: P(U)", tight_upper, start=start_upper),
        Figure("T1, β = 0.5: valid", tight_valid, at_least=0.55),
        Figure("T3, 30 % swapped: mean βh of cDPO(0.3) ÷ of plain", smoothed_margin / noisy_margin, at_most=0.9),
        Figure("T3, 30 % swapped: P(U) of cDPO(0.3) − of plain", smoothed_upper - noisy_upper, at_least=-0.15),
    ]
