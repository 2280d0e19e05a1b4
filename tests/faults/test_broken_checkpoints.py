"""A checkpoint that is not whole is passed over, said so, and replaced; the one before it is used."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import plants
from tests.faults.bench import STEPS, Runs, Whole, assert_equal_runs, checkpoints

pytestmark = pytest.mark.xdist_group("faults-checkpoints")


def truncate(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 100)


def flip_one_bit(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def cut_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"config.json": {"si')


def remove_part(checkpoint: Path) -> None:
    (checkpoint / "rank-0" / "optimizer.safetensors").unlink()


BREAKS: dict[Callable[[Path], None], str] = {
    truncate: "bytes instead of",
    flip_one_bit: "model.safetensors does not have its recorded sha256",
    remove_manifest: "no manifest: it was not finished",
    cut_manifest: "its manifest is cut short",
    remove_part: "rank-0/optimizer.safetensors is missing",
}


@pytest.fixture(scope="module")
def killed(runs: Runs) -> Path:
    """A run that died at step 8 with checkpoints 4 and 6."""
    runs.train("to-break", plant=(plants.kill_in_step, 8))
    assert checkpoints(runs["to-break"]) == [4, 6]
    return runs["to-break"]


@pytest.fixture
def run(runs: Runs, killed: Path, request: pytest.FixtureRequest) -> Path:
    return shutil.copytree(killed, runs[request.node.name])


@pytest.mark.parametrize("break_it", BREAKS)
def test_broken_checkpoint_is_passed_over_and_replaced(runs: Runs, whole: Whole, run: Path, break_it) -> None:
    break_it(run / "checkpoint-6")
    (run / ".writing-checkpoint-7").mkdir()
    (run / ".writing-checkpoint-7" / "model.safetensors").write_bytes(b"half")
    code, said = runs.resume(run.name)
    assert code == 0, said
    assert f"{run / 'checkpoint-6'} is not usable" in said
    assert BREAKS[break_it] in said
    assert f"continuing from {run / 'checkpoint-4'}" in said
    assert_equal_runs(run, whole("full"))


def test_without_any_whole_checkpoint_nothing_is_thrown_away(runs: Runs, run: Path) -> None:
    for step in (4, 6):
        remove_manifest(run / f"checkpoint-{step}")
    before = (run / "metrics.jsonl").read_bytes()
    code, said = runs.resume(run.name)
    assert code == 1
    assert "no checkpoint in" in said
    assert "--overwrite" in said
    assert (run / "metrics.jsonl").read_bytes() == before
    assert checkpoints(run) == [4, 6]


def test_shortened_metrics_are_noticed(runs: Runs, run: Path) -> None:
    (run / "metrics.jsonl").write_text("{}\n")
    code, said = runs.resume(run.name)
    assert code == 1
    assert "metrics.jsonl holds 3 bytes, but held" in said


def test_finished_run_resumed_changes_nothing(runs: Runs, whole: Whole) -> None:
    finished = shutil.copytree(whole("full"), runs["finished"])
    code, said = runs.resume("finished")
    assert code == 0, said
    assert f"continuing from {finished / f'checkpoint-{STEPS}'}" in said
    assert_equal_runs(finished, whole("full"))
