"""Two rewards that partly disagree, vowels and length, one of them in units twenty times as large."""

from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.objectives import WordTask, gain_in_deviations, gain_in_errors, near_goal, vowels

NUM_UPDATES = 150


@method("pama")
def measure(bench: Bench) -> list[Figure]:
    task = WordTask(bench)
    rewards = [{"name": f"tests.acceptance.objectives:{name}"} for name in ("many_vowels", "right_length")]
    agreed = {"level": "advantage", "mode": "pama"}
    pama = task.train("pama", {"name": "pama"}, rewards, combine=agreed, max_steps=NUM_UPDATES)
    summed = task.train("pama-summed", {"name": "grpo"}, rewards, max_steps=NUM_UPDATES)
    start, ours, theirs = (task.words(run) for run in (task.start, pama, summed))
    measures = {"vowels": vowels, "length": near_goal}
    least, other = (
        min(gain_in_deviations(start, words, measured) for measured in measures.values()) for words in (ours, theirs)
    )
    zero = task.task.around(pama, NUM_UPDATES, "pama/frac_zero", NUM_UPDATES)
    return [
        *(
            Figure(f"words: gain in {name}, standard errors", gain_in_errors(start, ours, measured), at_least=2)
            for name, measured in measures.items()
        ),
        Figure("words: smaller gain, deviations", least),
        Figure("words: smaller gain − that of a sum with vowels × 20", least - other, at_least=0),
        Figure("words: share of tokens without an advantage", zero),
    ]
