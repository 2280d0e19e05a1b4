"""Runs whose completions a server writes: it is interchangeable with the native engine, and may go away."""

import threading
import time

import pytest

from alignkit.core.errors import RunFailed
from alignkit.recipe import Recipe
from alignkit.run import resume, train
from alignkit.testing import Bench, digest, read_metrics
from tests.rollout.vllm_server import VllmServer


@pytest.fixture
def bench(tmp_path):
    return Bench("grpo", folder=tmp_path)


def on_server(bench: Bench, run: str, server: VllmServer, deadline: float = 30.0, **settings) -> Recipe:
    recipe = bench.recipe(run, **settings)
    asked = {"engine": "vllm", "url": f"http://127.0.0.1:{server.port}", "served_name": "tiny", "deadline": deadline}
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=asked)})


def test_one_recipe_learns_the_same_on_both_engines(bench):
    settings = {"max_steps": 30, "num_epochs": 30, "learning_rate": 3e-3}
    native = read_metrics(train(bench.recipe("native", **settings), quiet=True, report=False).folder)
    with VllmServer(bench.model) as server:
        folder = train(on_server(bench, "server", server, **settings), quiet=True, report=False).folder
    served = read_metrics(folder)

    def last(records):
        return sum(record["reward"] for record in records[-5:]) / 5

    start = sum(record["reward"] for record in native[:3]) / 3
    assert last(native) > start + 0.2
    assert last(served) == pytest.approx(last(native), abs=0.15)
    assert all(record["sampling/sampling_logp_difference/max"] < 1e-4 for record in served)
    assert not (folder / "rollout").exists()


def test_a_server_that_stays_away_leaves_a_checkpoint_to_go_on_from(bench, capsys):
    with VllmServer(bench.model) as server:
        whole = train(on_server(bench, "whole", server, max_steps=4), quiet=True, report=False).folder
    server = VllmServer(bench.model)
    server.__enter__()
    server.die_after = 70  # 28 completions a round: in the midst of the third
    with pytest.raises(RunFailed, match="deadline"):
        train(on_server(bench, "broken", server, deadline=5.0, max_steps=4), report=False)
    assert "trying for 5 s (rollout.deadline)" in capsys.readouterr().out
    folder = bench.folder / "broken"
    assert (folder / "checkpoint-2").is_dir()
    again = VllmServer(bench.model, port=server.port)
    with again:
        resume(folder, quiet=True, report=False)
    assert digest(folder) == digest(whole)


def test_a_server_that_comes_back_is_waited_for(bench):
    with VllmServer(bench.model) as server:
        whole = train(on_server(bench, "whole", server, max_steps=4), quiet=True, report=False).folder
    server = VllmServer(bench.model)
    server.__enter__()
    server.die_after = 70

    def restart():
        time.sleep(3.0)
        VllmServer(bench.model, port=server.port).__enter__()

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    folder = train(on_server(bench, "killed", server, max_steps=4), quiet=True, report=False).folder
    thread.join()
    assert digest(folder) == digest(whole)
