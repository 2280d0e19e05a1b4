"""One tiny model and one unbroken run a variant, shared by every test of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.bench import STEPS, VARIANTS, Runs, Whole, build_runs


@pytest.fixture(scope="session", autouse=True)
def _quiet_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # bit-exactness is promised on one machine, whichever it is
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return build_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole(runs: Runs) -> Whole:
    done: dict[str, Path] = {}

    def unbroken(variant: str) -> Path:
        if variant not in done:
            code, said = runs.train(f"whole-{variant}", *VARIANTS[variant])
            assert code == 0, said
            assert f"{STEPS} steps" in said
            done[variant] = runs[f"whole-{variant}"]
        return done[variant]

    return unbroken
