"""One seed of some acceptance experiments: what stopped working is noticed before `make acceptance` runs all."""

import pytest

from tests.acceptance.bench import Bench, methods, passes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("acceptance")]  # one worker: the methods share the warm-up

OFFLINE = ("sft", "dpo", "simpo", "kto", "rpo", "pro", "mah_dpo", "reward_augmented_dpo")
"""One of each kind: imitation, pairs, pairs without a reference, labels, a mixture, lists, heads, an operation."""
ONLINE = ("dr_grpo", "ppo", "raft", "self_rewarding")
"""Groups, a critic, selection, rounds."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("acceptance"), seed=0)


@pytest.mark.parametrize("name", [*OFFLINE, *ONLINE])
def test_seed_zero_meets_every_bound(bench, name):
    figures = methods()[name](bench)
    failed = [f"{figure.name}: {figure.value:.3f}, bound {figure.bound}" for figure in figures if not passes([figure])]
    assert not failed
