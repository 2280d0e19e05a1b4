"""ZeRO 1, 2 and 3 by DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.core.errors import EnvironmentProblem
from alignkit.dist.backend import Backend, BuildOptimizer, Slot, check_share, units_of
from alignkit.dist.world import AnyWorld

BUCKET = 2**28
"""Numbers that are exchanged at a time, at most."""


class Zero(Backend):
    """A DeepSpeed engine around the module, with this package's optimizer inside its own."""

    def __init__(
        self, world: AnyWorld, device: torch.device, stage: int, *, offload_optimizer: bool, offload_weights: bool
    ) -> None:
        super().__init__(world, device)
        self.name, self._stage = f"zero{stage}", stage
        self._offload_optimizer, self._offload_weights = offload_optimizer, offload_weights
        self._deepspeed = _deepspeed()

    def prepare(self, module: nn.Module, build: BuildOptimizer, max_grad_norm: float) -> nn.Module:
        """Let DeepSpeed take the optimizer's state, the gradients and, in stage 3, the weights apart."""
        sizes = {id(p): p.numel() for p in module.parameters()}
        optimizer = build()
        self._order = [list(group["params"]) for group in optimizer.param_groups]
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._sizes = sizes
        if self._stage == 3:
            units = units_of(module)
            if units:
                self._deepspeed.utils.set_z3_leaf_modules(module, list({type(unit) for unit in units}))
            for unit in units:
                unit.register_forward_pre_hook(_ask_for_gradients)
            inside = {id(p) for unit in units for p in unit.parameters()}
            self._outside = [p for p in module.parameters() if id(p) not in inside]
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._config(max_grad_norm), dist_init_required=False
        )
        if self._stage == 3:
            # The head is read by the loss and not by its own layer: what is in no decoder layer stays for a whole pass.
            for p in self._outside:
                self._deepspeed.zero.register_external_parameter(module, p)
        if self._engine.zero_optimization_stage() != self._stage:
            raise EnvironmentProblem(
                f"dist.backend: {self.name} was asked for, and DeepSpeed runs stage "
                f"{self._engine.zero_optimization_stage()}; report this with the versions that `alignkit doctor` lists"
            )
        self.module, self.optimizer, self._wrapped = module, optimizer, self._engine
        self.kept, self.used = self._slots()
        prepared: nn.Module = self._engine
        return prepared

    def release(self) -> None:
        """Forget the engine and its hooks."""
        if self._wrapped is not None:
            self._engine.destroy()
            del self._engine
        super().release()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Tell DeepSpeed which micro-batch is the last."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over ranks too."""
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """The norm over all parts; `step` clips."""
        del parameters, max_norm
        zero = self._engine.optimizer
        found = zero._get_norm_groups() if self._stage == 3 else [zero.scaled_global_norm()]
        norms = torch.stack([torch.as_tensor(norm, dtype=torch.float32, device=self.device) for norm in found])
        broken = bool((norms < 0).any())  # how it says that a gradient is not finite
        return norms.new_tensor(float("inf")) if broken else torch.linalg.vector_norm(norms)

    def step(self) -> None:
        """Move the weights and forget the gradients."""
        self._engine.step()

    @contextmanager
    def whole(self, *, write: bool = False) -> Iterator[None]:
        """Gathered in stage 3, where no layer may give its weights up meanwhile."""
        zero = self._engine.optimizer
        if self._stage < 3:
            yield
            if write:
                zero.refresh_fp32_params()
            return
        weights = list(self._engine.module.parameters())
        offload, coordinator = zero.parameter_offload, zero.parameter_offload.get_param_coordinator()
        with self._deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if write else None):
            for p in weights:
                p.ds_active_sub_modules.clear()
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            coordinator.reset_step = lambda: None  # at a forward it waits for other processes, which may have none
            try:
                yield
            finally:
                del coordinator.reset_step
                if not coordinator.is_invalid_trace():
                    coordinator._invalidate_trace()
                offload._register_deepspeed_module(offload.module)
        if write:
            zero.refresh_fp32_params()

    def _slots(self) -> tuple[list[Slot], list[Slot]]:
        found = self._flat_slots() if self._stage < 3 else self._partitioned_slots()
        return found, found

    def check_sharded(self) -> None:
        """Count the numbers that this process keeps state of, and in stage 3 holds."""
        zero, size = self._engine.optimizer, self.world.size
        total = sum(self._sizes[id(p)] for group in self._order for p in group)
        if self._stage < 3:
            mine = sum(part.numel() for part in zero.single_partition_of_fp32_groups)
            check_share(self.name, "optimizer state", mine, total, size, 64 * len(self._order))
            return
        weights = list(self._engine.module.parameters())
        mine = sum(p.ds_tensor.numel() for p in weights)
        check_share(self.name, "weights", mine, sum(self._sizes.values()), size, len(weights))

    def _flat_slots(self) -> list[Slot]:
        zero, found = self._engine.optimizer, []
        for i, params in enumerate(zero.bit16_groups):
            flat, mine = zero.bit16_groups_flat[i], zero.single_partition_of_fp32_groups[i]
            first = self.world.rank * mine.numel()
            for p in params:
                place = (p.data_ptr() - flat.data_ptr()) // p.element_size()
                begin, stop = max(place, first), min(place + p.numel(), first + mine.numel())
                if begin < stop:
                    name = self._names[id(p)]
                    found.append(Slot(name, p.numel(), begin - place, stop - begin, mine, begin - first))
        return found

    def _partitioned_slots(self) -> list[Slot]:
        zero, found = self._engine.optimizer, []
        for params, holder in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for p in params:
                part = p.ds_tensor.ds_numel
                begin = self.world.rank * part
                length = max(0, min(part, p.ds_numel - begin))
                found.append(Slot(self._names[id(p)], p.ds_numel, begin, length, holder, offset))
                offset += part
        return found

    def _config(self, max_grad_norm: float) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self._stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "overlap_comm": self.device.type == "cuda",
            "contiguous_gradients": True,
        }
        if self._stage == 3:
            # A layer is fetched as one: to keep its small weights everywhere would save nothing.
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": BUCKET}
        if self._offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self._offload_weights:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }


def _ask_for_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Behind frozen embeddings a layer's input needs no gradient, and DeepSpeed would take the layer for done with its
    backward pass before that has begun."""
    del module
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad:
                x.requires_grad_(True)


def _deepspeed() -> Any:
    """DeepSpeed.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise EnvironmentProblem(
            f"dist.backend: ZeRO needs DeepSpeed, which cannot be imported ({error}): pip install "
            "'alignkit[deepspeed]', or use dist.backend: fsdp2, which needs nothing more"
        ) from error
    return deepspeed
