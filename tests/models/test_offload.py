"""Activations on the host between forward and backward: the same bits, and only what is worth moving."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.models import policy as policies
from alignkit.models.offload import MINIMUM_BYTES, ActivationOffload
from alignkit.models.policy import CausalPolicy, ForwardOptions
from tests.models.test_exactness import LOGPS, build, objective, pairs

CPU = torch.device("cpu")


class Network(nn.Module):
    """Saves weights (as they are and transposed), large activations and a small one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return (self.second(hidden) * hidden.mean().exp()).pow(2).sum()


def watched(offload: ActivationOffload) -> list[tuple[tuple[int, ...], bool]]:
    """Shape of each saved tensor, and whether it was moved."""
    seen: list[tuple[tuple[int, ...], bool]] = []
    pack = offload.pack_hook

    def spy(x: Tensor) -> Any:
        packed = pack(x)
        seen.append((tuple(x.shape), not isinstance(packed, Tensor)))
        return packed

    offload.pack_hook = spy
    return seen


def gradients(network: Network, x: Tensor, offload: ActivationOffload | None = None) -> list[Tensor]:
    network.zero_grad()
    x = x.clone().requires_grad_()
    if offload is None:
        loss = network(x)
    else:
        with offload:
            loss = network(x)
    loss.backward()
    return [x.grad, *(p.grad.clone() for p in network.parameters())]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(32, 16, generator=torch.manual_seed(1))


def test_gradients_are_equal_bit_for_bit(x):
    network = Network()
    offload = ActivationOffload(CPU, minimum_bytes=1)
    seen = watched(offload)
    for found, expected in zip(gradients(network, x, offload), gradients(network, x), strict=True):
        assert torch.equal(found, expected)
    assert any(moved for _, moved in seen)


def test_weights_and_small_tensors_stay(x):
    network = Network()
    offload = ActivationOffload(CPU, minimum_bytes=32 * 16 * 4)
    seen = watched(offload)
    gradients(network, x, offload)
    moved = {shape for shape, moved in seen if moved}
    stayed = {shape for shape, moved in seen if not moved}
    assert moved == {(32, 16), (32, 64)}
    assert {(), (16, 64)} <= stayed  # a weight transposed is still the weight


def test_what_is_moved_is_a_copy_that_outlives_its_origin():
    offload = ActivationOffload(CPU, minimum_bytes=1)
    original = torch.arange(6.0).reshape(2, 3).t()
    packed = offload.pack_hook(original)
    kept = original.clone()
    original.zero_()
    assert torch.equal(offload.unpack_hook(packed), kept)


def test_by_itself_it_moves_a_mebibyte_or_more():
    offload = ActivationOffload(CPU)
    assert MINIMUM_BYTES == 2**20
    assert not isinstance(offload.pack_hook(torch.zeros(2**18)), Tensor)
    assert isinstance(offload.pack_hook(torch.zeros(2**18 - 1)), Tensor)
    assert not isinstance(offload.pack_hook(torch.zeros(2**19, dtype=torch.bfloat16)), Tensor)


def test_the_number_of_the_device_does_not_matter():
    """A run knows its device as `cuda`, a tensor as `cuda:0`."""
    assert not isinstance(ActivationOffload(torch.device("cpu", 0)).pack_hook(torch.zeros(2**18)), Tensor)
    elsewhere = torch.zeros(2**18, device="meta")
    assert ActivationOffload(CPU).pack_hook(elsewhere) is elsewhere


@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
def test_a_loss_under_offload(monkeypatch, layout):
    """As on an accelerator, where alone the policy does it."""
    batch = collate(pairs(9, 60, 40))
    moved: list[int] = []

    def loss(on: bool) -> dict[str, Tensor]:
        model = build("llama")
        policy = CausalPolicy(model, DistEngine(torch.float32), ForwardOptions(layout))
        if on:
            offload = ActivationOffload(CPU, minimum_bytes=1)
            seen = watched(offload)
            monkeypatch.setattr(policies._Scorer, "_offloading", lambda _: offload)
        policy.loss(batch, LOGPS, objective).backward()
        if on:
            moved.append(sum(was for _, was in seen))
        return {name: p.grad for name, p in model.named_parameters()}

    expected, found = loss(False), loss(True)
    assert moved[0] > 20
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_the_policy_moves_nothing_where_it_computes_on_the_host():
    on = CausalPolicy(build("llama"), DistEngine(torch.float32), ForwardOptions(activation_offload=True))
    assert not isinstance(on._scorer._offloading(), ActivationOffload)
