"""Bytes of the tensors that are alive, counted as operations make them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, every storage counts from the operation that makes it until nobody holds it any more.

    Views share a storage and count once. What a kernel takes and gives back inside one call is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._gradients: set[int] = set()
        self.live: int = 0
        """Bytes."""
        self.gradients: int = 0
        """How many of them are gradients that `watch_gradients` has seen arrive."""
        self.peak: int = 0
        self.peak_without_gradients: int = 0

    def restart(self) -> None:
        """Measure peaks from here on."""
        self.peak, self.peak_without_gradients = self.live, self.live - self.gradients

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that were there before."""
        for x in tensors:
            self._note(x)

    def watch_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Tell gradients apart from the moment each stands in its parameter's `grad`."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key in self._storages and key not in self._gradients:
            self._gradients.add(key)
            self.gradients += self._storages[key][1]

    def _note(self, x: Tensor) -> None:
        # What is laid out for another library has no storage of its own; the tensor stands for it.
        opaque = x.layout is not torch.strided
        held: Any = x if opaque else x.untyped_storage()
        key = id(held)
        if key in self._storages:
            return
        size = x.numel() * x.itemsize if opaque else held.nbytes()

        def gone(_: Any) -> None:
            del self._storages[key]
            self.live -= size
            if key in self._gradients:
                self._gradients.remove(key)
                self.gradients -= size

        self._storages[key] = (weakref.ref(held, gone), size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_without_gradients = max(self.peak_without_gradients, self.live - self.gradients)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        out = self.compute(func, args, kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x)
        return out

    def compute(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)
