"""PRO on T2, against imitation of the best answer and against lists whose scores say nothing."""

from alignkit.testing import read_metrics
from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.count import CountTask


@method("pro")
def measure(bench: Bench) -> list[Figure]:
    task = CountTask(bench)
    start = task.reward(task.start)
    imitating = task.reward(task.train("count-sft-best", {"name": "sft"}))
    # raw gaps of about 0.2 give almost no ranking signal
    scaled = {"name": "pro", "list_length": 4, "score_scale": 10.0}
    ranking = task.train("pro", scaled)
    reward = task.reward(ranking)
    pure = task.reward(task.train("pro-no-sft", {**scaled, "sft_weight": 0.0}))
    shuffled = task.reward(task.train("pro-shuffled", scaled, task.shuffled_lists()))
    before = next(record for record in read_metrics(ranking) if "eval_loss" in record)["eval_pro/kendall_tau"]
    return [
        Figure("T2: mean reward of the start model", start, at_least=0.25, at_most=0.40),
        Figure("T2: mean reward − of the start model", reward - start, at_least=0.15),
        Figure("T2: mean reward − of sft on the best answers", reward - imitating, at_least=0.02),
        Figure("T2, w = 0: mean reward − of sft on the best answers", pure - imitating, at_least=0.05),
        Figure("T2, scores shuffled: mean reward − of the start model", shuffled - start, at_most=0.03),
        Figure("T2: held-out Kendall τ of the start model", before, at_least=-0.2, at_most=0.2),
        Figure("T2: held-out Kendall τ", bench.evaluation(ranking)["eval_pro/kendall_tau"], at_least=0.4, start=before),
    ]
