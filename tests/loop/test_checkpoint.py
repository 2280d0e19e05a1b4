"""Checkpoints: what goes in comes out, old ones go, broken ones are found."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.dist.world import LocalWorld
from alignkit.loop.checkpoint import Checkpoints, disk_problem, find_fault, is_disk_problem, read_state, write_state


class Part:
    """A part with whatever state it is given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def save(checkpoints: Checkpoints, step: int, write=write_model) -> Path:
    return checkpoints.save(step, {"progress": Part({"step": step})}, {"round": Part({"cursor": 0})}, write)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, 2, LocalWorld())


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}],
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
        "batch": {"inputs": {"tokens": torch.tensor([[1, 2]])}, "mask": torch.tensor([[True, False]])},
        "none": None,
        "flag": True,
        "text": "a/b $tensor",
        "tiny": 0.1 + 0.2,
        "": {"": 1},
    }
    write_state(tmp_path, "optimizer", state)
    found = read_state(tmp_path, "optimizer")
    assert list(found["state"]) == [0, 1]  # integers stay integers
    assert found["state"][1] == {}
    assert torch.equal(found["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert found["state"][0]["step"].shape == ()
    assert found["batch"]["inputs"]["tokens"].dtype == torch.long
    assert found["batch"]["mask"].dtype == torch.bool
    assert found["param_groups"] == [{"lr": 1e-3, "betas": [0.9, 0.999], "params": [0, 1]}]
    assert found["tiny"] == 0.1 + 0.2
    assert [found[key] for key in ("none", "flag", "text", "")] == [None, True, "a/b $tensor", {"": 1}]


def test_views_of_one_storage_are_kept_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    write_state(tmp_path, "x", {"head": whole[:2], "turned": whole.reshape(2, 3).T})
    found = read_state(tmp_path, "x")
    assert found["head"].tolist() == [0, 1]
    assert found["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state of 'x' at x/odd/0: set is neither"):
        write_state(tmp_path, "x", {"odd": [{1, 2}]})


def test_saved_parts_are_loaded(checkpoints: Checkpoints, tmp_path: Path) -> None:
    save(checkpoints, 7)
    shared, local = {"progress": Part({})}, {"round": Part({})}
    path = checkpoints.newest_valid(pytest.fail)
    assert path == tmp_path / "checkpoint-7"
    checkpoints.load(path, shared, local)
    assert shared["progress"].state == {"step": 7}
    assert local["round"].state == {"cursor": 0}
    assert set(json.loads((path / "manifest.json").read_text())) == {
        "config.json",
        "progress.json",
        "rank-0/round.json",
    }


def test_the_newest_ones_are_kept_by_number_not_by_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()  # not ours to count or remove
    for step in (8, 9, 10, 11):
        save(checkpoints, step)
    assert checkpoints.steps() == [11, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-best"]


def test_failure_while_writing_leaves_the_ones_before(checkpoints: Checkpoints, tmp_path: Path) -> None:
    save(checkpoints, 1)

    def full(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EnvironmentProblem, match=r"cannot write .*checkpoint-2: the disk is full"):
        save(checkpoints, 2, full)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert find_fault(tmp_path / "checkpoint-1") is None


def test_an_error_that_is_no_disk_problem_stays_itself(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def wrong(folder: Path) -> None:
        raise KeyError(folder.name)

    with pytest.raises(KeyError):
        save(checkpoints, 2, wrong)
    assert list(tmp_path.iterdir()) == []


def test_broken_ones_are_passed_over_and_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in (1, 2):
        save(checkpoints, step)
    (tmp_path / "checkpoint-2" / "config.json").write_text("[]")
    said: list[str] = []
    assert checkpoints.newest_valid(said.append) == tmp_path / "checkpoint-1"
    fault = "config.json does not have its recorded sha256"
    assert said == [f"{tmp_path / 'checkpoint-2'} is not usable ({fault}); trying the one before"]


def test_none_is_no_error_but_none_whole_is(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.newest_valid(pytest.fail) is None
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(RunFailed, match=r"no checkpoint in .* is whole"):
        checkpoints.newest_valid(lambda text: None)


def test_what_comes_after_the_resumed_step_goes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in (1, 2):
        save(checkpoints, step)
    (tmp_path / ".writing-checkpoint-3").mkdir()
    (tmp_path / ".writing-checkpoint-3" / "config.json").write_text("{")
    checkpoints.drop_after(1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


class Share(Part):
    """A part that several ranks have of their own, and that any number of them can take up."""

    def needs_all(self, state: dict[str, Any]) -> bool:
        return bool(state.get("all"))

    def load_parts(self, states: list[dict[str, Any]]) -> None:
        self.state = {"joined": [state["cursor"] for state in states]}


@pytest.mark.parametrize(("ranks", "everything"), [(1, False), (1, True), (2, False)])
def test_parts_of_ranks_are_joined_where_one_is_not_enough(
    checkpoints: Checkpoints, ranks: int, everything: bool
) -> None:
    written = [{"cursor": rank, "all": everything} for rank in range(ranks)]
    path = checkpoints.save(1, {"progress": Part({"step": 1})}, {"round": Share(written[0])}, write_model)
    for rank in range(1, ranks):
        (path / f"rank-{rank}").mkdir()
        write_state(path / f"rank-{rank}", "round", written[rank])
    progress, share = Part({}), Share({})
    checkpoints.load(path, {"progress": progress}, {"round": share})
    assert checkpoints.ranks(path) == ranks
    assert progress.state == {"step": 1}
    joined = {"joined": [0, 1][:ranks]}
    assert share.state == (joined if ranks > 1 or everything else written[0])


@pytest.mark.parametrize(
    ("error", "disk", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True, "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), True, "Read-only file system"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            True,
            "disk is full",
        ),
        (OSError("made up by a library"), False, "made up"),
        (ValueError("anything else"), False, "anything else"),
    ],
)
def test_disk_problems_are_told_from_others(error: Exception, disk: bool, words: str, tmp_path: Path) -> None:
    assert is_disk_problem(error) is disk
    assert words in str(disk_problem(tmp_path / "not" / "there", error))
