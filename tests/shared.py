"""Real data and golden numbers that live outside the checkout, in the folder `ALIGNKIT_SHARED` names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest


def shared_path(*parts: str) -> Path:
    """A path under `ALIGNKIT_SHARED`; the test is skipped where the variable is unset."""
    root = os.environ.get("ALIGNKIT_SHARED")
    if not root:
        pytest.skip("ALIGNKIT_SHARED is not set: it names the folder with data/, models/ and golden/")
    return Path(root, *parts)


def golden_case(file: str, name: str) -> dict[str, Any]:
    """One case (`params`, `inputs`, `outputs`) of a file of golden numbers."""
    cases = json.loads(shared_path("golden", file).read_text())["cases"]
    return next(case for case in cases if case["name"] == name)
