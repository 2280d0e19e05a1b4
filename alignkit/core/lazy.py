"""`torch` for modules that must be importable without it.

Reading a recipe imports algorithm files for their config, and a misspelt key must be answered in under two seconds;
importing torch alone takes longer. So algorithm and reward files write `from alignkit.core.lazy import torch` and get
a stand-in that imports the real module at its first use, when a run is really starting.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class LazyModule:
    """Imports `name` when an attribute is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

__all__ = ["F", "LazyModule", "torch"]
