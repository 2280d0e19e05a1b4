"""`scripts/tiny_dpo.py` as a module: scripts are not part of the package."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("tiny_dpo", Path(__file__).parents[2] / "scripts" / "tiny_dpo.py")
assert _spec is not None
assert _spec.loader is not None
tiny_dpo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_dpo)
