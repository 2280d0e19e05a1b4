"""Asking models for judgements: each question once, with what was answered kept in memory and, if wanted, in a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.core.contracts import Models
from alignkit.core.errors import EnvironmentProblem, RecipeError
from alignkit.core.templates import strip_thinking

CHUNK = 256
"""Prompts asked at a time: what was answered is kept even where a later one fails."""


def need_models(models: Models | None, reward: str) -> Models:
    """The models to ask. Raises RecipeError where a reward is used without a run, which has them."""
    if models is None:
        raise RecipeError(f"reward {reward!r} asks the models of a run, and here are none: it can score only in a run")
    return models


class Answers:
    """What models answered, by a hash of all it depends on; in a file too, where there is one. `hits` are counted."""

    def __init__(self, path: str | None) -> None:
        self.hits = 0
        self._file = None if path is None else Path(path).expanduser()
        self._found: dict[str, dict[str, Any]] = {}
        self._gap = ""
        if self._file is not None and self._file.is_dir():
            raise RecipeError(f"reward 'judge': args.cache {path!r} is a folder; expected the name of a file")
        if self._file is not None and self._file.exists():
            self._read(self._file)

    @property
    def lasting(self) -> bool:
        """Whether they outlive the process."""
        return self._file is not None

    def forget_others(self, identities: Iterable[str]) -> None:
        """Drop from memory what models said whose weights are gone."""
        self._found = {name: self._found.get(name, {}) for name in identities}

    def of(
        self, identity: str, settings: Sequence[Any], prompts: Sequence[str], call: Callable[[list[str]], list[Any]]
    ) -> list[Any]:
        """The answer to each prompt, from `call` where there is none yet."""
        known = self._found.setdefault(identity, {})
        keys = [hashlib.sha256(json.dumps([*settings, prompt]).encode()).hexdigest() for prompt in prompts]
        missing = {name: prompt for name, prompt in zip(keys, prompts, strict=True) if name not in known}
        self.hits += len(prompts) - len(missing)
        names = list(missing)
        for start in range(0, len(names), CHUNK):
            some = names[start : start + CHUNK]
            new = dict(zip(some, call([missing[name] for name in some]), strict=True))
            known.update(new)
            self._append(identity, new)
        return [known[name] for name in keys]

    def _append(self, identity: str, new: dict[str, Any]) -> None:
        if self._file is None:
            return
        lines = [json.dumps({"model": identity, "key": name, "answer": answer}) for name, answer in new.items()]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab", buffering=0) as file:  # one write: processes share the file
                file.write((self._gap + "".join(f"{line}\n" for line in lines)).encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise EnvironmentProblem(f"reward 'judge': cannot write args.cache {str(self._file)!r}: {error}") from error
        self._gap = ""

    def _read(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8", errors="replace")
        self._gap = "\n" if text and not text.endswith("\n") else ""  # a line cut off must not swallow the next one
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by a crash: it is asked again
            if not isinstance(row, dict) or row.keys() != {"model", "key", "answer"}:
                raise RecipeError(
                    f"reward 'judge': args.cache {str(file)!r} line {number} is {line[:60]!r}; expected a file of "
                    "judgements that a judge wrote, or none"
                )
            self._found.setdefault(row["model"], {})[row["key"]] = row["answer"]


@dataclass(frozen=True)
class Asker:
    """One model as a judge asks it. What it answered before is not asked again.

    `template`: digest of the wording; `step`: of the round that is scored.
    """

    models: Models
    model: str
    identity: str
    template: str
    temperature: float
    max_tokens: int
    step: int
    answers: Answers

    def texts(self, prompts: Sequence[str], votes: int = 1) -> list[list[str]]:
        """[B][votes]: what it writes, thinking left out."""
        # Draws depend on the policy's version, so a resumed run would not find again what is in memory from an earlier
        # round; what is in a file it does.
        drawn = self.step if self.temperature and not self.answers.lasting else None
        found = self.answers.of(
            self.identity,
            ["texts", self.template, votes, self.temperature, self.max_tokens, drawn],
            prompts,
            lambda some: self.models.generate(
                some, self.model, n=votes, temperature=self.temperature, max_tokens=self.max_tokens
            ),
        )
        return [[strip_thinking(text) for text in each] for each in found]

    def choices(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """[B][n] nats: log-probability of each answer."""
        return self.answers.of(
            self.identity,
            ["choices", self.template, *answers],
            prompts,
            lambda some: self.models.choices(some, answers, self.model),
        )
