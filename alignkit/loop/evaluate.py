"""The loop's first half on held-out data: fill, score, aggregate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite, sqrt
from typing import Any

from torch import Tensor

from alignkit.core.contracts import Algorithm, RolloutEngine
from alignkit.core.errors import DataError
from alignkit.core.types import NAN, Batch, Completion, Forward, Group
from alignkit.data.collate import collate, select_units
from alignkit.dist.engine import DistEngine
from alignkit.loop.best import Best
from alignkit.loop.config import SCORED, EvalConfig
from alignkit.loop.reduction import combine, common_metrics, drop_single_term, global_counts
from alignkit.loop.rollouts import distinct, shown
from alignkit.loop.round import blank_like
from alignkit.models.policy import SCORING_TOKENS, CausalPolicy
from alignkit.models.roster import Roster
from alignkit.track.metrics import Totals, add, reduce, values
from alignkit.track.sinks import JsonlSink

EVAL_OUTPUTS = frozenset({"entropy", "correct"})


class Evaluator:
    """Held-out metrics of the loss, samples scored by rewards against a fixed opponent's, and which step was the best.

    `groups` are all held-out groups, the same on every rank. Its state is what the opponent scored and the best so far.
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
        say: Callable[[str], None],
    ) -> None:
        self._config, self._groups, self._say = config, list(groups), say
        self._algorithm, self._policy, self._roster, self._dist = algorithm, policy, roster, dist
        self._sampler, self._score, self._samples = sampler, score, samples
        self._asked = _distinct_prompts(self._groups)[: config.num_samples]
        self._answers = chosen_answers(self._asked, self._groups) if config.opponent == "chosen" else []
        self._baseline: dict[str, float] = {}
        self.best = Best(config)
        self.last_step = -1

    def due(self, step: int, spent: bool) -> bool:
        """Whether the recipe asks for an evaluation after this step; `spent`: it was the last of its round."""
        every = self._config.every_steps
        return bool(self._groups) and ((every > 0 and step % every == 0) or (self._config.each_round and spent))

    def measure(self, step: int) -> dict[str, float]:
        """All `eval_` metrics at this step that are finite; empty without held-out data.

        Raises:
            RecipeError: what the recipe calls the best is not among them.
        """
        self.last_step = step
        if not self._groups:
            return {}
        with self._dist.whole(), self._policy.evaluating():
            totals = {} if self._algorithm.needs.rewards else self._held_out()
            record = {f"eval_{name}": value for name, value in self._algorithm.derive(values(totals)).items()}
            if self._config.num_samples:
                record |= self._sampled(step)
        scored = SCORED if self._config.rewards else ()
        self.best.check({*record, *(f"eval_{name}" for name in (*totals, *scored))})
        broken = sorted(name for name, value in record.items() if not isfinite(value))
        if broken:
            told = ", ".join(f"{name} is {record.pop(name)}" for name in broken)
            self._say(f"evaluation at step {step}: {told}; left out of metrics.jsonl, and never the best")
        return record

    def state_dict(self) -> dict[str, Any]:
        """The opponent's scores, the best so far, and how far samples.jsonl was written."""
        if self._samples is not None:
            self._samples.sync()
        return {
            "baseline": self._baseline,
            "best": self.best.state_dict(),
            "last_step": self.last_step,
            "samples": self._samples.state_dict() if self._samples else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the same opponent again; samples written after the checkpoint are cut off."""
        self._baseline, self.last_step = state["baseline"], state["last_step"]
        self.best.load_state_dict(state["best"])
        if self._samples is not None:
            self._samples.load_state_dict(state["samples"])

    def _held_out(self) -> Totals:
        world = self._dist.world
        units = self._algorithm.build(self._groups[world.rank :: world.size])
        needs = self._algorithm.needs
        batch = self._roster.fill(collate(units, blank_like(units, world)), needs.columns, needs.slots)
        batch = self._algorithm.annotate_held_out(batch, world)
        batch = self._algorithm.relabel(self._roster.fill(batch, needs.fresh), world) if needs.fresh else batch
        index = list(range(batch.num_units)) if units else []
        counts = global_counts(batch, index, world)
        totals: Totals = {}

        def objective(out: Forward, some: Batch) -> Tensor:
            terms, metrics = self._algorithm.loss(out, some)
            loss, logged = combine(terms, some, counts)
            add(totals, {**logged, **metrics, **common_metrics(out, some)})
            return loss

        for micro in self._policy.cut(batch, index, SCORING_TOKENS):
            some = self._roster.fill(select_units(batch, micro), needs.late)
            self._policy.loss(some, needs.outputs | EVAL_OUTPUTS, objective)
        totals.pop("num_input_tokens", None)
        drop_single_term(totals)
        return reduce(totals, world)

    def _sampled(self, step: int) -> dict[str, float]:
        self._sampler.sync(step)
        with self._dist.autocast():
            groups = self._scored(self._asked, lambda mine: self._sampler.fill(mine, 1))
        if self._samples is not None:
            for group in groups:
                self._samples.log({"step": step, **shown(group)})
        tokens = [group.completions[0].tokens for group in groups]
        record = {
            "eval_samples/mean_length": sum(map(len, tokens)) / len(tokens),
            "eval_samples/distinct_trigrams": distinct(tokens, 3),
            "eval_samples/distinct_trigrams_within": sum(distinct([text], 3) for text in tokens) / len(tokens),
        }
        if self._config.rewards:
            if step == 0:
                opponent = self._scored(self._answers, list) if self._answers else groups
                self._baseline = _rewards(opponent)
            record |= _reward_metrics(groups) | win_rate(_rewards(groups), self._baseline)
        return record

    def _scored(self, groups: list[Group], fill: Callable[[list[Group]], list[Group]]) -> list[Group]:
        """All groups, filled and scored, in their order; every rank does its share."""
        world = self._dist.world
        mine = self._score(fill(groups[world.rank :: world.size]))
        shares: list[list[Group]] = world.gather(mine)
        return [shares[i % world.size][i // world.size] for i in range(len(groups))]


def win_rate(rewards: Mapping[str, float], opponent: Mapping[str, float]) -> dict[str, float]:
    """How often the reward of a prompt's sample is above the opponent's, a tie counting half, with its standard error.

    Over prompts on which both have a reward: nothing where there are none, and no error of a single one.
    """
    pairs = [(reward, opponent[name]) for name, reward in rewards.items() if name in opponent]
    wins = [_win(ours, theirs) for ours, theirs in pairs if isfinite(ours) and isfinite(theirs)]
    if not wins:
        return {}
    rate, count = sum(wins) / len(wins), len(wins)
    record = {"eval_win_rate": rate}
    if count > 1:
        variance = sum((win - rate) ** 2 for win in wins) / (count - 1)
        record["eval_win_rate/standard_error"] = sqrt(variance / count)
    return record


def _rewards(groups: Sequence[Group]) -> dict[str, float]:
    return {group.id: group.completions[0].reward for group in groups}


def _distinct_prompts(groups: Sequence[Group]) -> list[Group]:
    """One group a prompt, its completions taken away, in order of appearance."""
    seen: dict[tuple[int, ...], Group] = {}
    for group in groups:
        seen.setdefault(tuple(group.prompt), group)
    return [replace(group, completions=[]) for group in seen.values()]


def chosen_answers(asked: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The asked prompts that the data answers, each with the answer it prefers, unscored.

    Raises:
        DataError: none of them has one.
    """
    answers: dict[tuple[int, ...], list[tuple[Group, Completion]]] = {}
    for group in groups:
        # An answer alone has the reward 0 when it is labelled undesirable.
        alone = len(group.completions) == 1
        liked = [answer for answer in group.completions if not (alone and answer.reward == 0)]
        answers.setdefault(tuple(group.prompt), []).extend((group, answer) for answer in liked)
    found = []
    for group in asked:
        if given := answers[tuple(group.prompt)]:
            # Only answers of demonstrations come without a grade, and any of them will do.
            source, best = max(given, key=lambda answer: answer[1].reward if isfinite(answer[1].reward) else 0.0)
            found.append(replace(source, id=group.id, completions=[replace(best, scores={}, reward=NAN)]))
    if asked and not found:
        raise DataError(
            "eval.opponent: chosen compares samples with the answers of eval.data, and the prompts sampled from have "
            "none. Expected columns such as prompt and chosen; or compare with the start model: eval.opponent: start."
        )
    return found


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
