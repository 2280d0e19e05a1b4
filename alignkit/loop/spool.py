"""What a long round has written and scored so far, on disk, so that a run killed in it need not begin it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignkit.core.contracts import World
from alignkit.core.types import Completion, Group, Score

SPOOLED = "rounds"
"""Name of the folder within that of the run."""


class DiskSpool:
    """Groups of the newest round, phase by phase, each file whole or absent.

    What is found is what this run wrote at the same version, from the same groups, with as many processes: a resumed
    run reaches a version with the same weights, so it is what would be written again.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world

    def __call__(
        self, phase: str, version: int, turn: int, groups: list[Group], work: Callable[[list[Group]], list[Group]]
    ) -> list[Group]:
        """`work(groups)`, or what came of it before this run was killed."""
        name = f"step-{version}-{turn}-{phase}-{self._world.rank}-of-{self._world.size}.json"
        found = self._read(self._folder / name, groups)
        if all(self._world.gather(found is not None)):  # scoring may go over all processes, so all do it or none
            assert found is not None
            return found
        done = work(groups)
        self._write(self._folder / name, groups, done, version)
        return done

    def _read(self, path: Path, groups: list[Group]) -> list[Group] | None:
        if not path.is_file():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["of"] != [group.id for group in groups]:
            return None
        by_id = {group.id: group for group in groups}
        return [
            replace(
                by_id[name],
                completions=[_completion(completion) for completion in completions],
                fields={**by_id[name].fields, **fields},
            )
            for name, completions, fields in kept["groups"]
        ]

    def _write(self, path: Path, groups: list[Group], done: list[Group], version: int) -> None:
        known = {group.id: group.fields for group in groups}
        kept = [
            (
                group.id,
                [asdict(completion) for completion in group.completions],
                {name: value for name, value in group.fields.items() if name not in known[group.id]},
            )
            for group in done
        ]
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = f"-{self._world.rank}-of-{self._world.size}.json"
        for old in self._folder.glob(f"step-*{mine}"):
            if not old.name.startswith(f"step-{version}-"):
                old.unlink()
        temporary = path.with_name(f".writing-{path.name}")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"of": [group.id for group in groups], "groups": kept}))
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without what it names
        temporary.replace(path)


def _completion(kept: dict[str, Any]) -> Completion:
    return Completion(**{**kept, "scores": {name: Score(**score) for name, score in kept["scores"].items()}})
