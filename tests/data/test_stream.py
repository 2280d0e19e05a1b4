"""Order of training: every group by its weight, a new order each epoch, the same one at any world size."""

from collections import Counter

import pytest

from alignkit.core import DataError, Group
from alignkit.data.stream import Stream


def groups(name, n):
    return [Group(id=f"{name}{i}", messages=[], prompt=[1]) for i in range(n)]


def stream(*counts, weights=None, rank=0, size=1, groups_per_round=4, seed=0):
    sources = [groups("abc"[i], n) for i, n in enumerate(counts)]
    return Stream(
        sources, weights or [1.0] * len(counts), seed=seed, groups_per_round=groups_per_round, rank=rank, size=size
    )


def take(source, rounds):
    return [[group.id for group in source.take()] for _ in range(rounds)]


def epoch_ids(source):
    return [name for ids in take(source, source.rounds_per_epoch) for name in ids]


def test_an_epoch_sees_each_group_once_and_its_last_round_is_short():
    one = stream(6, 4)
    assert (one.groups_per_epoch, one.rounds_per_epoch) == (10, 3)
    rounds = take(one, 3)
    assert [len(ids) for ids in rounds] == [4, 4, 2]
    first = [name for ids in rounds for name in ids]
    assert sorted(first) == sorted([f"a{i}" for i in range(6)] + [f"b{i}" for i in range(4)])
    second = epoch_ids(one)
    assert sorted(second) == sorted(first)
    assert second != first
    assert one.epoch == 2.0


def test_rounds_foretell_what_all_ranks_will_take():
    ranks = [stream(6, 4, rank=rank, size=2) for rank in range(2)]
    foretold = [{group.id for group in groups} for groups in ranks[0].rounds(5)]
    taken = [take(rank, 5) for rank in ranks]
    assert foretold == [{*mine, *theirs} for mine, theirs in zip(*taken, strict=True)]
    assert [len(ids) for ids in foretold] == [4, 4, 2, 4, 4]


def test_another_seed_is_another_order():
    assert epoch_ids(stream(10)) == epoch_ids(stream(10))
    assert epoch_ids(stream(10)) != epoch_ids(stream(10, seed=1))


def test_weights_repeat_and_take_turns():
    one = stream(4, 6, weights=[2.5, 0.5])
    assert one.groups_per_epoch == 13
    first, second = Counter(epoch_ids(one)), Counter(epoch_ids(one))
    assert sorted(first[f"a{i}"] for i in range(4)) == [2, 2, 3, 3]
    assert sum(first[f"b{i}"] for i in range(6)) == 3
    both = first + second
    assert [both[f"a{i}"] for i in range(4)] == [5] * 4
    assert [both[f"b{i}"] for i in range(6)] == [1] * 6


def test_ranks_share_each_round():
    whole = take(stream(10), 3)
    parts = [take(stream(10, rank=rank, size=3), 3) for rank in range(3)]
    for i, ids in enumerate(whole):
        assert [part[i] for part in parts] == [ids[0::3], ids[1::3], ids[2::3]]
    assert parts[2][2] == []  # two groups in the last round, three ranks


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7])
def test_resume_to_the_exact_group_at_another_world_size(done):
    before = stream(10)
    take(before, done)
    state = before.state_dict()
    assert set(state) == {"epoch", "cursor"}
    after = [stream(10, rank=rank, size=2) for rank in range(2)]
    for rank in after:
        rank.load_state_dict(state)
    assert after[0].epoch == before.epoch
    left, right = (take(rank, 5) for rank in after)
    for ids, evens, odds in zip(take(before, 5), left, right, strict=True):
        assert (evens, odds) == (ids[0::2], ids[1::2])


def test_epoch_counts_fractions():
    one = stream(8)
    take(one, 1)
    assert one.epoch == 0.5


def test_other_data_is_refused_on_resume():
    with pytest.raises(DataError, match="group 9 of epoch 0, but an epoch of this data has 8"):
        stream(8).load_state_dict({"epoch": 0, "cursor": 9})


def test_no_groups_at_all():
    with pytest.raises(DataError, match="no group"):
        stream(0, 0)


def test_an_empty_source_beside_a_full_one():
    assert sorted(epoch_ids(stream(0, 2))) == ["b0", "b1"]


def test_preview_is_what_the_first_rounds_take() -> None:
    stream = Stream([groups("a", 7), groups("b", 4)], [1.0, 0.5], seed=3, groups_per_round=4, rank=0, size=1)
    for rounds in range(8):
        fresh = Stream(stream.sources, stream.weights, seed=3, groups_per_round=4, rank=0, size=1)
        taken = {group.id for _ in range(rounds) for group in fresh.take()}
        seen = [group.id for group in fresh.preview(rounds)]
        assert len(seen) == len(set(seen))
        assert set(seen) == taken


def labelled_stream(counts, *, groups_per_round=4, rank=0, size=1, seed=0):
    source = [
        Group(id=f"{name}{i}", messages=[], prompt=[1], fields={"objective": name})
        for name, count in counts.items()
        for i in range(count)
    ]
    return Stream(
        [source], [1.0], seed=seed, groups_per_round=groups_per_round, rank=rank, size=size, strata="objective"
    )


def kinds(rounds):
    return [Counter(name[0] for name in ids) for ids in rounds]


def test_equally_frequent_strata_come_equally_often_in_every_round():
    one = labelled_stream({"a": 8, "b": 8, "c": 8}, groups_per_round=6)
    first, second = take(one, 4), take(one, 4)
    assert kinds([*first, *second]) == [Counter(a=2, b=2, c=2)] * 8
    for epoch in (first, second):
        assert len({name for ids in epoch for name in ids}) == 24, "each group once"
    assert first != second


def test_strata_of_other_sizes_come_in_their_proportion():
    assert kinds(take(labelled_stream({"a": 12, "b": 4}), 4)) == [Counter(a=3, b=1)] * 4
    uneven = kinds(take(labelled_stream({"a": 11, "b": 5}), 4))
    assert {round["a"] for round in uneven} <= {2, 3}
    assert sum(uneven, Counter()) == Counter(a=11, b=5)


def test_strata_leave_out_no_group_where_a_round_is_too_small_for_all():
    rounds = take(labelled_stream({"a": 3, "b": 3, "c": 3}, groups_per_round=2), 5)
    assert [len(ids) for ids in rounds] == [2, 2, 2, 2, 1]
    assert len({name for ids in rounds for name in ids}) == 9
    assert all(len(kind) == len(ids) for kind, ids in zip(kinds(rounds), rounds, strict=True))


def test_the_order_of_strata_knows_nothing_of_their_names():
    first = take(labelled_stream({"a": 5, "b": 5}, groups_per_round=3), 4)
    renamed = take(labelled_stream({"z": 5, "b": 5}, groups_per_round=3), 4)
    assert [[name.replace("a", "z") for name in ids] for ids in first] == renamed


def test_strata_are_those_of_the_round_at_any_world_size_and_after_a_resume():
    counts = {"a": 6, "b": 4}
    whole = labelled_stream(counts)
    rounds = take(whole, 2)
    state = whole.state_dict()
    rounds += take(whole, 3)
    parts = [labelled_stream(counts, rank=rank, size=3) for rank in range(3)]
    for i, ids in enumerate(rounds):
        assert [[group.id for group in part.take()] for part in parts] == [ids[0::3], ids[1::3], ids[2::3]], i
    resumed = labelled_stream(counts)
    resumed.load_state_dict(state)
    assert take(resumed, 3) == rounds[2:]
    fresh = labelled_stream(counts)
    assert {group.id for group in fresh.preview(1)} == set(rounds[0])
    assert [[group.id for group in groups] for groups in fresh.rounds(3)] == rounds[:3]
