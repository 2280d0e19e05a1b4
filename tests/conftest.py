"""Every test runs offline, on one thread, and with a cache of its own; processes it starts inherit all three."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: it reads this once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """A cache that no earlier session has filled, so that no test passes on numbers another program computed."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNKIT_CACHE", str(folder))
        yield folder
