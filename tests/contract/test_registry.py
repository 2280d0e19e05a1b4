"""Every registered method against every clause of the contract, and every clause against a method that breaks it."""

import re
from math import log
from types import SimpleNamespace

import pytest

from alignkit import testing
from alignkit.core.registry import register
from alignkit.models import attention
from alignkit.ops import logps
from tests.contract import bad

NAMES = register.algorithm.names()
CHECKS = [
    testing.check_config,
    testing.check_overfits,
    testing.check_micro_batches,
    testing.check_order,
    testing.check_layouts,
    testing.check_resume,
]
WORLD = 2
OVERFITS_WITH = {"discopop": {"discopop_tau": 1.0}, "sppo": {"beta": 0.05}}
"""Keys of methods whose own defaults cannot learn a few rows in sixty steps: discopop's τ begins on the wrong side of a
bump, sppo's β asks for ±500 nats. They go for `check_overfits` alone; all else runs with the defaults."""
FLOORS = {"nca": 1.5 * log(3) - log(2)}
"""What a loss cannot fall below, where that is near its start: nca's is least at σ(βΔ) = ⅔ of chosen answers."""


@pytest.fixture(scope="module")
def make_bench(tmp_path_factory):
    """One bench an algorithm and config, shared by its checks."""
    benches = {}

    def make(algorithm, config=None):
        key = algorithm, repr(config)
        if key not in benches:
            benches[key] = testing.Bench(algorithm, config=config, folder=tmp_path_factory.mktemp("bench"))
        return benches[key]

    return make


@pytest.fixture(scope="module")
def worlds(make_bench):
    """Recipes of all methods, the well- and the ill-behaved ones, each trained by two processes: one launch for all."""
    benches = [make_bench(algorithm) for algorithm in [*NAMES, bad.RowFacts, bad.StatisticOfOneRank]]
    recipes = {bench.name: testing.world_recipe(bench, WORLD) for bench in benches}
    testing.train_in_processes(list(recipes.values()), WORLD)
    return recipes


@pytest.mark.xdist_group("contract")
def test_these_tests_stay_on_one_worker(request):
    """Else every worker would launch the processes of `worlds` for itself."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("one process runs all tests")
    assert request.node.nodeid.endswith("@contract")


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("name", OVERFITS_WITH)
def test_only_methods_that_need_it_overfit_with_other_keys(name, make_bench):
    with pytest.raises(AssertionError, match=f"{name}: does not overfit"):
        testing.check_overfits(make_bench(name))


def test_suite_is_whole():
    """A check that is added to the public suite is added here too."""
    public = {name for name in testing.__all__ if name.startswith("check_")}
    assert public == {check.__name__ for check in CHECKS} | {"check_world_size"}


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_registered_methods_conform(name, check, make_bench):
    if check is testing.check_overfits:
        testing.check_overfits(make_bench(name, OVERFITS_WITH.get(name)), FLOORS.get(name, 0.0))
    else:
        check(make_bench(name))


@pytest.mark.distributed
@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("algorithm", [*NAMES, bad.RowFacts])
def test_registered_methods_ignore_world_size(algorithm, make_bench, worlds):
    bench = make_bench(algorithm)
    testing.compare_worlds(bench, worlds[bench.name], WORLD)


@pytest.mark.distributed
@pytest.mark.xdist_group("contract")
def test_statistic_of_one_rank_is_caught(make_bench, worlds):
    bench = make_bench(bad.StatisticOfOneRank)
    with pytest.raises(AssertionError, match=r"weights of 2 processes and of one differ"):
        testing.compare_worlds(bench, worlds[bench.name], WORLD)


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize(
    ("algorithm", "check", "complaint"),
    [
        (bad.AveragesItsLoss, testing.check_micro_batches, "the gradient of micro-batch 1 differs"),
        (bad.BatchStatisticInLoss, testing.check_micro_batches, "the gradient of micro-batch 1 differs"),
        (bad.IgnoresTheMask, testing.check_micro_batches, "the gradient of micro-batch 1 differs"),
        (bad.CountsByPosition, testing.check_order, "the gradient of seed 1 differs"),
        (bad.AveragesItsMetric, testing.check_micro_batches, "longest is"),
        (bad.MetricOfTheSplit, testing.check_micro_batches, "micro_batches is"),
        (bad.AveragesItsLoss, testing.check_layouts, "the gradient of a chunk for every unit differs"),
        (bad.DecaysTheWeights, testing.check_layouts, "the gradient of packed rows differs from that of padded rows"),
        (bad.ForgetsItsState, testing.check_resume, "the weights differ"),
        (bad.DrawsAtRandom, testing.check_resume, "the weights differ"),
        (bad.LearnsNothing, testing.check_overfits, "does not overfit 7 rows"),
        (bad.ConfigMoves, testing.check_config, "a recipe changes when it is written and read again"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_broken_methods_are_caught(algorithm, check, complaint, make_bench):
    bench = make_bench(algorithm)
    with pytest.raises(AssertionError, match=re.escape(bench.name) + ".*" + re.escape(complaint)):
        check(bench)


@pytest.mark.xdist_group("contract")
def test_only_layouts_show_a_weight_reached_past_the_outputs(make_bench):
    testing.check_micro_batches(make_bench(bad.DecaysTheWeights))
    testing.check_order(make_bench(bad.DecaysTheWeights))


@pytest.mark.xdist_group("contract")
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_never_reaches_shared_prompts_is_caught(name, make_bench, monkeypatch):
    """Every forward is right, so that no log-probability and no truth of step 0 shows it."""
    sound = attention._backward_cpu

    def forgetful(*arguments):
        *others, segments, scale = arguments
        return sound(*others, SimpleNamespace(causal=segments.causal, crossing=()), scale)

    monkeypatch.setattr(attention, "_backward_cpu", forgetful)
    with pytest.raises(AssertionError, match=r"of shared prompts( in the cascade)? differs from that of padded rows"):
        testing.check_layouts(make_bench(name))


def test_engine_sizes_are_put_back():
    def sizes():
        return logps.CHUNK_BYTES, logps.MAX_CHUNK_BYTES, attention.DENSE_TOKENS

    before, inside = sizes(), []

    def look():
        with testing.engine_sizes(chunk_bytes=1, max_chunk_bytes=2, dense_tokens=3):
            inside.append(sizes())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look()
    assert inside == [(1, 2, 3)]
    assert sizes() == before


def test_one_call_runs_every_check(monkeypatch, tmp_path):
    """`assert_conforms` is the whole suite; one process fewer than two leaves out only the launch."""
    ran, names = [], [check.__name__ for check in CHECKS]
    for name in [*names, "check_world_size"]:
        monkeypatch.setattr(testing, name, lambda *_, name=name: ran.append(name))
    testing.assert_conforms("sft", folder=tmp_path)
    assert ran == [*names, "check_world_size"]
    ran.clear()
    testing.assert_conforms(bad.RowFacts, folder=tmp_path, world_size=1)
    assert ran == names
