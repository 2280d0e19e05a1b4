"""Pure tensor functions; torch only.

Names resolve on first use, so an algorithm file that says `ops.sequence_sum` can be imported without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.ops.logps import shifted, token_logps
    from alignkit.ops.ranking import logistic_pair
    from alignkit.ops.reduce import sequence_mean, sequence_sum

_HOME = {
    "logistic_pair": "ranking",
    "sequence_mean": "reduce",
    "sequence_sum": "reduce",
    "shifted": "logps",
    "token_logps": "logps",
}

__all__ = ["logistic_pair", "sequence_mean", "sequence_sum", "shifted", "token_logps"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
