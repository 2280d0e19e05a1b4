"""Rank facts and reductions. Nothing outside `dist` knows how ranks talk."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignkit.core.errors import EnvironmentProblem
from alignkit.dist.launcher import launched_size


class LocalWorld:
    """One process: every reduction is the identity."""

    rank = 0
    size = 1

    def sum(self, x: Tensor) -> Tensor:
        """The value itself."""
        return x

    def mean(self, x: Tensor, over: Tensor) -> Tensor:
        """Mean of `x` where `over` is True; 0 when nowhere."""
        return masked_mean(self, x, over)

    def gather(self, obj: Any) -> list[Any]:
        """A list of this object alone."""
        return [obj]

    def barrier(self) -> None:
        """Nothing to wait for."""


class ProcessWorld:
    """Several processes over torch.distributed's default group."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks, on the device and in the dtype of `x`; the argument is left alone."""
        total = x.detach().to(self._device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def mean(self, x: Tensor, over: Tensor) -> Tensor:
        """Global mean of `x` where `over` is True; 0 when nowhere."""
        return masked_mean(self, x, over)

    def gather(self, obj: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        objects: list[Any] = [None] * self.size
        dist.all_gather_object(objects, obj)
        return objects

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


AnyWorld = LocalWorld | ProcessWorld


def masked_mean(world: AnyWorld, x: Tensor, over: Tensor) -> Tensor:
    """Sum and count are reduced, never means of ranks: those are right only for equal counts."""
    both = torch.stack([x.detach().double().where(over, 0.0).sum(), over.sum().double()])
    total, count = world.sum(both).unbind()
    return (total / count.clamp(min=1)).to(x.dtype)


def check_world(asked: int | None) -> None:
    """Compare the processes that were launched with those the recipe asks for, before they meet.

    Raises:
        EnvironmentProblem: the launcher started fewer than it was told to, or others than the recipe asks for.
    """
    # Asked for several processes of type MULTI_CPU, `accelerate launch` gives one process an address to meet others at.
    lonely = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if lonely:
        raise EnvironmentProblem(
            "accelerate was asked for several processes (it set MASTER_ADDR) but started only one (it set no "
            "WORLD_SIZE), as it does with `distributed_type: MULTI_CPU`. Launch with torchrun, or with an accelerate "
            "config that has `distributed_type: MULTI_GPU` and `use_cpu: true`; for one process, unset MASTER_ADDR."
        )
    launched = launched_size()
    if asked is not None and launched != asked:
        raise EnvironmentProblem(
            f"the recipe asks for {asked} processes (dist.world_size), and {launched} were launched. Launch {asked}, "
            "or leave dist.world_size out: results do not depend on it."
        )


def launched_backend() -> str | None:
    """The backend that `accelerate launch` was configured for; None = none in particular.

    Raises:
        EnvironmentProblem: it was configured for one that alignkit does not have.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        if stage in ("1", "2", "3"):
            return f"zero{stage}"
        raise EnvironmentProblem(
            f"`accelerate launch` was configured for DeepSpeed with zero_stage {stage or 'unset'}; expected 1, 2 or 3. "
            "A DeepSpeed JSON file is not read: the recipe's `dist` block says what it says."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        if os.environ.get("FSDP_VERSION") == "2":
            return "fsdp2"
        raise EnvironmentProblem(
            f"`accelerate launch` was configured for FSDP of version {os.environ.get('FSDP_VERSION', '1')}; set "
            "`fsdp_version: 2` in its config"
        )
    return None
