"""Optimizer batches of a round, whatever the ranks, and the counters of a run."""

import pytest
import torch

from alignkit.core.types import Row, Unit
from alignkit.data.collate import collate
from alignkit.loop.round import Progress, Round, blank_like


class SimulatedRank:
    """One rank of a world whose other ranks are not running: `gather` answers with what they would have said."""

    def __init__(self, rank: int, said: list) -> None:
        self.rank, self.size, self._said = rank, len(said), said

    def sum(self, x):
        raise AssertionError("no reduction is asked for here")

    mean = sum

    def gather(self, obj):
        assert obj == self._said[self.rank]
        return self._said


def units(*names: str) -> list[Unit]:
    return [(Row(tokens=[1, 2], trained=[False, True], group=name),) for name in names]


def places(*names: str) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def dealt(total: int, size: int, batch_size: int, epochs: int, given: tuple[int, ...] = (1,)) -> list[set[str]]:
    """The units of every optimizer batch when `total` groups are dealt to `size` ranks; group i gives `given[i]`."""
    names = [f"g{i}" for i in range(total)]
    gives = {name: given[i % len(given)] for i, name in enumerate(names)}
    hands = [names[rank::size] for rank in range(size)]
    built = [[name for name in hand for _ in range(gives[name])] for hand in hands]
    said = [[(i, names.index(name)) for i, name in enumerate(mine)] for mine in built]
    parts: list[set[str]] = []
    for rank, mine in enumerate(built):
        round_ = Round(0, batch_size, epochs)
        made = units(*mine)
        batch = collate(made, units("blank")[0])
        round_.begin(3, batch, made, places(*names), SimulatedRank(rank, said))
        number = 0
        while (part := round_.part()) is not None:
            if rank == 0:
                parts.append(set())
            chosen = {f"{mine[i]}.{mine[:i].count(mine[i])}" for i in part}
            assert not chosen & parts[number]
            parts[number] |= chosen
            round_.advance()
            number += 1
        assert number == len(parts)
    return parts


@pytest.mark.parametrize("size", [2, 3, 5])
def test_parts_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    assert dealt(11, size, batch_size=4, epochs=2) == dealt(11, 1, batch_size=4, epochs=2)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_parts_do_not_depend_on_the_ranks_when_groups_give_different_numbers_of_units(size: int) -> None:
    given = (2, 0, 1, 3)
    assert dealt(11, size, 4, 2, given) == dealt(11, 1, 4, 2, given)


def test_every_epoch_takes_every_unit_once_in_its_own_order() -> None:
    parts = dealt(11, 1, batch_size=4, epochs=2)
    assert [len(part) for part in parts] == [4, 4, 3, 4, 4, 3]
    assert set().union(*parts[:3]) == set().union(*parts[3:]) == {f"g{i}.0" for i in range(11)}
    assert parts[:3] != parts[3:]


def test_a_rank_without_units_takes_part_with_nothing() -> None:
    round_ = Round(0, 4, 1)
    round_.begin(0, collate([]), [], {}, SimulatedRank(1, [[(0, 0)], []]))
    assert round_.part() == []
    round_.advance()
    assert round_.part() is None


def test_half_a_round_is_taken_up_where_it_was_left() -> None:
    five = units("a", "b", "c", "d", "e")
    before = Round(0, 2, 1)
    before.begin(
        4, collate(five), five, places("a", "b", "c", "d", "e"), SimulatedRank(0, [[(i, i) for i in range(5)]])
    )
    before.advance()
    after = Round(0, 2, 1)
    after.load_state_dict(before.state_dict())
    assert (after.index, after.part(), after.groups) == (4, before.part(), ["a", "b", "c", "d", "e"])
    assert after.batch is not None
    assert torch.equal(after.batch.inputs["tokens"], collate(five).inputs["tokens"])


def test_a_spent_round_is_remembered_by_its_index_only() -> None:
    one = units("a")
    round_ = Round(0, 2, 1)
    round_.begin(4, collate(one), one, places(one[0][0].group), SimulatedRank(0, [[(0, 0)]]))
    round_.advance()
    state = round_.state_dict()
    assert (state["index"], state["batch"], state["parts"], state["groups"]) == (4, None, [], [])
    after = Round(0, 2, 1)
    after.load_state_dict(state)
    assert after.index == 4
    assert after.part() is None


def test_an_idle_rank_knows_the_shape_of_units() -> None:
    pair = [(Row([1], [False], scalar={"score": 2.0}), Row([1], [False], token={"credit": [0.5]}))]
    told = [(2, set(), {"credit"}, {"score"}), (1, set(), set(), set())]
    blank = blank_like([], SimulatedRank(1, told))
    assert len(blank) == 2
    assert blank[0].scalar == {"score": 0.0}
    assert blank[0].token == {"credit": [0.0, 0.0]}
    assert len(blank_like(pair, SimulatedRank(0, told))) == 2


def test_rounds_end_with_the_rounds_or_with_the_steps() -> None:
    assert list(Progress(3, 100).rounds()) == [0, 1, 2]
    progress, seen = Progress(100, 4), []
    for index in progress.rounds():
        seen.append(index)
        progress.step += 2
    assert seen == [0, 1]
    assert list(Progress(3, 0).rounds()) == []


def test_progress_goes_on_with_the_round_it_was_in() -> None:
    progress = Progress(5, 10)
    for index in progress.rounds():
        progress.step, progress.tokens = progress.step + 1, 99
        if index == 2:
            break
    later = Progress(5, 10)
    later.load_state_dict(progress.state_dict())
    assert (later.step, later.version, later.tokens) == (3, 3, 99)
    assert list(later.rounds()) == [2, 3, 4]
