"""What the machine must have for these tests, and one run that nothing disturbed, for the disturbed ones to equal."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignkit.testing import Bench, comparable_metrics, digest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
STEPS, SAVE = 100, 20
RECIPE = """\
output_dir: unnamed
model: {{name_or_path: {model}, dtype: float32}}
data: [{{path: {data}}}]
algorithm: {{name: dpo}}
train: {{num_epochs: 100, max_steps: {steps}, batch_size: 3, learning_rate: 1e-3, max_length: 64, save_steps: {save}}}
"""

TOLD = """\
import json, os, sys
from pathlib import Path
from alignkit.dist.launcher import RENDEZVOUS, adopt_launcher

told = {"launcher": adopt_launcher(), **{name: os.environ[name] for name in RENDEZVOUS}}
Path(sys.argv[-1], f"{os.environ['RANK']}.json").write_text(json.dumps(told))
"""
"""A program that writes down what its launcher told it, into the folder that is its last argument."""


@pytest.fixture(autouse=True, scope="session")
def commands() -> Iterator[None]:
    """Scripts find the commands of this environment, whether it was activated or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield


def until(
    condition: Callable[[], Any],
    what: str,
    seconds: float = 120,
    alive: Sequence[subprocess.Popen[bytes]] = (),
) -> None:
    """Look again until it is so, as long as these processes run."""
    patience = time.monotonic() + seconds
    while not condition():
        ended = [process.args for process in alive if process.poll() is not None]
        assert not ended, f"{ended[0]} ended before {what}"
        assert time.monotonic() < patience, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


@dataclass
class Job:
    """A recipe of two processes and a folder for its runs."""

    folder: Path
    recipe: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def start(self, *arguments: object, said: Path) -> subprocess.Popen[bytes]:
        """`alignkit <arguments>`, its output in the file `said`."""
        with said.open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "alignkit", *map(str, arguments)], stdout=out, stderr=subprocess.STDOUT
            )

    def reached(self, name: str, step: int = SAVE) -> bool:
        """Whether the run `name` has written the checkpoint of this step."""
        return (self[name] / f"checkpoint-{step}").is_dir()

    def assert_whole(self, name: str) -> None:
        """The run `name` ended with the bits and the log of the one that nothing disturbed."""
        assert digest(self[name]) == digest(self["whole"])
        assert comparable_metrics(self[name]) == comparable_metrics(self["whole"])


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("launch")
    bench = Bench("dpo", folder=folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=bench.model, data=bench.data, steps=STEPS, save=SAVE), encoding="utf-8")
    job = Job(folder, recipe)
    process = job.start("train", recipe, f"output_dir={job['whole']}", "--processes", 2, said=job["whole.log"])
    assert process.wait(180) == 0, job["whole.log"].read_text()
    return job


@pytest.fixture(scope="session")
def debian() -> Callable[..., None]:
    """Install Debian packages, or skip the test and say why not."""
    updated: list[bool] = []

    def install(*packages: str) -> None:
        if not shutil.which("apt-get"):
            pytest.skip(f"needs the Debian packages {', '.join(packages)}, and this is no Debian")
        missing = [name for name in packages if not _is_installed(name)]
        if missing and os.getuid() != 0:
            pytest.skip(f"needs the Debian packages {', '.join(missing)}; only root can install them")
        if missing and not updated:
            _apt("update")
            updated.append(True)
        if missing:
            _apt("install", "-y", "--no-install-recommends", *missing)

    return install


def _is_installed(package: str) -> bool:
    status = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Status}", package], capture_output=True, text=True, check=False
    )
    return status.stdout == "install ok installed"


def _apt(*arguments: str) -> None:
    command: Sequence[str] = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=60", *arguments]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(command)} took more than three minutes")
    if done.returncode:
        pytest.skip(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
