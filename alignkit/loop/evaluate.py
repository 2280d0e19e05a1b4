"""The loop's first half on held-out data: fill, score, aggregate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit.core.contracts import Algorithm, RolloutEngine
from alignkit.core.types import Group
from alignkit.data.collate import collate, cut, select_units, to_device, unit_lengths
from alignkit.dist.engine import DistEngine
from alignkit.loop.config import EvalConfig
from alignkit.loop.reduction import combine, common_metrics, global_counts
from alignkit.loop.round import unit_size
from alignkit.models.policy import SCORING_TOKENS, CausalPolicy
from alignkit.models.roster import Roster
from alignkit.track.metrics import Totals, add, reduce, values

EVAL_OUTPUTS = frozenset({"entropy", "correct"})


class Evaluator:
    """Held-out metrics of the loss, and samples scored by rewards against those of the start model.

    `groups` are all held-out groups, the same on every rank. Its state is what the start model scored.
    """

    def __init__(
        self,
        config: EvalConfig,
        groups: Sequence[Group],
        *,
        algorithm: Algorithm[Any],
        policy: CausalPolicy,
        roster: Roster,
        dist: DistEngine,
        sampler: RolloutEngine,
        score: Callable[[list[Group]], list[Group]],
        folder: Path,
    ) -> None:
        self._config, self._groups = config, list(groups)
        self._algorithm, self._policy, self._roster, self._dist = algorithm, policy, roster, dist
        self._sampler, self._score, self._file = sampler, score, folder / "samples.jsonl"
        self._baseline: dict[str, float] = {}
        self._written = 0

    def due(self, step: int) -> bool:
        """Whether the recipe asks for an evaluation after this step."""
        return bool(self._groups) and self._config.every_steps > 0 and step % self._config.every_steps == 0

    def measure(self, step: int) -> dict[str, float]:
        """All `eval_` metrics at this step; empty without held-out data."""
        if not self._groups:
            return {}
        with self._policy.evaluating():
            record = self._held_out()
            if self._config.num_samples:
                record |= self._sampled(step)
        return record

    def state_dict(self) -> dict[str, Any]:
        """The start model's scores, and how far samples.jsonl was written."""
        return {"baseline": self._baseline, "written": self._written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the same start model again; samples written after the checkpoint are cut off."""
        self._baseline, self._written = state["baseline"], state["written"]
        if self._dist.is_main and self._file.is_file():
            with self._file.open("r+b") as handle:
                handle.truncate(self._written)

    def _held_out(self) -> dict[str, float]:
        world = self._dist.world
        units = self._algorithm.build(self._groups[world.rank :: world.size])
        batch = self._roster.fill(collate(units, unit_size(units, world)), self._algorithm.needs.columns)
        batch = self._algorithm.annotate(batch, world)
        index = list(range(batch.num_units)) if units else []
        counts = global_counts(batch, index, world)
        lengths = unit_lengths(batch)
        totals: Totals = {}
        for micro_index in cut([lengths[i] for i in index], batch.k, SCORING_TOKENS):
            micro = to_device(select_units(batch, [index[i] for i in micro_index]), self._dist.device)
            out = self._policy.forward(micro, self._algorithm.needs.outputs | EVAL_OUTPUTS)
            terms, metrics = self._algorithm.loss(out, micro)
            _, logged = combine(terms, micro, counts)
            if len(terms) == 1:
                del logged[f"loss/{next(iter(terms))}"]
            common = common_metrics(out, micro)
            del common["num_input_tokens"]
            add(totals, {**logged, **metrics, **common})
        return {f"eval_{name}": value for name, value in values(reduce(totals, world)).items()}

    def _sampled(self, step: int) -> dict[str, float]:
        world = self._dist.world
        asked = _distinct_prompts(self._groups)[: self._config.num_samples]
        self._sampler.sync(step)
        with self._dist.autocast():
            mine = self._score(self._sampler.fill(asked[world.rank :: world.size], 1))
        groups = [group for part in world.gather(mine) for group in part]
        order = {group.id: i for i, group in enumerate(asked)}
        groups.sort(key=lambda group: order[group.id])
        rewards = {group.id: group.completions[0].reward for group in groups}
        if step == 0:
            self._baseline = rewards if self._config.rewards else {}
        if self._dist.is_main:
            self._write(step, groups)
        lengths = [len(group.completions[0].tokens) for group in groups]
        record = {"eval_completions/mean_length": sum(lengths) / len(lengths)}
        if self._config.rewards:
            record |= _reward_metrics(groups)
            if step > 0:
                wins = [_win(rewards[i], self._baseline[i]) for i in rewards]
                record["eval_win_rate"] = sum(wins) / len(wins)
        return record

    def _write(self, step: int, groups: Sequence[Group]) -> None:
        with self._file.open("ab") as handle:
            handle.truncate(self._written)
            for group in groups:
                completion = group.completions[0]
                scores = {name: score.value for name, score in completion.scores.items()}
                line = {
                    "step": step,
                    "id": group.id,
                    "prompt": group.messages[-1].get("content", "") if group.messages else "",
                    "completion": completion.text,
                    "scores": scores,
                    "reward": completion.reward if scores else None,
                }
                handle.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            self._written = handle.tell()


def _distinct_prompts(groups: Sequence[Group]) -> list[Group]:
    """One group a prompt, its completions taken away, in order of appearance."""
    seen: dict[tuple[int, ...], Group] = {}
    for group in groups:
        seen.setdefault(tuple(group.prompt), group)
    return [replace(group, completions=[]) for group in seen.values()]


def _reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    completions = [group.completions[0] for group in groups]
    record = {"eval_reward": sum(c.reward for c in completions) / len(completions)}
    for name in completions[0].scores:
        told = [c.scores[name].value for c in completions if c.scores[name].valid]
        if told:
            record[f"eval_rewards/{name}/mean"] = sum(told) / len(told)
    return record


def _win(after: float, before: float) -> float:
    return 1.0 if after > before else 0.5 if after == before else 0.0
