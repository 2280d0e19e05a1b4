"""The first half of a round: prompts from the stream, completions, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from alignkit.core.contracts import Algorithm, RolloutEngine, World
from alignkit.core.types import NAN, Completion, Group, Metric
from alignkit.data.stream import Stream
from alignkit.track.metrics import Totals, add
from alignkit.track.sinks import JsonlSink

SHOWN = 4
"""Completions of a round that samples.jsonl shows, one a prompt."""
DEMONSTRATION = "demonstration.reward"
"""The field that holds what the rewards say of a demonstration."""

Score = Callable[[list[Group], int], list[Group]]
"""Groups and the policy's version → those to go on with, scored."""


Spool = Callable[[str, int, int, list[Group], Callable[[list[Group]], list[Group]]], list[Group]]
"""A phase, the policy's version, how often prompts were drawn anew, groups, and what is done with them → what comes of
it, maybe without doing it again."""


def _as_they_are(groups: list[Group], version: int) -> list[Group]:
    del version
    return groups


@dataclass
class Rollouts:
    """What fills a round. Offline, groups come full and scored and go through as they are.

    Args:
        num_completions: of every group.
        score: the recipe's rewards.
        measure: what is logged of scored groups.
        encode: text → the tokens of a completion that ended, for demonstrations that are to be scored.
        samples: where some completions of every round are shown; None = nowhere.
        say: tells the user.
        spool: keeps what was written or scored, for a run that is killed in a long round; None = nothing does.
    """

    stream: Stream
    engine: RolloutEngine
    algorithm: Algorithm[Any]
    world: World
    num_completions: int
    score: Score = _as_they_are
    measure: Callable[[Sequence[Group]], dict[str, Metric]] | None = None
    encode: Callable[[str], list[int]] | None = None
    samples: JsonlSink | None = None
    say: Callable[[str], None] = print
    spool: Spool | None = None
    places: dict[str, int] = field(default_factory=dict)
    """Where each group of the last round stands in it, over all ranks, by id."""
    unfinished: bool = False
    """Whether a round is being filled, or was when something failed."""

    def collect(self, version: int) -> tuple[list[Group], Totals]:
        """This rank's groups of the next round, and what is to be logged of them.

        Prompts are drawn again, as often as the method asks, until so many groups are kept as were drawn at first;
        which these are does not depend on the rank layout. When something fails the stream stands where it stood.
        """
        before, self.unfinished = self.stream.state_dict(), True
        try:
            filled = self._fill(version)
        except BaseException:
            self.stream.load_state_dict(before)
            raise
        self.unfinished = False
        if self.algorithm.needs.rewards and not any(self.world.gather(len(filled[0]))):
            self.say(f"after step {version}: no group is left to learn from; going on with the next prompts")
        return filled

    def _fill(self, version: int) -> tuple[list[Group], Totals]:
        needs = self.algorithm.needs
        self.engine.sync(version)
        kept: dict[str, tuple[int, Group]] = {}
        taken: set[str] = set()
        metrics: Totals = {}
        target = tried = missed = 0
        for turn in range(1 + needs.refills):
            drawn = self._tell_apart(self.stream.take(), taken) if needs.rewards else self.stream.take()
            first = turn * self.stream.groups_per_round + self.world.rank
            places = {group.id: first + i * self.world.size for i, group in enumerate(drawn)}
            asked = [group for group in drawn if self.algorithm.admits(group)]
            written = self._phase("written", version, turn, asked, self._written)
            groups = self._phase("scored", version, turn, written, partial(self._scored, version=version))
            if self.measure is not None:
                add(metrics, self.measure(groups))
            mine = [group for group in groups if self.algorithm.keeps(group)]
            kept |= {group.id: (places[group.id], group) for group in mine}
            tried, missed = tried + len(asked), missed + len(asked) - len(mine)
            if not needs.refills:
                break
            counts = torch.tensor([float(len(drawn)), float(len(kept))], dtype=torch.float64)
            dealt, found = self.world.sum(counts).tolist()
            target = int(dealt) if turn == 0 else target
            if found >= target:
                break
        if needs.refills:
            metrics["rollout/dropped_groups"] = Metric(float(missed), 1.0, "sum")
            metrics["rollout/drawn_groups"] = Metric(float(tried), 1.0, "sum")
            everyone = sorted(place for part in self.world.gather([p for p, _ in kept.values()]) for place in part)
            kept = {name: found for name, found in kept.items() if found[0] in set(everyone[:target])}
        self.places = {name: place for name, (place, _) in kept.items()}
        chosen = [group for _, group in kept.values()]
        if self.samples is not None and needs.rewards:
            for group in chosen[:SHOWN]:
                self.samples.log({"step": version, "split": "train", **shown(group)})
        return chosen, metrics

    def _phase(
        self, name: str, version: int, turn: int, groups: list[Group], work: Callable[[list[Group]], list[Group]]
    ) -> list[Group]:
        return work(groups) if self.spool is None else self.spool(name, version, turn, groups, work)

    def _written(self, groups: list[Group]) -> list[Group]:
        """The prompts answered; behind that what the data has of each, where the method takes it, not yet scored."""
        if not self.algorithm.needs.given:
            return self.engine.fill(groups, self.num_completions)
        written = self.engine.fill([replace(group, completions=[]) for group in groups], self.num_completions)
        return [
            replace(new, completions=[*new.completions, *(replace(c, scores={}, reward=NAN) for c in old.completions)])
            for new, old in zip(written, groups, strict=True)
        ]

    def _tell_apart(self, groups: list[Group], taken: set[str]) -> list[Group]:
        """Give a row that the round has met before another id: its draws are keyed by that."""
        named: list[Group] = []
        everyone: list[list[str]] = self.world.gather([group.id for group in groups])
        most = max(map(len, everyone), default=0)
        for i in range(most):
            for rank, ids in enumerate(everyone):
                if i >= len(ids):
                    continue
                name, count = ids[i], 1
                while name in taken:
                    count += 1
                    name = f"{ids[i]}@{count}"
                taken.add(name)
                if rank == self.world.rank:
                    named.append(groups[i] if name == groups[i].id else replace(groups[i], id=name))
        return named

    def _scored(self, groups: list[Group], version: int) -> list[Group]:
        """The groups scored, their demonstrations with them."""
        column = self.algorithm.needs.demonstration
        if column is None:
            return self.score(groups, version)
        assert self.encode is not None
        shown_to_all = [
            replace(group, completions=[*group.completions, self._demonstration(str(group.fields[column]))])
            for group in groups
        ]
        scored = self.score(shown_to_all, version)
        for group in scored:
            group.fields = {**group.fields, DEMONSTRATION: group.completions.pop().reward}
        return scored

    def _demonstration(self, text: str) -> Completion:
        assert self.encode is not None
        return Completion(text, self.encode(text), ended=True)


def shown(group: Group) -> dict[str, Any]:
    """A line of samples.jsonl: the prompt and its first completion with all scores."""
    completion = group.completions[0]
    return {
        "id": group.id,
        "prompt": group.messages[-1].get("content", "") if group.messages else "",
        "completion": completion.text,
        "scores": {name: score.value for name, score in completion.scores.items() if score.valid},
        "reward": completion.reward if completion.reward == completion.reward else None,
    }


def distinct(texts: Sequence[list[int]], n: int) -> float:
    """Different n-grams of tokens over all of them; near 0 when every text says the same."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def completion_metrics(groups: Sequence[Group], longest: int) -> dict[str, Metric]:
    """Lengths in tokens of what was written, the share cut off at `longest`, and how varied each prompt's answers are.

    `completions/distinct_trigrams` is the mean over prompts of different trigrams over all trigrams of its answers.
    Answers that the data gave are left out.
    """
    new = [[completion for completion in group.completions if completion.version >= 0] for group in groups]
    written = [completion for group in new for completion in group]
    lengths = [len(completion.tokens) for completion in written]
    cut = [c.ended is False or (c.ended is None and len(c.tokens) >= longest) for c in written]
    ended = [length for length, was_cut in zip(lengths, cut, strict=True) if not was_cut]
    varied = [distinct([completion.tokens for completion in group], 3) for group in new if group]
    count = float(len(lengths))
    metrics = {
        "completions/mean_length": Metric(float(sum(lengths)), count),
        "completions/min_length": Metric(float(min(lengths, default=0)), count, "min"),
        "completions/max_length": Metric(float(max(lengths, default=0)), count, "max"),
        "completions/clipped_ratio": Metric(float(sum(cut)), count),
        "completions/distinct_trigrams": Metric(sum(varied), float(len(varied))),
    }
    if ended:
        metrics["completions/mean_terminated_length"] = Metric(float(sum(ended)), float(len(ended)))
    return metrics
