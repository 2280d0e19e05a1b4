"""`scripts/tiny_dpo.py` and `scripts/tiny_grpo.py` as modules: scripts are not part of the package."""

import importlib.util
from pathlib import Path
from types import ModuleType


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_dpo, tiny_grpo = _load("tiny_dpo"), _load("tiny_grpo")
