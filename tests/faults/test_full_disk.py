"""A disk that fills up: exit 3, what was saved stays whole, nothing half-written stays, and the run can go on."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignkit.loop.checkpoint import find_fault
from alignkit.testing import comparable_metrics, digest
from tests.faults import plants
from tests.faults.bench import Runs, Whole, assert_equal_runs, checkpoints, leftovers

pytestmark = pytest.mark.xdist_group("faults-disk")

Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a file system of so many KiB."""
    point = tmp_path / "disk"

    def mount(kib: int) -> Path:
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("a small disk is a tmpfs, which only root may mount")
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(point)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"this machine refuses to mount a tmpfs: {done.stderr.strip()}")
        return point

    yield mount
    if point.is_mount():
        subprocess.run(["umount", str(point)], check=True)


def size_in_kib(folder: Path) -> int:
    """What a folder takes on a tmpfs: whole pages a file, and one for itself."""
    return sum(4 * (-(-path.stat().st_size // 4096) + path.is_dir()) for path in [folder, *folder.rglob("*")])


def remount(point: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(point)], check=True)


def assert_disk_full(code: int, said: str) -> None:
    assert code == 3, said
    assert "Traceback" not in said
    error = said[said.index("error: ") :]
    assert "the disk is full" in error or "no space left" in error
    assert "alignkit resume" in error


@pytest.fixture(scope="module")
def checkpoint_kib(whole: Whole) -> int:
    return size_in_kib(whole("full") / "checkpoint-8")


def test_second_checkpoint_does_not_fit(runs: Runs, whole: Whole, disk: Disk, checkpoint_kib: int) -> None:
    point = disk(checkpoint_kib + 150)
    code, said = runs.train("small", f"output_dir={point / 'run'}")
    assert_disk_full(code, said)
    assert f"cannot write {point / 'run' / 'checkpoint-4'}" in said
    assert checkpoints(point / "run") == [2]
    assert find_fault(point / "run" / "checkpoint-2") is None
    assert leftovers(point / "run") == []

    moved = shutil.copytree(point / "run", runs["moved"])
    runs.resume_to("moved", whole("full"))
    assert moved.is_dir()

    remount(point, 20 * checkpoint_kib)
    code, said = runs.resume(str(point / "run"))
    assert code == 0, said
    assert_equal_runs(point / "run", whole("full"))


def test_metrics_do_not_fit(runs: Runs, whole: Whole, disk: Disk) -> None:
    point = disk(600)
    code, said = runs.train("records", f"output_dir={point / 'run'}", "train.save_steps=0", plant=(plants.fill_disk, 5))
    assert_disk_full(code, said)
    assert str(point / "run") in said
    lines = (point / "run" / "metrics.jsonl").read_text()
    assert lines == "" or lines.endswith("\n")
    (point / "run" / "ballast").unlink()
    code, said = runs.resume(str(point / "run"))
    assert code == 0, said
    assert digest(point / "run") == digest(whole("full"))
    assert comparable_metrics(point / "run") == comparable_metrics(whole("full"))


def test_finished_model_does_not_fit(runs: Runs, whole: Whole, disk: Disk, checkpoint_kib: int) -> None:
    point = disk(2 * checkpoint_kib + 60)
    settings = ["train.save_steps=0", "train.save_total_limit=1"]
    code, said = runs.train(
        "export", f"output_dir={point / 'run'}", *settings, plant=(plants.fill_disk_before_export, 40)
    )
    assert_disk_full(code, said)
    run = point / "run"
    assert checkpoints(run) == [9]
    assert leftovers(run) == []
    assert not (run / "config.json").exists()
    assert not (run / "model.safetensors").exists()
    (run / "ballast").unlink()
    code, said = runs.resume(str(run))
    assert code == 0, said
    assert digest(run) == digest(whole("full"))


def test_resume_on_a_full_disk_keeps_the_recipe(runs: Runs, disk: Disk, checkpoint_kib: int) -> None:
    point = disk(2 * checkpoint_kib + 100)
    runs.train("stopped", f"output_dir={point / 'run'}", plant=(plants.kill_in_step, 3))
    before = (point / "run" / "recipe.resolved.yaml").read_bytes()
    plants.fill(point / "run", 0)
    code, said = runs.resume(str(point / "run"))
    assert_disk_full(code, said)
    assert (point / "run" / "recipe.resolved.yaml").read_bytes() == before
    assert find_fault(point / "run" / "checkpoint-2") is None
