"""What reward sources may ask of the run's models: text, choices between answers, log-probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from alignkit.core.errors import RecipeError
from alignkit.core.types import Group, Message, Row, Unit
from alignkit.data.collate import collate
from alignkit.data.render import Renderer
from alignkit.dist.engine import DistEngine
from alignkit.models.policy import CausalPolicy
from alignkit.models.roster import Roster
from alignkit.rollout.config import SamplingConfig
from alignkit.rollout.native import NativeEngine


class Served(Protocol):
    """A model behind an endpoint."""

    def identity(self) -> str:
        """As `RunModels.identity`."""
        ...

    def generate(
        self, prompts: Sequence[str], n: int, temperature: float, max_tokens: int, stop: Sequence[str]
    ) -> list[list[str]]:
        """As `RunModels.generate`."""
        ...

    def choices(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """As `RunModels.choices`."""
        ...


@dataclass
class RunModels:
    """The models of a run, as `alignkit.core.contracts.Models` promises them.

    Args:
        served: models behind endpoints, by name.
        renderers: how a model of the roster is written to, by name, where its tokenizer is not the policy's.
        version: the policy's present version.
        context: tokens of a prompt and its answer that a model of the roster can take; None = any number.
    """

    roster: Roster
    served: Mapping[str, Served]
    renderer: Renderer
    renderers: Mapping[str, Callable[[], Renderer]]
    dist: DistEngine
    seed: int
    version: Callable[[], int]
    context: int | None
    _loaded: dict[str, Renderer] = field(default_factory=dict)

    def identity(self, model: str = "policy") -> str:
        """Tells a model's present weights from all others'."""
        if model in self.served:
            return self.served[model].identity()
        self._check(model)
        return self.roster.identity(model, self.version())

    def generate(
        self,
        prompts: Sequence[str],
        model: str = "policy",
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
    ) -> list[list[str]]:
        """`n` answers to each prompt; draws are keyed by the prompt and the policy's version."""
        if model in self.served:
            return self.served[model].generate(prompts, n, temperature, max_tokens, stop)
        renderer = self._renderer(model)
        sampling = SamplingConfig(temperature=temperature, max_completion_length=max_tokens, stop_strings=list(stop))
        groups = [
            Group(
                id=hashlib.sha256(prompt.encode()).hexdigest(),
                messages=[Message(role="user", content=prompt)],
                prompt=self._fitting(renderer.prompt(prompt), max_tokens, model),
            )
            for prompt in prompts
        ]
        with self._writing(model) as policy:
            engine = NativeEngine(
                policy.bare,
                stop_ids=renderer.stop_ids,
                pad_id=renderer.eos_id,
                decode=lambda ids: renderer.tokenizer.decode(ids, skip_special_tokens=True),
                sampling=sampling,
                seed=self.seed,
            )
            engine.sync(self.version())
            filled = engine.fill(groups, n)
        return [[completion.text for completion in group.completions] for group in filled]

    def choices(self, prompts: Sequence[str], answers: Sequence[str], model: str = "policy") -> list[list[float]]:
        """[B][n] nats: log-probability of each answer right behind each prompt."""
        if model in self.served:
            return self.served[model].choices(prompts, answers)
        renderer = self._renderer(model)
        endings = [renderer.encode(answer) for answer in answers]
        if empty := [answer for answer, tokens in zip(answers, endings, strict=True) if not tokens]:
            raise RecipeError(
                f"a judge's answer {empty[0]!r} has no tokens, so nothing can be said of how likely it is"
            )
        units: list[Unit] = []
        for prompt in prompts:
            tokens = self._fitting(renderer.prompt(prompt), max(map(len, endings)), model)
            units.append(tuple(Row([*tokens, *end], [False] * len(tokens) + [True] * len(end)) for end in endings))
        found = iter([sum(row) for row in self.logps(units, model)])
        return [[next(found) for _ in answers] for _ in prompts]

    def logps(self, units: Sequence[Unit], model: str = "policy") -> list[list[float]]:
        """Of every row, in order: the log-probabilities of its trained tokens, in nats."""
        if model in self.served:
            raise RecipeError(
                f"models.{model} is behind an endpoint, which tells no log-probabilities of given tokens; give local "
                "weights instead: `from: PATH`"
            )
        self._check(model)
        if not units:
            return []
        batch = collate(units)
        found, mask = self.roster.logps(batch, model), batch["mask"]
        return [row[trained].tolist() for row, trained in zip(found, mask, strict=True)]

    @contextmanager
    def _writing(self, model: str) -> Iterator[CausalPolicy]:
        with self.roster.holding(model) as policy, torch.no_grad(), self.dist.autocast():
            yield policy

    def _renderer(self, model: str) -> Renderer:
        self._check(model)
        if model not in self.renderers:
            return self.renderer
        if model not in self._loaded:
            self._loaded[model] = self.renderers[model]()
        return self._loaded[model]

    def _fitting(self, tokens: list[int], room: int, model: str) -> list[int]:
        if self.context is not None and len(tokens) + room > self.context:
            raise RecipeError(
                f"a prompt for the model {model!r} has {len(tokens)} tokens and its answer may have {room}, which is "
                f"more than its context of {self.context}; let the judge read or write less: fewer or shorter answers, "
                "a shorter template, fewer max_tokens"
            )
        return tokens

    def _check(self, model: str) -> None:
        if model not in self.roster.names:
            known = ", ".join([*self.roster.names, *sorted(self.served)])
            raise RecipeError(
                f"there is no model {model!r} in this run; it has {known}. `models: {{{model}: …}}` adds it"
            )
