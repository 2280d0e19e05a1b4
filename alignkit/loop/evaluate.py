"""The loop's first half on held-out data: fill, score, aggregate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from torch import Tensor

from alignkit.core.contracts import Algorithm, RolloutEngine
from alignkit.core.types import Batch, Forward, Group
from alignkit.data.collate import collate, select_units
from alignkit.dist.engine import DistEngine
from alignkit.loop.config import EvalConfig
from alignkit.loop.reduction import combine, common_metrics, drop_single_term, global_counts
from alignkit.loop.round import blank_like
from alignkit.models.policy import SCORING_TOKENS, CausalPolicy
from alignkit.models.roster import Roster
from alignkit.track.metrics import Totals, add, reduce, values
from alignkit.track.sinks import JsonlSink

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
        samples: JsonlSink | None,
    ) -> None:
        self._config, self._groups = config, list(groups)
        self._algorithm, self._policy, self._roster, self._dist = algorithm, policy, roster, dist
        self._sampler, self._score, self._samples = sampler, score, samples
        self._baseline: dict[str, float] = {}
        self.last_step = -1

    def due(self, step: int) -> bool:
        """Whether the recipe asks for an evaluation after this step."""
        return bool(self._groups) and self._config.every_steps > 0 and step % self._config.every_steps == 0

    def measure(self, step: int) -> dict[str, float]:
        """All `eval_` metrics at this step; empty without held-out data."""
        self.last_step = step
        if not self._groups:
            return {}
        with self._policy.evaluating():
            record = self._held_out()
            if self._config.num_samples:
                record |= self._sampled(step)
        return record

    def state_dict(self) -> dict[str, Any]:
        """The start model's scores, and how far samples.jsonl was written."""
        if self._samples is not None:
            self._samples.sync()
        return {
            "baseline": self._baseline,
            "last_step": self.last_step,
            "samples": self._samples.state_dict() if self._samples else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the same start model again; samples written after the checkpoint are cut off."""
        self._baseline, self.last_step = state["baseline"], state["last_step"]
        if self._samples is not None:
            self._samples.load_state_dict(state["samples"])

    def _held_out(self) -> dict[str, float]:
        world = self._dist.world
        units = self._algorithm.build(self._groups[world.rank :: world.size])
        batch = self._roster.fill(collate(units, blank_like(units, world)), self._algorithm.needs.columns)
        batch = self._algorithm.annotate(batch, world)
        index = list(range(batch.num_units)) if units else []
        counts = global_counts(batch, index, world)
        totals: Totals = {}

        def objective(out: Forward, some: Batch) -> Tensor:
            terms, metrics = self._algorithm.loss(out, some)
            loss, logged = combine(terms, some, counts)
            add(totals, {**logged, **metrics, **common_metrics(out, some)})
            return loss

        for micro in self._policy.cut(batch, index, SCORING_TOKENS):
            self._policy.loss(select_units(batch, micro), self._algorithm.needs.outputs | EVAL_OUTPUTS, objective)
        totals.pop("num_input_tokens", None)
        drop_single_term(totals)
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
        if self._samples is not None:
            for group in groups:
                self._samples.log(_sample(step, group))
        tokens = [group.completions[0].tokens for group in groups]
        record = {
            "eval_samples/mean_length": sum(map(len, tokens)) / len(tokens),
            "eval_samples/distinct_trigrams": _distinct(tokens, 3),
        }
        if self._config.rewards:
            record |= _reward_metrics(groups)
            if step > 0:
                pairs = [(reward, self._baseline[i]) for i, reward in rewards.items()]
                wins = [_win(after, before) for after, before in pairs if isfinite(after) and isfinite(before)]
                if wins:
                    record["eval_win_rate"] = sum(wins) / len(wins)
        return record


def _sample(step: int, group: Group) -> dict[str, Any]:
    """A line of samples.jsonl."""
    completion = group.completions[0]
    return {
        "step": step,
        "id": group.id,
        "prompt": group.messages[-1].get("content", "") if group.messages else "",
        "completion": completion.text,
        "scores": {name: score.value for name, score in completion.scores.items() if score.valid},
        "reward": completion.reward if isfinite(completion.reward) else None,
    }


def _distinct_prompts(groups: Sequence[Group]) -> list[Group]:
    """One group a prompt, its completions taken away, in order of appearance."""
    seen: dict[tuple[int, ...], Group] = {}
    for group in groups:
        seen.setdefault(tuple(group.prompt), group)
    return [replace(group, completions=[]) for group in seen.values()]


def _distinct(texts: Sequence[list[int]], n: int) -> float:
    """Different n-grams of tokens over all of them; near 0 when every text says the same."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    completions = [group.completions[0] for group in groups]
    rewarded = [c.reward for c in completions if isfinite(c.reward)]
    record = {"eval_reward": sum(rewarded) / len(rewarded)} if rewarded else {}
    for name in completions[0].scores:
        told = [c.scores[name].value for c in completions if c.scores[name].valid]
        if told:
            record[f"eval_rewards/{name}/mean"] = sum(told) / len(told)
    return record


def _win(after: float, before: float) -> float:
    return 1.0 if after > before else 0.5 if after == before else 0.0
