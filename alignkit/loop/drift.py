"""Rounds watched: what each wrote, chose and became, how its judge does, and what the recipe's rules do about it.

All of it is seen after a round is scored and before anything moves, so the judge and the policy are those that made it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch

from alignkit.core.contracts import Models
from alignkit.core.errors import DataError, RecipeError
from alignkit.core.reading import did_you_mean
from alignkit.core.types import NAN, Group, Metric, Unit
from alignkit.loop.config import DriftConfig, DriftRule
from alignkit.loop.rollouts import Rollouts, distinct
from alignkit.loop.round import Progress
from alignkit.models.policy import CausalPolicy
from alignkit.ops.rank_correlation import kendall_tau
from alignkit.track.metrics import Totals, add, reduce, values
from alignkit.track.rounds import told
from alignkit.track.sinks import JsonlSink
from alignkit.track.tracker import Tracker

AGREEMENT, SELECTED = "drift/agreement", "drift/selected_length_ratio"
RATIOS = {"drift/length_ratio": "drift/mean_length", "drift/distinct_ratio": "drift/distinct_trigrams"}
"""Number → the one that it is of, over that of the first round."""
SLOTS = ("first", "second")
"""Names under which the lengths of the rows of units travel until they are divided."""


class RoundWatch:
    """Lets every round be: of methods whose rounds are optimizer steps."""

    ended = False
    """Whether a rule ended the run."""
    rolls_back = False
    """Whether it may give the policy weights that it had before."""

    def admit(self, index: int, groups: Sequence[Group], units: list[Unit], news: Totals) -> list[Unit]:
        """This rank's units of a scored round that are to be learned from; `news` gains what is logged of the round."""
        del index, groups, news
        return units

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Drift(RoundWatch):
    """Measures every round, writes it down, and does what the rules say. Every rank decides the same.

    Args:
        models: what tells the likelihood of labelled answers.
        labels: pairs of `labelled_pairs`, the same on every rank.
        file: rounds.jsonl, on the first rank.
    """

    def __init__(
        self,
        config: DriftConfig,
        rollouts: Rollouts,
        policy: CausalPolicy,
        models: Models,
        progress: Progress,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        track: Tracker,
        labels: Sequence[Group],
        file: JsonlSink | None,
    ) -> None:
        self._config, self._rollouts, self._policy, self._models = config, rollouts, policy, models
        self._progress, self._scheduler, self._track, self._file = progress, scheduler, track, file
        self._world = rollouts.world
        self._has_labels, self._labels = bool(labels), list(labels)[self._world.rank :: self._world.size]
        self.rolls_back = any(rule.action == "rollback" for rule in config.rules)
        self._rounds: list[dict[str, float]] = []
        self._verdicts: dict[str, float] = {}
        self._began: dict[str, torch.Tensor] | None = None

    def admit(self, index: int, groups: Sequence[Group], units: list[Unit], news: Totals) -> list[Unit]:
        """The units; none where a rule ends the run.

        Raises:
            RecipeError: a rule is about a number that rounds do not have.
        """
        if not any(self._world.gather(len(groups))):
            return units
        found, verdicts = self._measured(groups, units)
        said = values(reduce(news, self._world))
        if not self._rounds:
            later = {AGREEMENT} if self._has_labels else set()
            later |= set() if any(self._world.gather(len(units))) else {SELECTED}
            self._check_rules({*said, *found, *later})
            found.pop(AGREEMENT, None)  # there is no round before it
        found = {"round": float(index), **found}
        known = {**said, **found}
        fired = [line for rule in self._config.rules if (line := self._judged(rule, known)) is not None]
        self._write(index, groups, units, known, fired)
        self._rounds.append(known)
        self._verdicts = verdicts
        began, self._began = self._began, self._policy.weights() if self.rolls_back else None
        for line in fired:
            self._rollouts.say(f"drift, round {index} after step {self._progress.version}: {told(line)}")
            if line["action"] == "damp":
                self._damp(line["factor"])
        actions = {line["action"] for line in fired}
        if actions & {"stop", "rollback"}:
            self._end(known, began if "rollback" in actions else None)
            return []
        if self._world.rank == 0:  # known to all ranks, and to be counted once
            add(news, {name: Metric(value, 1.0, "max" if name == "round" else "mean") for name, value in found.items()})
        return units

    def state_dict(self) -> dict[str, Any]:
        """What rounds are compared with, the weights a round began with, and how far rounds.jsonl was written."""
        if self._file is not None:
            self._file.sync()
        return {
            "rounds": self._rounds,
            "verdicts": self._verdicts,
            "began": self._began,
            "ended": self.ended,
            "file": self._file.state_dict() if self._file is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the same rounds again; what was written after the checkpoint is cut off."""
        self._rounds, self._verdicts, self._began = state["rounds"], state["verdicts"], state["began"]
        self.ended = state["ended"]
        if self._file is not None:
            self._file.load_state_dict(state["file"])

    def _measured(self, groups: Sequence[Group], units: Sequence[Unit]) -> tuple[dict[str, float], dict[str, float]]:
        """The round's numbers, and what it says of each labelled pair, over all ranks."""
        totals: Totals = {}
        add(totals, _written(groups))
        add(totals, _selected(units))
        verdicts: dict[str, float] = {}
        if self._has_labels:
            verdicts = self._told_of_labels()
            add(totals, self._likelihood())
            if self._world.rank == 0:
                add(totals, {"drift/judge_accuracy": _mean(list(verdicts.values()))})
                both = [float(verdicts[name] == self._verdicts[name]) for name in verdicts if name in self._verdicts]
                add(totals, {AGREEMENT: _mean(both)})
        else:
            add(totals, {AGREEMENT: _mean(_rank_agreement(groups))})
        found = values(reduce(totals, self._world))
        first_row, second_row = (found.pop(slot, 0.0) for slot in SLOTS)
        if second_row:
            found[SELECTED] = first_row / second_row
        first = {**found, **self._rounds[0]} if self._rounds else found
        for ratio, name in RATIOS.items():
            if name in found and first[name]:
                found[ratio] = found[name] / first[name]
        if "drift/chosen_logps" in found:
            found["drift/chosen_logps_change"] = found["drift/chosen_logps"] - first["drift/chosen_logps"]
        return found, verdicts

    def _told_of_labels(self) -> dict[str, float]:
        """By pair: 1 where the round's rewards prefer the chosen answer, ½ where neither; unscored ones left out."""
        bare = [
            replace(group, completions=[replace(c, scores={}, reward=NAN) for c in group.completions])
            for group in self._labels
        ]
        mine: dict[str, float] = {}
        for group in self._rollouts.score(bare, self._progress.version):
            chosen, rejected = (completion.reward for completion in group.completions)
            if isfinite(chosen) and isfinite(rejected):
                mine[group.id] = 0.5 if chosen == rejected else float(chosen > rejected)
        return {name: verdict for part in self._world.gather(mine) for name, verdict in part.items()}

    def _likelihood(self) -> dict[str, Metric]:
        """Nats a token of the chosen answers under the policy."""
        rows = self._models.logps([(group.row(group.completions[0]),) for group in self._labels])
        return {"drift/chosen_logps": Metric(sum(map(sum, rows)), float(sum(map(len, rows))))}

    def _check_rules(self, names: Collection[str]) -> None:
        """Refuse a rule about what rounds do not measure."""
        known = sorted(names)
        for i, rule in enumerate(self._config.rules):
            if rule.metric not in names:
                hint = did_you_mean(rule.metric, known)
                raise RecipeError(
                    f"drift.rules.{i}.metric: rounds of this run do not measure {rule.metric!r}; "
                    f"{f'{hint} ' if hint else ''}They measure {', '.join(known)}. Nothing was trained: correct it and "
                    "start again with --overwrite."
                )

    def _judged(self, rule: DriftRule, known: Mapping[str, float]) -> dict[str, Any] | None:
        """What a rule has to say of the round; None where its bound holds, or it has nothing to compare with."""
        value, (bound, limit) = known.get(rule.metric), rule.bound
        earlier = [found[rule.metric] for found in self._rounds if rule.metric in found]
        if value is None or (bound in ("falls_by", "rises_by") and not earlier):
            return None
        if bound == "falls_by":
            against, broken = max(earlier), value < max(earlier) - limit
        elif bound == "rises_by":
            against, broken = min(earlier), value > min(earlier) + limit
        else:
            against, broken = limit, value < limit if bound == "below" else value > limit
        if not broken:
            return None
        line = {"metric": rule.metric, "value": value, "bound": bound, "limit": limit, "against": against}
        return {**line, "action": rule.action, **({"factor": rule.factor} if rule.action == "damp" else {})}

    def _end(self, known: Mapping[str, float], weights: Mapping[str, torch.Tensor] | None) -> None:
        """Log what no step will, and make this the last one; with `weights` after the policy became these again."""
        self._track.flush()
        self._track.log({"step": self._progress.step, **known})
        if weights is not None:
            self._policy.set_weights(weights)
            self._progress.step += 1  # they moved: what is known by their version must not be taken for theirs
        self._progress.stop()
        self.ended = True

    def _write(
        self,
        index: int,
        groups: Sequence[Group],
        units: Sequence[Unit],
        known: Mapping[str, float],
        fired: Sequence[Mapping[str, Any]],
    ) -> None:
        """A line a group, in the order of the round, and one of the round itself."""
        head = {"round": index, "step": self._progress.version}
        chosen: dict[str, list[Unit]] = {}
        for unit in units:
            chosen.setdefault(unit[0].group, []).append(unit)
        places = self._rollouts.places
        mine = [
            (places[group.id], {**head, "judge_version": head["step"], **told_group(group, chosen.get(group.id, []))})
            for group in groups
        ]
        everyone = sorted((line for part in self._world.gather(mine) for line in part), key=lambda line: line[0])
        if self._file is not None:
            for _, line in everyone:
                self._file.log(line)
            self._file.log({**head, "metrics": dict(known), "rules": [dict(line) for line in fired]})

    def _damp(self, factor: float) -> None:
        """Multiply the learning rate of this step and of all that follow."""
        scheduler = self._scheduler
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = [rate * factor for rate in scheduler._last_lr]
        for group in scheduler.optimizer.param_groups:
            group["lr"] *= factor


def labelled_pairs(groups: Sequence[Group], limit: int) -> list[Group]:
    """The first groups, each with the completion that its data prefers most and the one it prefers least, unscored.

    Raises:
        DataError: a group does not prefer any.
    """
    pairs = []
    for group in groups[:limit]:
        rated = sorted((c for c in group.completions if isfinite(c.reward)), key=lambda c: -c.reward)
        if len(rated) < 2 or rated[0].reward == rated[-1].reward:
            raise DataError(
                f"drift.labels: a judge is held to answers of which one is preferred, and row {group.id!r} has none "
                "such. Expected chosen and rejected, or completions with scores."
            )
        answers = [replace(c, scores={}, reward=NAN) for c in (rated[0], rated[-1])]
        pairs.append(replace(group, completions=answers))
    return pairs


def told_group(group: Group, units: Sequence[Unit]) -> dict[str, Any]:
    """A line of rounds.jsonl: the prompt, its completions with all scores, and what was made of them.

    `pairs`: of each unit, the numbers of the completions that are its rows; rows that are none are left out. `scalars`:
    of each unit, its further facts, one number a row.
    """
    return {
        "id": group.id,
        "prompt": group.messages[-1].get("content", "") if group.messages else "",
        "completions": [
            {
                "text": completion.text,
                "reward": _finite(completion.reward),
                "scores": {name: _finite(score.value) for name, score in completion.scores.items() if score.valid},
            }
            for completion in group.completions
        ],
        "pairs": [_places(group, unit) for unit in units],
        "scalars": [
            {name: [_finite(row.scalar.get(name, NAN)) for row in unit] for name in _scalars(unit)} for unit in units
        ],
    }


def _scalars(unit: Unit) -> list[str]:
    return sorted({name for row in unit for name in row.scalar})


def _places(group: Group, unit: Unit) -> list[int]:
    """Which completions the rows of a unit are; of equal completions each row takes another."""
    texts = [[*group.prompt, *completion.tokens] for completion in group.completions]
    found: list[int] = []
    for row in unit:
        equal = [i for i, tokens in enumerate(texts) if tokens == row.tokens]
        if equal:
            found.append(next((i for i in equal if i not in found), equal[0]))
    return found


def _finite(value: float) -> float | None:
    """JSON has no word for the others."""
    return value if isfinite(value) else None


def _mean(found: Sequence[float]) -> Metric:
    return Metric(sum(found), float(len(found)))


def _written(groups: Sequence[Group]) -> dict[str, Metric]:
    """Tokens of an answer, and how varied the answers to a prompt are; those of the data are left out."""
    new = [[c.tokens for c in group.completions if c.version >= 0] for group in groups]
    return {
        "drift/mean_length": _mean([float(len(tokens)) for texts in new for tokens in texts]),
        "drift/distinct_trigrams": _mean([distinct(texts, 3) for texts in new if texts]),
    }


def _selected(units: Sequence[Unit]) -> dict[str, Metric]:
    """Trained tokens of the first and of the second row of units that have two."""
    lengths = [[float(sum(row.trained)) for row in unit[:2]] for unit in units if len(unit) > 1]
    return {slot: _mean([pair[i] for pair in lengths]) for i, slot in enumerate(SLOTS)}


def _rank_agreement(groups: Sequence[Group]) -> list[float]:
    """(1 + τ) / 2 of each group and each reward that also tells what the model of the round before would say."""
    found = []
    for group in groups:
        columns = [completion.scores for completion in group.completions]
        for name in sorted({name for scores in columns for name in scores if f"{name}/previous" in scores}):
            now = f"{name}/raw" if any(f"{name}/raw" in scores for scores in columns) else name
            both = [
                (scores[now].value, scores[f"{name}/previous"].value)
                for scores in columns
                if f"{name}/previous" in scores and scores[now].valid
            ]
            if len(both) > 1:
                a, b = torch.tensor(both, dtype=torch.float64).unbind(1)
                found.append((1 + float(kendall_tau(a, b))) / 2)
    return found
