"""What a prediction is asked about: a model's config, and the memory there is. Torch-free."""

from __future__ import annotations

import json
import re
from pathlib import Path

from alignkit.core.errors import RecipeError

GIB, MIB = 2**30, 2**20
UNITS = {"": GIB, "g": GIB, "gb": GIB, "gib": GIB, "m": MIB, "mb": MIB, "mib": MIB}
"""A card sold with 80 GB has 80 GiB, about."""
LEFT = 0.08
"""Share of a GPU that is left to what is no tensor: CUDA's context, buffers of libraries, gaps between tensors."""


def parse_memory(text: str) -> int:
    """`80GB`, `24`, `512 MiB` → bytes. Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS or not float(found[1]):
        raise RecipeError(f"--gpu-memory {text!r} is no amount of memory; expected one such as 80GB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def find_config(name: str) -> str | None:
    """A path that transformers reads a model's config from: its folder, or the hub's cache. Never asks a network."""
    adapter = Path(name) / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else name
    if (Path(base) / "config.json").is_file():
        return str(base)
    if Path(base).exists() or base.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base, "config.json")
    return cached if isinstance(cached, str) else None
