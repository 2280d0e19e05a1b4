"""Activations kept in the host's memory between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

MINIMUM_BYTES = 2**20
"""Smaller tensors stay: moving them takes longer than it is worth."""


class ActivationOffload(saved_tensors_hooks):
    """Around a forward pass: what it saves for backward goes to pinned host memory, weights and small tensors stay.

    `device` is where the model computes; on a CPU nothing has to move. The copies in bfloat16 that autocast makes of
    float32 weights are not told from activations, and move too.
    """

    def __init__(self, device: torch.device, minimum_bytes: int = MINIMUM_BYTES) -> None:
        pinned = device.type == "cuda"

        def pack(x: Tensor) -> Any:
            is_weight = isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)
            # By type: a run's device may leave its number open, a tensor's never does.
            if is_weight or x.device.type != device.type or x.numel() * x.itemsize < minimum_bytes:
                return x
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
            return host.copy_(x, non_blocking=pinned), x.device

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            host, where = packed
            back: Tensor = host.to(where, non_blocking=pinned)
            return back

        super().__init__(pack, unpack)
