"""Log-probabilities of a frozen model, kept on disk under a hash of the model and of every row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.core.contracts import World
from alignkit.core.errors import RunFailed
from alignkit.core.types import Batch, Unit
from alignkit.data.collate import collate, select_units

Bar = Callable[[list[list[int]], str], Iterable[list[int]]]
"""Iterates over chunks while showing how many are done, under a title."""

CHUNK_TOKENS = 8192
"""Tokens of one forward while filling. Fixed, so that cached numbers depend on no setting of a run."""


def cache_folder() -> Path:
    """$ALIGNKIT_CACHE, else alignkit/ in the user's cache folder."""
    if "ALIGNKIT_CACHE" in os.environ:
        return Path(os.environ["ALIGNKIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "alignkit"


def row_keys(batch: Batch) -> list[bytes]:
    """What makes a row the row it is, per row: its tokens and which of them are trained."""
    tokens, mask = batch.inputs["tokens"].numpy(), batch["mask"].numpy()
    lengths = batch.inputs["attention"].sum(-1).tolist()
    keys = []
    for i, length in enumerate(lengths):
        digest = hashlib.sha256(np.ascontiguousarray(tokens[i, :length]).tobytes())
        digest.update(np.packbits(mask[i, :length]).tobytes())
        keys.append(digest.digest())
    return keys


class LogpsCache:
    """Row → log-probabilities of its trained tokens, for one frozen model.

    `identity` names the model, its dtype and the software: whatever changes its numbers.
    """

    def __init__(self, identity: str, world: World, folder: Path | None = None) -> None:
        self._identity, self._world = identity, world
        self._folder = folder if folder is not None else cache_folder() / "logps"
        self._rows: dict[bytes, Tensor] = {}

    def lookup(self, batch: Batch) -> Tensor | None:
        """The [N, L] column of a batch, or None when a real row of it is unknown."""
        mask = batch["mask"]
        full = torch.zeros(mask.shape)
        for i, key in enumerate(row_keys(batch)):
            if not mask[i].any():
                continue
            found = self._rows.get(key)
            if found is None:
                return None
            full[i, mask[i]] = found
        return full

    def fill(
        self,
        units: Sequence[Unit],
        score: Callable[[Batch], Tensor],
        cut: Callable[[Batch, int], list[list[int]]],
        progress: Callable[[str], None],
        bar: Bar,
    ) -> None:
        """Know every row of `units`, from disk or by scoring. All ranks pass the same units and share the work.

        `cut` gives the units of a batch in parts of so many tokens, `progress` takes a line for the user, `bar` shows
        how far an iteration is.
        """
        rows: dict[bytes, Unit] = {}
        for unit in units:
            for row in unit:
                key = row_keys(collate([(row,)]))[0]
                if key not in self._rows and any(row.trained):
                    rows[key] = (row,)
        if not rows:
            return
        keys = sorted(rows)
        path = self._folder / f"{hashlib.sha256(self._identity.encode() + b''.join(keys)).hexdigest()[:32]}.safetensors"
        if self._read(path, keys):
            progress(f"reference log-probabilities of {len(keys)} rows found in {path}")
            return
        progress(f"scoring {len(keys)} rows once with the reference")
        batch = collate([rows[key] for key in keys])
        values: dict[int, np.ndarray] = {}
        chunks = cut(batch, CHUNK_TOKENS)[self._world.rank :: self._world.size]
        for chunk in bar(chunks, "reference"):
            micro = select_units(batch, chunk)
            logps = score(micro).float().cpu()
            for j, i in enumerate(chunk):
                values[i] = logps[j][micro["mask"][j]].numpy()
        for part in self._world.gather(values):
            self._rows.update({keys[i]: torch.from_numpy(value) for i, value in part.items()})
        flat = torch.cat([self._rows[key] for key in keys])
        if not bool(torch.isfinite(flat).all()):
            raise RunFailed(
                "the reference model answers nan or infinity: its weights are broken, or its dtype overflows. Look for "
                "nan in the weights of model.name_or_path, or try model.dtype: float32."
            )
        if self._world.rank == 0:
            self._write(path, keys, flat, progress)

    def _read(self, path: Path, keys: list[bytes]) -> bool:
        stored = _load(path)
        if not all(self._world.gather(bool(stored))):
            return False
        lengths, values = stored["lengths"].tolist(), stored["logps"]
        for key, value in zip(keys, torch.split(values, lengths), strict=True):
            self._rows[key] = value
        return True

    def _write(self, path: Path, keys: list[bytes], flat: Tensor, progress: Callable[[str], None]) -> None:
        lengths = torch.tensor([self._rows[key].numel() for key in keys])
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"lengths": lengths, "logps": flat, "checksum": _checksum(lengths, flat)}, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:  # the numbers are in memory; only the next run pays
            with suppress(OSError):
                temporary.unlink()
            progress(f"reference log-probabilities were not kept in {path.parent}: {error}")


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a cache file; none where it is missing, unreadable or damaged, so that it is scored again."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError):
        return {}
    if stored.keys() != {"lengths", "logps", "checksum"}:  # another version of this program wrote it
        return {}
    intact = torch.equal(stored["checksum"], _checksum(stored["lengths"], stored["logps"]))
    return stored if intact else {}


def _checksum(lengths: Tensor, logps: Tensor) -> Tensor:
    """sha256 of the values [32]: safetensors notices a short file, not a flipped bit."""
    digest = hashlib.sha256(lengths.numpy().tobytes() + logps.numpy().tobytes()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
