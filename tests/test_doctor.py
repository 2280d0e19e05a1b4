"""What `alignkit doctor` finds and says."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from alignkit import doctor
from alignkit.doctor import EXTRAS, GIB, Examination, Problem, examine


def problems(monkeypatch: pytest.MonkeyPatch, cuda: bool = False) -> list[Problem]:
    return [*doctor._wrong_versions(), *doctor._machine_problems(cuda), *doctor._disk_problems()]


@pytest.fixture(autouse=True)
def _healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "MASTER_ADDR", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_free", lambda path: 500 * GIB)
    monkeypatch.setattr(doctor, "_output", lambda *command: "")
    monkeypatch.setattr(doctor.shutil, "which", lambda name, **options: f"/usr/bin/{name}")


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"])


def test_nothing_is_wrong_with_a_healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(monkeypatch) == []
    found = examine()
    assert found.problems == []
    assert found.versions["torch"].startswith("2.")
    assert found.disks["here"].startswith("500.0 GiB free")
    assert found.lines()[-1] == "no problems"
    json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"MASTER_ADDR": "10.0.0.1"}, "MASTER_ADDR is set and WORLD_SIZE is not"),
        ({"OMP_NUM_THREADS": "4096"}, "OMP_NUM_THREADS is 4096"),
    ],
)
def test_variables_that_mislead(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (found,) = problems(monkeypatch)
    assert found.what.startswith(said)
    assert found.remedy


def test_a_machine_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free", lambda path: GIB // 16)
    said = [found.what for found in problems(monkeypatch)]
    assert len(said) == 3  # here, the hub's cache, /dev/shm
    assert any(what.startswith("/dev/shm has 0.06 GiB free") for what in said)
    monkeypatch.setattr(doctor, "_free", lambda path: 500 * GIB)

    monkeypatch.setattr(doctor.shutil, "which", lambda name, **options: None)
    monkeypatch.setattr(doctor, "_installed", lambda name: "1000.0")
    assert any("compiles a part of itself" in found.what for found in doctor._machine_problems(cuda=False))
    assert not any("compiles" in found.what for found in doctor._machine_problems(cuda=True))
    monkeypatch.setattr(doctor, "_output", lambda *command: "GPU 0: something")
    assert any("torch does not see it" in found.what for found in doctor._machine_problems(cuda=False))


def test_versions_that_do_not_fit_and_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda name: {"torch": "1.0", "peft": None, "wandb": None}.get(name, real(name))
    )
    said = {found.what.split()[0]: found for found in doctor._wrong_versions()}
    assert set(said) == {"torch", "peft"}
    assert said["torch"].what.startswith("torch 1.0 is installed, and alignkit needs torch>=")
    extras = {extra.name: extra for extra in doctor._extras()}
    assert extras["wandb"].missing == ["wandb"]
    assert extras["tensorboard"].missing == []
    found = Examination({}, {}, [], [], {}, list(extras.values()), [])
    (line,) = [line for line in found.lines() if line.startswith("  wandb ")]
    assert "pip install 'alignkit[wandb]'" in line


def test_it_answers_on_the_command_line() -> None:
    command = [sys.executable, "-m", "alignkit", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert {"versions", "machine", "devices", "links", "disks", "extras", "problems"} == set(told)
    assert [extra["name"] for extra in told["extras"]] == list(EXTRAS)
    assert any(problem["what"].startswith("HF_HUB_OFFLINE") for problem in told["problems"]) == (
        "HF_HUB_OFFLINE" in __import__("os").environ
    )
