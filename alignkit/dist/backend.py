"""How the processes of a run share its weights, gradients and optimizer state. This file: whole on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.dist.world import AnyWorld

BuildOptimizer = Callable[[], torch.optim.Optimizer]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every number it moves."""


@dataclass(frozen=True)
class Slot:
    """The part of a weight whose optimizer state this process keeps.

    Args:
        name: of the weight, as the wrapped module has it.
        numel: numbers of the whole weight.
        begin, length: which of them, in the order of the flattened weight.
        holder: what the optimizer keeps the state by.
        offset: where the part begins in the holder's flattened state.
    """

    name: str
    numel: int
    begin: int
    length: int
    holder: Tensor
    offset: int = 0


class Backend:
    """One process, or several that exchange gradients (DDP). Gradients are sums over ranks, never means."""

    name = "ddp"

    def __init__(self, world: AnyWorld, device: torch.device) -> None:
        self.world, self.device = world, device
        self.module: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._wrapped: Any = None
        self.kept: list[Slot] = []
        """The optimizer state that this process writes into a checkpoint."""
        self.used: list[Slot] = []
        """The optimizer state that this process needs to go on."""

    def prepare(self, module: nn.Module, build: BuildOptimizer, max_grad_norm: float) -> nn.Module:
        """The module to call for training forwards; `build` makes the optimizer of its weights."""
        del max_grad_norm
        self.module, self.optimizer, self._wrapped = module, build(), module
        if self.world.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self._wrapped = nn.parallel.DistributedDataParallel(module, device_ids=devices)
            self._wrapped.forward_sync_buffers = False  # they are the same everywhere
        self.kept, self.used = self._slots()
        prepared: nn.Module = self._wrapped
        return prepared

    def release(self) -> None:
        """Forget the run's modules."""
        self.kept, self.used = [], []
        self.module = self.optimizer = self._wrapped = None

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: ranks exchange gradients at the last one only."""
        with nullcontext() if last or self.world.size == 1 else self._wrapped.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's share of the global loss. Backends average over ranks, so scale that away."""
        torch.autograd.backward(loss * self.world.size)

    def grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """The L2 norm of all gradients; they are clipped to `max_norm` (0 = not) now, or by `step`."""
        limit = max_norm if max_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(parameters, limit).detach()

    def step(self) -> None:
        """Move the weights and forget the gradients."""
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def whole(self, *, write: bool = False) -> Iterator[None]:
        """Every weight whole on every process, as an ordinary tensor; with `write` what it becomes there stays."""
        del write
        yield

    def _slots(self) -> tuple[list[Slot], list[Slot]]:
        """The optimizer state that this process writes into a checkpoint, and what it needs to go on."""
        used = [Slot(name, p.numel(), 0, p.numel(), p) for name, p in self._trained()]
        return used if self.world.rank == 0 else [], used

    def check_sharded(self) -> None:
        """Nothing to check: everything is everywhere.

        Raises:
            EnvironmentProblem: in other backends, when a process holds more than its part.
        """

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        assert self.module is not None
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]


def units_of(module: nn.Module) -> list[nn.Module]:
    """The decoder layers in a module: what is gathered, computed and given up at a time."""
    names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


def check_share(backend: str, what: str, mine: int, total: int, size: int, slack: int) -> None:
    """Refuse to go on where a process holds more than its part: it would train, and need the memory of one alone.

    Args:
        mine, total: numbers that this process holds, and that there are.
        slack: how many more padding may add.

    Raises:
        EnvironmentProblem: it holds more.
    """
    if mine * size > total + slack * size:
        raise EnvironmentProblem(
            f"dist.backend: {backend} was asked to spread the {what} over {size} processes, but this one holds "
            f"{mine:,} of {total:,} numbers: nothing was spread. Check that every process sees the others (WORLD_SIZE, "
            "MASTER_ADDR), and the versions of torch and deepspeed; `alignkit doctor` lists them."
        )


class OptimizerState:
    """The optimizer's state as a part of checkpoints: every process writes what it keeps, whatever the backend.

    Pieces are of the flattened weights, so another backend or number of processes can put them together anew.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def state_dict(self) -> dict[str, Any]:
        """Rates, and of each kept part of a weight its place and what the optimizer knows of it."""
        optimizer = self._backend.optimizer
        assert optimizer is not None
        kept = {}
        for slot in self._backend.kept:
            if (state := optimizer.state.get(slot.holder)) and slot.length:
                moments = {key: _part(state[key], slot) for key in MOMENTS}
                kept[slot.name] = {
                    "begin": slot.begin,
                    "numel": slot.numel,
                    "step": float(state["step"]),
                    **moments,
                }
        rates = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in optimizer.param_groups]
        return {"layout": self._layout(), "rates": rates, "parts": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what this process wrote."""
        self.load_parts([state])

    def load_parts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from what all processes of a run wrote.

        Raises:
            RunFailed: together they lack a part of a weight that this process needs.
        """
        optimizer = self._backend.optimizer
        assert optimizer is not None
        for group, rates in zip(optimizer.param_groups, states[0]["rates"], strict=True):
            group.update(rates)
        if not any(state["parts"] for state in states):
            return
        with torch.no_grad():
            for slot in self._backend.used:
                if slot.length:
                    _restore(
                        optimizer, slot, [state["parts"][slot.name] for state in states if slot.name in state["parts"]]
                    )

    def needs_all(self, state: dict[str, Any]) -> bool:
        """Whether what this process wrote is not all that it needs: its layout, or that of the run, is another."""
        return bool(state["layout"] != self._layout()) or self._backend.name == "ddp"

    def _layout(self) -> str:
        return f"{self._backend.name} {self._backend.world.size}"


def _part(state: Tensor, slot: Slot) -> Tensor:
    """This part of a weight in its optimizer state, flat; a view."""
    local = state.to_local() if hasattr(state, "to_local") else state
    return local.flatten()[slot.offset : slot.offset + slot.length]


def _restore(optimizer: torch.optim.Optimizer, slot: Slot, pieces: Sequence[dict[str, Any]]) -> None:
    if not pieces:
        raise RunFailed(
            f"the checkpoint has no optimizer state of {slot.name}, which this run trains: it is of another recipe, or "
            "of another version of alignkit"
        )
    state = optimizer.state[slot.holder]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=slot.holder.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(slot.holder, memory_format=torch.preserve_format)
    state["step"].fill_(pieces[0]["step"])
    covered = 0
    for key in MOMENTS:
        target = _part(state[key], slot)
        for piece in pieces:
            first = max(slot.begin, piece["begin"])
            stop = min(slot.begin + slot.length, piece["begin"] + len(piece[key]))
            if first < stop:
                found = piece[key][first - piece["begin"] : stop - piece["begin"]]
                target[first - slot.begin : stop - slot.begin].copy_(found)
                covered += stop - first
    if covered != len(MOMENTS) * slot.length:
        raise RunFailed(
            f"the checkpoint holds {covered // len(MOMENTS):,} of {slot.length:,} numbers of the optimizer state of "
            f"{slot.name} that this process needs: the folder of a rank is missing, or was written by another run"
        )
