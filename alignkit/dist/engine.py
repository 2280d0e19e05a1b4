"""The processes of a run: how they meet, on what device, and how they share its work."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
from torch import Tensor, nn

from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.dist.backend import Backend, BuildOptimizer, OptimizerState
from alignkit.dist.config import DistConfig
from alignkit.dist.launcher import adopt_launcher, launched_size
from alignkit.dist.world import AnyWorld, LocalWorld, ProcessWorld, check_world, launched_backend

PATIENCE = 1800.0
"""Seconds that processes wait for one another at least."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number → what its bits are read as."""
HASHED_AT_A_TIME = 2**22
"""Numbers of a weight; each takes eight bytes for a moment."""


def _leave() -> None:
    """Leave the process group while its threads can still be joined.

    Whatever holds it would put that off until the interpreter is gone, when a thread of it may end the process.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class DistEngine:
    """The processes of a run. One and many behave alike: gradients are sums over ranks, never means."""

    def __init__(self, dtype: torch.dtype, patience: float = PATIENCE, config: DistConfig | None = None) -> None:
        """`patience`: seconds that processes wait for one another; one of them may be waiting for a server.

        Raises:
            EnvironmentProblem: the processes that were launched are not those the recipe asks for, or cannot do it.
        """
        config = config if config is not None else DistConfig()
        adopt_launcher()
        check_world(config.world_size)
        self.device = _device()
        size = launched_size()
        if size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=max(PATIENCE, patience)),
                device_id=self.device if self.device.type == "cuda" else None,
            )
            # At the very end, not after each run: a process group cannot be made twice, and a script may train twice.
            atexit.unregister(_leave)
            atexit.register(_leave)
        self.world: AnyWorld = ProcessWorld(self.device) if size > 1 else LocalWorld()
        self.dtype = dtype
        self.backend = _backend(config, self.world, self.device)
        self.optimizer_state = OptimizerState(self.backend)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.world.rank == 0

    def prepare(self, module: nn.Module, build: BuildOptimizer, max_grad_norm: float) -> nn.Module:
        """The module to call for training forwards.

        `build` makes the optimizer of the module's weights, which `step` moves.

        Raises:
            EnvironmentProblem: the backend did not spread what it was asked to.
        """
        prepared = self.backend.prepare(module, build, max_grad_norm)
        self.backend.check_sharded()
        return prepared

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that `prepare` had built."""
        assert self.backend.optimizer is not None
        return self.backend.optimizer

    def release(self) -> None:
        """Forget the run's modules, so that their memory and their hold on the process group go with it."""
        self.backend.release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seed(self, number: int) -> None:
        """Start the random numbers of this process's device anew.

        `torch.manual_seed` also leaves a note for every kind of device this machine does not have, at every call.
        """
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The recipe's dtype for the forward pass; float32 means no autocast.

        Weights in that dtype are not kept: each is used once a pass, and all of them would stay to its end.
        """
        on = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False) if on else nullcontext():
            yield

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch of an optimizer step."""
        return self.backend.accumulate(last)

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's share of the global loss."""
        self.backend.backward(loss)

    def grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """The L2 norm of the gradient, which `step` will follow clipped to `max_norm` (0 = not)."""
        return self.backend.grad_norm(list(parameters), max_norm)

    def step(self) -> None:
        """Move the weights and forget the gradients."""
        self.backend.step()

    def whole(self, needed: bool = True, *, write: bool = False) -> AbstractContextManager[None]:
        """Around whatever uses weights outside the training forward: there each process has them whole.

        All processes enter it together, and inside it none waits for another. With `write` what the weights become
        inside stays. Not `needed`: they are left as they are.
        """
        return self.backend.whole(write=write) if needed else nullcontext()

    def check_same(self, module: nn.Module) -> None:
        """Compare the weights of all processes, which are whole now.

        Raises:
            RunFailed: they have drifted apart.
        """
        if self.world.size == 1:
            return
        everyone = self.world.gather(weights_hash(module))
        if len(set(everyone)) > 1:
            apart = [str(rank) for rank, found in enumerate(everyone) if found != everyone[0]]
            raise RunFailed(
                f"the weights of rank {', '.join(apart)} are not those of rank 0: the processes have drifted apart, "
                "and each was training a model of its own. Memory or a link at fault, software that differs between "
                "nodes (`alignkit doctor` on each), or code of yours that draws or changes weights on one rank only. "
                "No checkpoint was written of this step; the one before is whole."
            )


@torch.no_grad()
def weights_hash(module: nn.Module) -> str:
    """Tells the weights of a module from all others', in one pass over them on their device."""
    digest = hashlib.sha256()
    for name, p in module.named_parameters():
        bits = p.detach().contiguous().flatten().view(BITS[p.element_size()])
        places = torch.arange(1, min(len(bits), HASHED_AT_A_TIME) + 1, device=bits.device)
        sums = [int((part * places[: len(part)]).sum()) for part in torch.split(bits, HASHED_AT_A_TIME)]
        digest.update(repr((name, tuple(p.shape), sums)).encode())
    return digest.hexdigest()


def _device() -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take a GPU that was asked to be left alone
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise EnvironmentProblem(
            f"process {local} of this machine was launched, but it has {count} GPU(s) (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}). Launch one process a GPU."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _backend(config: DistConfig, world: AnyWorld, device: torch.device) -> Backend:
    launched = launched_backend()
    name: str = config.backend
    if name == "auto":
        name = launched or "ddp"
    elif launched is not None and launched != name:
        raise EnvironmentProblem(
            f"the recipe asks for dist.backend: {name}, and `accelerate launch` was configured for {launched}. Make "
            "the two agree, or leave dist.backend out: auto takes what was launched."
        )
    if world.size == 1 or name == "ddp":
        return Backend(world, device)
    if name == "fsdp2":
        from alignkit.dist.fsdp import Fsdp2

        return Fsdp2(world, device, offload=config.offload_weights)
    from alignkit.dist.zero import Zero

    return Zero(
        world,
        device,
        int(name[-1]),
        offload_optimizer=config.offload_optimizer,
        offload_weights=config.offload_weights,
    )
