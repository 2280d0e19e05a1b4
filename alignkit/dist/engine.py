"""Prepare, accumulate, clip, step: the only file that imports accelerate."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from alignkit.dist.world import AnyWorld, LocalWorld, ProcessWorld, check_world


PATIENCE = 1800.0
"""Seconds that processes wait for one another at least."""


def _leave() -> None:
    """Leave the process group while its threads can still be joined.

    Whatever holds it would put that off until the interpreter is gone, when a thread of it may end the process.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class DistEngine:
    """The backend of a run. One process and DDP behave alike: gradients are sums over ranks, never means."""

    def __init__(self, dtype: torch.dtype, patience: float = PATIENCE) -> None:
        """`patience`: seconds that processes wait for one another; one of them may be waiting for a server."""
        on_cpu = not torch.cuda.is_available()
        self._accelerator = Accelerator(
            cpu=on_cpu,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=max(PATIENCE, patience)))],
            mixed_precision="no",  # the policy owns autocast; accelerate's would upcast whole logits to float32
        )
        check_world(self._accelerator.num_processes)
        # At the very end, not after each run: a process group cannot be made twice, and a script may train twice.
        atexit.unregister(_leave)
        atexit.register(_leave)
        self.device: torch.device = self._accelerator.device
        self.world: AnyWorld = (
            ProcessWorld(self.device) if self._accelerator.num_processes > 1 else LocalWorld()
        )
        self.dtype = dtype
        self._module: Any = None
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.world.rank == 0

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The module to call for training forwards; the optimizer steps through `step`."""
        self._module = module
        if self.world.size > 1:
            self._module = self._accelerator.prepare(module)
            self._module.forward_sync_buffers = False  # they are the same everywhere
        self._optimizer = optimizer
        prepared: nn.Module = self._module
        return prepared

    def release(self) -> None:
        """Forget the run's modules, so that their memory and their hold on the process group go with it."""
        self._module = self._optimizer = None
        self._accelerator.free_memory()

    def seed(self, number: int) -> None:
        """Start the random numbers of this process's device anew.

        `torch.manual_seed` also leaves a note for every kind of device this machine does not have, at every call.
        """
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The recipe's dtype for the forward pass; float32 means no autocast."""
        on = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype) if on else nullcontext():
            yield

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: ranks exchange gradients at the last one only."""
        with nullcontext() if last or self.world.size == 1 else self._module.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's share of the global loss. DDP averages over ranks, so scale that away."""
        torch.autograd.backward(loss * self.world.size)

    def grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip to `max_norm` (0 = do not) and return the L2 norm before clipping."""
        limit = max_norm if max_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(list(parameters), limit).detach()

    def step(self) -> None:
        """Move the weights and forget the gradients."""
        assert self._optimizer is not None
        self._optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        assert self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)


def launched_rank() -> int:
    """The rank the launcher gave this process, before any process group exists."""
    return int(os.environ.get("RANK", "0"))
