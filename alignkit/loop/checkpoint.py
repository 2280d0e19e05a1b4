"""Checkpoints: written aside, hashed, renamed, rotated; blind to what they hold.

checkpoint-<step>/
  manifest.json              size and sha256 of every other file
  <part>.json, .safetensors  one pair a named part; tensors apart, the rest as JSON
  rank-<r>/…                 parts every rank has its own of
  …                          whatever `write_model` puts there: a folder transformers loads
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file

from alignkit.core.contracts import Stateful
from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.dist.world import AnyWorld

MANIFEST = "manifest.json"


@runtime_checkable
class Regrouped(Stateful, Protocol):
    """State of which every rank has a part, and that another number of ranks can take up."""

    def needs_all(self, state: dict[str, Any]) -> bool:
        """Whether this rank needs more than the part it wrote, although as many ranks run now."""
        ...

    def load_parts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the parts of all ranks that wrote, in their order."""
        ...


class Checkpoints:
    """The checkpoints of one run folder. Every rank calls every method."""

    def __init__(self, folder: Path, limit: int, world: AnyWorld) -> None:
        self._folder, self._limit, self._world = folder, limit, world

    def save(
        self,
        step: int,
        shared: Mapping[str, Stateful],
        local: Mapping[str, Stateful],
        write_model: Callable[[Path], None],
        best: int | None = None,
    ) -> Path:
        """Write `checkpoint-<step>` whole or not at all, unless it is there; then drop the oldest ones but the `best`.

        `shared` parts are equal on all ranks and written once; `local` ones are written by every rank.

        Raises:
            EnvironmentProblem: the disk is full or not writable; the checkpoints before are untouched.
        """
        final, temporary = self.path(step), self._folder / f".writing-checkpoint-{step}"
        if step in self.steps():
            self._rotate(best)
            return final
        try:
            if self._world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self._world.barrier()
            mine = temporary / f"rank-{self._world.rank}"
            mine.mkdir()
            for name, part in local.items():
                write_state(mine, name, part.state_dict())
            if self._world.rank == 0:
                for name, part in shared.items():
                    write_state(temporary, name, part.state_dict())
                write_model(temporary)
            self._world.barrier()
            if self._world.rank == 0:
                _seal(temporary)
                temporary.rename(final)
                _sync(self._folder)
            self._rotate(best)
            self._world.barrier()
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_disk_problem(error):
                raise disk_problem(final, error) from error
            raise
        return final

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step is, or would be."""
        return self._folder / f"checkpoint-{step}"

    def ranks(self, path: Path) -> int:
        """How many processes wrote a checkpoint."""
        return len(list(path.glob("rank-*")))

    def steps(self) -> list[int]:
        """Steps of all checkpoints, valid or not, newest first."""
        found = [p.name.removeprefix("checkpoint-") for p in self._folder.glob("checkpoint-*")]
        return sorted((int(step) for step in found if step.isdigit()), reverse=True)

    def newest_valid(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose every file has its recorded hash; says which ones it passes over and why.

        None when there is no checkpoint at all.

        Raises:
            RunFailed: there are checkpoints, but none is whole.
        """
        found: Path | None = None
        if self._world.rank == 0:
            for step in self.steps():
                path = self.path(step)
                fault = find_fault(path)
                if fault is None:
                    found = path
                    break
                say(f"{path} is not usable ({fault}); trying the one before")
        chosen: Path | None = self._world.gather(found)[0]
        if chosen is None and self.steps():
            raise RunFailed(
                f"no checkpoint in {self._folder} is whole, so there is nothing to continue from. Put one back from a "
                "copy, or start anew with `alignkit train RECIPE --overwrite`."
            )
        return chosen

    def drop_after(self, step: int) -> None:
        """Remove checkpoints newer than `step` and half-written ones: the run goes on from there.

        Left in place, a broken one would pass for saved when its step comes again, and push whole ones out.
        """
        if self._world.rank == 0:
            newer = [self.path(later) for later in self.steps() if later > step]
            for path in [*newer, *self._folder.glob(".writing-checkpoint-*")]:
                shutil.rmtree(path)
        self._world.barrier()

    def load(self, path: Path, shared: Mapping[str, Stateful], local: Mapping[str, Stateful]) -> None:
        """Restore every part; those that each rank has its own of from what all ranks wrote, where it takes that.

        Raises:
            RunFailed: the checkpoint is of a version that kept other state.
        """
        size, ranks = self._world.size, self.ranks(path)
        for name, part in {**shared, **local}.items():
            try:
                if name in shared:
                    part.load_state_dict(read_state(path, name))
                    continue
                state = read_state(path / f"rank-{self._world.rank % ranks}", name)
                if size == ranks and not (isinstance(part, Regrouped) and part.needs_all(state)):
                    part.load_state_dict(state)
                else:
                    assert isinstance(part, Regrouped), name
                    part.load_parts([read_state(path / f"rank-{rank}", name) for rank in range(ranks)])
            except (KeyError, FileNotFoundError) as error:
                raise RunFailed(
                    f"{path}: its part {name!r} lacks {error}: another version of alignkit, or of your algorithm, "
                    "wrote it. Resume with the version that run.lock names, or start anew in another output_dir."
                ) from error

    def _rotate(self, best: int | None) -> None:
        for step in self.steps()[self._limit :] if self._world.rank == 0 else ():
            if step != best:
                shutil.rmtree(self.path(step))


def find_fault(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return "no manifest: it was not finished"
    try:
        entries: dict[str, dict[str, Any]] = json.loads(manifest.read_text())
    except json.JSONDecodeError:
        return "its manifest is cut short"
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} does not have its recorded sha256"
    return None


def write_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """A nested state as `<name>.json` and, if it holds tensors, `<name>.safetensors`. No pickle."""
    tensors: dict[str, torch.Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
            return {"$tensor": path}
        if isinstance(value, dict):
            return {"$pairs": [[k, encode(v, f"{path}/{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            return [encode(v, f"{path}/{i}") for i, v in enumerate(value)]
        if value is None or isinstance(value, str | int | float | bool):
            return value
        raise TypeError(f"state of {name!r} at {path}: {type(value).__name__} is neither tensor, number, text nor list")

    encoded = encode(state, name)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(encoded), encoding="utf-8")


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """What `write_state` wrote; keys and tensors come back as they were, tuples as lists."""
    tensors = load_file(folder / f"{name}.safetensors") if (folder / f"{name}.safetensors").is_file() else {}

    def decode(value: Any) -> Any:
        if isinstance(value, dict):
            if "$tensor" in value:
                return tensors[value["$tensor"]]
            return {k: decode(v) for k, v in value["$pairs"]}
        return [decode(v) for v in value] if isinstance(value, list) else value

    state: dict[str, Any] = decode(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    return state


def is_disk_problem(error: Exception) -> bool:
    """Whether the operating system refused; safetensors wraps its error in one of its own and keeps only the text."""
    return (isinstance(error, OSError) and error.errno is not None) or "os error" in str(error).lower()


def disk_problem(path: Path, error: Exception) -> EnvironmentProblem:
    """What to tell a user whose disk refuses a write."""
    full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error)
    parent = next(p for p in [path, *path.parents] if p.exists())
    free = shutil.disk_usage(parent).free / 2**20
    cause = f"the disk is full ({free:.0f} MiB free)" if full else str(error)
    return EnvironmentProblem(
        f"cannot write {path}: {cause}. What was saved before is untouched: free some space (or lower "
        "train.save_total_limit) and continue with `alignkit resume`."
    )


def _seal(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")
    for path in [*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
