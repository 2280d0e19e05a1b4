"""What fills a round: prompts, completions and scores, the same whatever the ranks, and nothing lost on failure."""

from dataclasses import replace

import pytest

from alignkit.core import Completion, Group, Needs
from alignkit.core.types import Score
from alignkit.data.stream import Stream
from alignkit.dist.world import LocalWorld
from alignkit.loop.rollouts import DEMONSTRATION, Rollouts, completion_metrics
from alignkit.track.metrics import values
from tests.algorithms.rounds import on_ranks

PROMPTS = 10


class Method:
    """Has a use for groups of even numbers alone."""

    def __init__(self, **needs):
        self.needs = Needs(rewards=True, **needs)

    def admits(self, group):
        return True

    def keeps(self, group):
        return not self.needs.refills or int(group.fields["number"]) % 2 == 0


class Writer:
    """Writes its version and the group's id."""

    def __init__(self):
        self.version, self.calls = -1, 0

    def sync(self, version):
        self.version = version

    def fill(self, groups, n):
        self.calls += 1
        return [
            replace(g, completions=[Completion(f"{g.id} {i}", [i], version=self.version) for i in range(n)])
            for g in groups
        ]


def stream(rank=0, size=1, per_round=4, **options):
    groups = [Group(f"g{i}", [], [1], fields={"number": i, "answer": f"right {i}"}) for i in range(PROMPTS)]
    return Stream([groups], [options.pop("weight", 1.0)], seed=3, groups_per_round=per_round, rank=rank, size=size)


def rollouts(world, method, per_round=4, weight=1.0, **options):
    source = stream(world.rank, world.size, per_round, weight=weight)
    return Rollouts(source, Writer(), method, world, 2, say=lambda text: None, **options)


def rounds(world, method, count, **options):
    made = rollouts(world, method, **options)
    found = []
    for version in range(count):
        groups, metrics = made.collect(version)
        found.append(({group.id: made.places[group.id] for group in groups}, metrics))
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("refills", [0, 1, 5])
def test_a_round_holds_the_same_groups_in_the_same_order_on_any_number_of_ranks(size, refills):
    alone = rounds(LocalWorld(), Method(refills=refills), 4)
    shares = on_ranks(lambda _, world: rounds(world, Method(refills=refills), 4), range(size))
    for number, (expected, _) in enumerate(alone):
        together = [share[number][0] for share in shares]
        names = sorted(name for part in together for name in part)
        assert names == sorted(expected)
        order = sorted(expected, key=expected.get)
        assert sorted(names, key=lambda name: next(part[name] for part in together if name in part)) == order


def test_prompts_are_drawn_until_enough_are_kept():
    kept, metrics = rounds(LocalWorld(), Method(refills=5), 1)[0]
    assert len(kept) == 4
    assert all(int(name.partition("@")[0][1:]) % 2 == 0 for name in kept)
    told = values(metrics)
    assert told["rollout/drawn_groups"] > 4
    # a draw may keep more than are missing, and those are left out too
    assert told["rollout/dropped_groups"] <= told["rollout/drawn_groups"] - 4


def test_a_round_ends_short_when_the_draws_are_used_up():
    method = Method(refills=1)
    method.keeps = lambda group: group.id.startswith("g2")
    kept, _ = rounds(LocalWorld(), method, 1)[0]
    assert len(kept) <= 2


def test_a_prompt_met_twice_in_a_round_has_two_names():
    """Its draws are keyed by the name: else both would have the same completions."""
    kept, _ = rounds(LocalWorld(), Method(), 1, per_round=20, weight=2.0)[0]
    assert len(kept) == 20
    assert sum("@2" in name for name in kept) == PROMPTS


@pytest.mark.parametrize("where", ["fill", "score"])
def test_a_round_that_fails_is_not_taken(where):
    made = rollouts(LocalWorld(), Method())
    made.collect(0)
    before = made.stream.state_dict()
    broken = {"now": True}

    def fail(groups, _):
        if broken["now"]:
            raise ValueError("gone")
        return groups

    written = made.engine.fill
    if where == "score":
        made.score = fail
    else:
        made.engine.fill = lambda groups, n: fail(written(groups, n), n)
    with pytest.raises(ValueError, match="gone"):
        made.collect(1)
    assert made.unfinished
    assert made.stream.state_dict() == before
    broken["now"] = False
    groups, _ = made.collect(1)
    assert not made.unfinished
    assert [group.id for group in groups] == list(rounds(LocalWorld(), Method(), 2)[1][0])


def test_demonstrations_are_scored_beside_the_completions_and_are_none_of_them():
    def score(groups, version):
        for group in groups:
            for completion in group.completions:
                completion.reward = float(len(completion.text)) + version
                completion.scores["length"] = Score(completion.reward)
        return groups

    method = Method(demonstration="answer")
    made = rollouts(LocalWorld(), method, score=score, encode=lambda text: [7] * len(text))
    groups, _ = made.collect(2)
    for group in groups:
        assert len(group.completions) == 2
        assert group.fields[DEMONSTRATION] == len(group.fields["answer"]) + 2
    assert all(DEMONSTRATION not in group.fields for group in made.stream.sources[0])


def test_nothing_left_is_said():
    said = []
    made = rollouts(LocalWorld(), Method(), score=lambda groups, _: [])
    made.say = said.append
    assert made.collect(5) == ([], {})
    assert said == ["after step 5: no group is left to learn from; going on with the next prompts"]


def test_lengths_and_variety_by_hand():
    groups = [
        Group(
            "a",
            [],
            [1],
            [Completion("", [1, 2, 3, 4], ended=True, version=0), Completion("", [1, 2, 3, 4], ended=False, version=0)],
        ),
        Group(
            "b",
            [],
            [1],
            [Completion("", [5, 6], ended=True, version=0), Completion("", [1, 2, 3, 9], ended=None, version=0)],
        ),
        Group("c", [], [1], [Completion("", [7] * 9, ended=True)]),  # of the data
    ]
    assert values(completion_metrics(groups, longest=4)) == {
        "completions/mean_length": 3.5,
        "completions/min_length": 2.0,
        "completions/max_length": 4.0,
        "completions/clipped_ratio": 0.5,
        "completions/mean_terminated_length": 3.0,
        "completions/distinct_trigrams": (0.5 + 1.0) / 2,
    }
