"""Rank facts without a process group, and what refuses a world that is not the launched one."""

import pytest
import torch

from alignkit.core.errors import EnvironmentProblem
from alignkit.dist.backend import check_share
from alignkit.dist.config import DistConfig
from alignkit.dist.engine import DistEngine, weights_hash
from alignkit.dist.world import LocalWorld, check_world, launched_backend, masked_mean


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (
        "WORLD_SIZE",
        "MASTER_ADDR",
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        "ACCELERATE_USE_FSDP",
        "FSDP_VERSION",
    ):
        monkeypatch.delenv(name, raising=False)


def test_one_process_reduces_to_itself():
    world = LocalWorld()
    assert world.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert (world.rank, world.size) == (0, 1)


def test_mean_counts_only_where_it_is_told_to():
    x, over = torch.tensor([1.0, 5.0, float("inf")]), torch.tensor([True, True, False])
    assert float(LocalWorld().mean(x, over)) == 3.0
    assert float(LocalWorld().mean(x, torch.zeros(3, dtype=torch.bool))) == 0.0


def test_mean_over_ranks_weighs_them_by_their_counts():
    """Rank 0 has 1 and 5, rank 1 has 9: the mean is 5, the mean of means would be 6."""

    class TwoRanks(LocalWorld):
        def sum(self, x):
            return x + torch.tensor([9.0, 1.0], dtype=x.dtype)  # what the other rank adds: its sum and its count

    both = masked_mean(TwoRanks(), torch.tensor([1.0, 5.0]), torch.tensor([True, True]))
    assert float(both) == 5.0


def test_processes_must_be_those_the_recipe_asks_for(monkeypatch):
    check_world(None)
    check_world(1)
    with pytest.raises(EnvironmentProblem, match=r"asks for 8 processes .* and 1 were launched"):
        DistEngine(torch.float32, config=DistConfig(world_size=8))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world(None)
    check_world(2)
    with pytest.raises(EnvironmentProblem, match=r"asks for 1 processes .* and 2 were launched"):
        check_world(1)


def test_launcher_that_starts_too_few_is_refused(monkeypatch):
    """What `accelerate launch` leaves in the environment for two processes of type MULTI_CPU."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_world(None)  # one process by accelerate is fine
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(EnvironmentProblem, match=r"started only one .*MULTI_GPU"):
        check_world(None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_world(None)


def test_backend_is_the_one_accelerate_was_configured_for(monkeypatch):
    assert launched_backend() is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert launched_backend() == "zero2"
    with pytest.raises(EnvironmentProblem, match=r"asks for dist.backend: fsdp2.*was configured for zero2"):
        DistEngine(torch.float32, config=DistConfig(backend="fsdp2"))
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    with pytest.raises(EnvironmentProblem, match="zero_stage unset; expected 1, 2 or 3"):
        launched_backend()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launched_backend() == "fsdp2"
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(EnvironmentProblem, match="fsdp_version: 2"):
        launched_backend()


def test_process_that_holds_everything_is_refused():
    check_share("zero3", "weights", mine=51, total=100, size=2, slack=1)
    with pytest.raises(EnvironmentProblem, match=r"holds 100 of 100 numbers: nothing was spread"):
        check_share("zero3", "weights", mine=100, total=100, size=2, slack=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_tells_any_change_of_the_weights(dtype):
    def module():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)).to(dtype)

    first, second = module(), module()
    assert weights_hash(first) == weights_hash(second)
    for p in second.parameters():
        before = p.detach().clone()
        with torch.no_grad():
            p.view(-1)[-1] += 0.1
        assert weights_hash(first) != weights_hash(second)
        with torch.no_grad():
            p.copy_(before)
    with torch.no_grad():
        second[0].weight.copy_(second[0].weight.flip(0))  # the same numbers elsewhere
    assert weights_hash(first) != weights_hash(second)
