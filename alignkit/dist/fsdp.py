"""FSDP2: weights, gradients and optimizer state in parts, gathered a decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from alignkit.dist.backend import Backend, BuildOptimizer, Slot, check_share, units_of
from alignkit.dist.world import AnyWorld


class Fsdp2(Backend):
    """torch's `fully_shard` on every decoder layer, and on what is left over as a whole."""

    name = "fsdp2"

    def __init__(self, world: AnyWorld, device: torch.device, *, offload: bool) -> None:
        super().__init__(world, device)
        self._policy: OffloadPolicy = CPUOffloadPolicy() if offload and device.type != "cpu" else OffloadPolicy()

    def prepare(self, module: nn.Module, build: BuildOptimizer, max_grad_norm: float) -> nn.Module:
        """Shard in place; the optimizer sees this process's parts."""
        del max_grad_norm
        mesh = init_device_mesh(self.device.type, (self.world.size,))
        for unit in units_of(module):
            fully_shard(unit, mesh=mesh, offload_policy=self._policy)
        fully_shard(module, mesh=mesh, offload_policy=self._policy)
        # The first module to be called becomes the root: let it be the root, whatever is called first.
        fully_shard.state(module)._lazy_init()  # type: ignore[attr-defined]
        self.module, self.optimizer, self._wrapped = module, build(), module
        self.kept, self.used = self._slots()
        return module

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients go to their owners with every micro-batch: kept whole they would cost what sharding saves."""
        del last
        yield

    def grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """The norm over all parts of all gradients, which are clipped."""
        norm = super().grad_norm(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def whole(self, *, write: bool = False) -> Iterator[None]:
        """All layers gathered at once, and none given up before the end."""
        parts = self._parts()
        groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
        for part in parts:
            part.unshard()
        for group in groups:  # forwards give weights up, and so does asking a module for its state
            group._to_sharded = lambda: None  # type: ignore[method-assign]
        try:
            yield
            if write:
                self._take_over(groups)
        finally:
            for group in groups:
                del group._to_sharded
            self._wrapped.reset_iter_state()  # all parts are given up, and what forwards left for a backward pass

    def _slots(self) -> tuple[list[Slot], list[Slot]]:
        """The rows of each weight that this process holds."""
        found = []
        for name, p in self._trained():
            assert isinstance(p, DTensor)
            rows = -(-p.shape[0] // self.world.size) if p.ndim else 1  # as torch.chunk cuts
            begin = min(rows * self.world.rank, p.shape[0]) * (p.numel() // p.shape[0])
            found.append(Slot(name, p.numel(), begin, p.to_local().numel(), p))
        return found, found

    def check_sharded(self) -> None:
        """Count the numbers that this process holds."""
        assert self.module is not None
        weights = list(self.module.parameters())
        mine = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in weights)
        slack = sum(p.numel() // max(1, p.shape[0]) for p in weights)  # a row more of each
        check_share(self.name, "weights", mine, sum(p.numel() for p in weights), self.world.size, slack)

    def _parts(self) -> list[FSDPModule]:
        assert self.module is not None
        return [part for part in self.module.modules() if isinstance(part, FSDPModule)]

    def _take_over(self, groups: Sequence[Any]) -> None:
        """Copy this process's rows of the gathered weights into what it keeps of them."""
        with torch.no_grad():
            for param in (p for group in groups for p in group.fsdp_params):
                local = param.sharded_param.to_local()
                rows = -(-param.unsharded_param.shape[0] // self.world.size)
                first = min(rows * self.world.rank, param.unsharded_param.shape[0])
                local.copy_(param.unsharded_param[first : first + len(local)])
