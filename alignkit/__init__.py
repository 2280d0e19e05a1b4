"""alignkit: preference optimization, every method one recipe away on one engine.

The public face. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.core.contracts import Algorithm, RewardSource
    from alignkit.core.registry import register
    from alignkit.recipe import Recipe, load_recipe
    from alignkit.run import resume, train

__version__ = "0.1.0"

_HOME = {
    "Algorithm": "alignkit.core.contracts",
    "Recipe": "alignkit.recipe",
    "RewardSource": "alignkit.core.contracts",
    "load_recipe": "alignkit.recipe",
    "register": "alignkit.core.registry",
    "resume": "alignkit.run",
    "train": "alignkit.run",
}

__all__ = ["Algorithm", "Recipe", "RewardSource", "__version__", "load_recipe", "register", "resume", "train"]


def _matters(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING and "accelerator" not in str(record.msg)


# Where DeepSpeed is installed transformers imports it, and it tells everybody on stdout what it makes of the machine.
logging.getLogger("DeepSpeed").addFilter(_matters)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
