"""Statistics of labelled answers in two processes and in one, where they are not 0: after the first step."""

import random
from pathlib import Path

import pytest

from alignkit.testing import SYMBOLS, Bench, compare_worlds, read_metrics, train_in_processes, world_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

WORLD = 2
CONFIGS = {
    "kto": {"undesirable_weight": 4.5},
    "bco": {"delta_mode": "class_balanced", "match_underlying_distribution": True},
}


def good_rows(count: int) -> list[dict[str, object]]:
    """Upper case, all but one good: so mismatched answers become likelier too, and KTO's reference point leaves 0."""
    draw, rows = random.Random(1), []
    for i in range(count):
        prompt, answer = (
            "".join(draw.choices(symbols, k=draw.randint(2, 14))) for symbols in (SYMBOLS[:26], SYMBOLS[27:])
        )
        rows.append({"id": str(i), "prompt": prompt, "completion": answer, "label": i != 3})
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Bench and recipe of each method, trained by two processes in one launch."""
    found = {}
    for name, config in CONFIGS.items():
        bench = Bench(name, config=config, rows=good_rows(7), folder=tmp_path_factory.mktemp(name))
        found[name] = bench, world_recipe(bench, WORLD)
    train_in_processes([recipe for _, recipe in found.values()], WORLD)
    return found


@pytest.mark.parametrize(("name", "statistic"), [("kto", "kl"), ("bco", "delta")])
def test_statistics_of_the_step_are_those_of_one_process(name, statistic, runs):
    bench, recipe = runs[name]
    compare_worlds(bench, recipe, WORLD)
    assert max(abs(record[statistic]) for record in read_metrics(Path(recipe.output_dir))) > 0.01
