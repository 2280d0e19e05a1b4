import pytest

from tests.track.fake_run import make_run


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "dpo-test")


@pytest.fixture
def facts(tmp_path):
    return {
        "recipe": {"seed": 0, "train": {"learning_rate": 5e-4}, "env": {"SECRET_TOKEN": "hush"}},
        "algorithm": "dpo",
        "total_steps": 30,
        "start_step": 0,
        "run_id": "abc123",
        "output_dir": str(tmp_path),
        "resumed": False,
    }
