"""Modules without weights that compute without numbers, so that the code of a real step tells what it keeps alive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._pytree import tree_leaves

from alignkit.dist.engine import DistEngine
from alignkit.dist.world import LocalWorld
from alignkit.memory.live import LiveMemory
from alignkit.models import attention
from alignkit.ops import logps

_ATEN, _MKLDNN, _DEVICE = torch.ops.aten, torch.ops.mkldnn, torch.ops.prim.device.default
_CPU = torch.device("cpu")
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is raised too
MOST_BLOCKS = 64
"""Blocks into which the passes over a chunk of logits are cut at most; real ones may be many thousands."""


class StandIns(LiveMemory):  # type: ignore[no-untyped-call]
    """Within, whatever is computed from a stand-in is one too: it has a shape and a size, and no numbers.

    Batches keep theirs, so that layouts, masks and chunks are those of a real step. A truth that would be read off a
    stand-in ("is it finite?") holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def compute(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation on shapes where a stand-in takes part, else on numbers."""
        if func is _DEVICE:  # asked far more often than all else
            return _CPU
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is _ATEN._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1
        if func is _ATEN._fused_sdp_choice.default:
            return int(SDPBackend.FLASH_ATTENTION.value)
        if func is _ATEN.index.Tensor:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        with self._fake:
            if func is _MKLDNN._reorder_linear_weight.default:
                return torch.empty_like(args[0])
            if func in (_MKLDNN._linear_pointwise.default, _MKLDNN._linear_pointwise.binary):
                return args[0].new_empty(*args[0].shape[:-1], _rows(args))
            return func(*args, **kwargs)

    def of(self, module: nn.Module) -> None:
        """Put stand-ins in the place of a module's parameters and buffers, which are on the meta device."""
        known: dict[int, nn.Parameter] = {}
        for inner in module.modules():
            for name, parameter in inner.named_parameters(recurse=False):
                if id(parameter) not in known:  # tied weights stay tied
                    known[id(parameter)] = nn.Parameter(self._like(parameter), requires_grad=parameter.requires_grad)
                inner.register_parameter(name, known[id(parameter)])
            for name, buffer in inner.named_buffers(recurse=False):
                setattr(inner, name, self._like(buffer))

    def _like(self, x: Tensor) -> Tensor:
        with self._fake:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the places where it is True: how many they are depends on its numbers, which are then still known."""
    is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return list(cast(Tensor, index).nonzero(as_tuple=True)) if is_mask else [index]


def _rows(args: Any) -> int:
    """Numbers a row that a product laid out for a CPU gives: those of its last two-dimensional argument."""
    return int([x for x in args if isinstance(x, Tensor) and x.ndim == 2][-1].shape[0])


class Here:
    """In the place of a `DistEngine`: one process, with stand-ins that say they are on the CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.world = _CPU, dtype, LocalWorld()

    autocast: Any = DistEngine.autocast

    def as_engine(self) -> DistEngine:
        """What a policy is given."""
        return cast(DistEngine, self)


@contextmanager
def kernels_of(device: str, logits: int) -> Iterator[None]:
    """Within, code goes the way it goes on this kind of device. `logits`: numbers of the largest chunk of them."""
    blocks, kernels = dict(logps.BLOCK_ELEMENTS), attention.KERNELS
    attention.KERNELS = device
    logps.BLOCK_ELEMENTS.clear()
    if device in blocks:
        logps.BLOCK_ELEMENTS["cpu"] = max(blocks[device], logits // MOST_BLOCKS)
    try:
        yield
    finally:
        attention.KERNELS = kernels
        logps.BLOCK_ELEMENTS.update(blocks)
