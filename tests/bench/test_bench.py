"""`scripts/bench`: its rows, its figures, one whole race, and what it says when a side breaks."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from bench.cli import make_parser, run  # noqa: E402
from bench.gate import Lap  # noqa: E402
from bench.job import Job  # noqa: E402
from bench.race import BenchFailed, Runner, Settings, Track, check_equal, environment, prepare, race  # noqa: E402
from bench.report import Document, figures, table  # noqa: E402
from bench.workloads import WORKLOADS, in_training_order, make_rows  # noqa: E402

SMOKE = WORKLOADS["smoke-dpo"]
QUICK = Settings(steps=2, warmup=1, setup_pairs=0)


def track(seconds: list[float], peak: int, base: int, losses: list[float]) -> Track:
    laps = [Lap(wall=second, cpu=2 * second, peak=peak, resident=base) for second in seconds]
    return Track(laps[0], laps[1:], base, losses, [1.0] * len(losses), [9, 9], ["a", "b"], {"threads": 1})


@pytest.mark.parametrize("name", WORKLOADS)
def test_rows_are_within_their_ranges_and_do_not_depend_on_how_many_there_are(name):
    workload = WORKLOADS[name]
    rows = make_rows(workload, 40, seed=1)
    assert rows[:7] == make_rows(workload, 7, seed=1)
    assert rows[:7] != make_rows(workload, 7, seed=2)
    low, high = workload.lengths.prompt_range
    prompts = [len(row["prompt"].split()) for row in rows]
    assert all(low <= length <= high for length in prompts)
    assert len(set(prompts)) > 10
    shortest, longest = workload.lengths.completion_range
    completions = [row[column] for row in rows for column in ("chosen", "rejected", "completion") if column in row]
    assert all(shortest <= len(text.split()) + 1 <= longest for text in completions)  # the end token is the last
    words = {int(word[1:]) for text in completions for word in text.split()}
    assert 2 <= min(words) <= max(words) < workload.shape.vocabulary


def test_trl_gets_the_rows_in_alignkits_order():
    rows = make_rows(SMOKE, 12, seed=0)
    assert in_training_order(rows, 0) != rows
    assert sorted(map(str, in_training_order(rows, 0))) == sorted(map(str, rows))


def test_the_job_holds_whole_batches_and_enough_of_them(tmp_path):
    settings = replace(QUICK, batch_size=3, setup_pairs=10)
    job = prepare(SMOKE, settings, tmp_path / "race")
    assert (job.rows, job.compact) == (12, True)
    assert len(job.rows_file.read_text().splitlines()) == 12
    assert environment(job)["OMP_NUM_THREADS"] == "1"
    with pytest.raises(BenchFailed, match="exists"):
        prepare(SMOKE, settings, tmp_path / "race")


def test_figures_are_medians_of_pairs_without_the_warm_up():
    tracks = {
        "alignkit": track([1.0, 9.0, 1.0, 2.0, 1.0], peak=150, base=100, losses=[0.7, 0.6]),
        "trl": track([3.0, 9.0, 4.0, 4.0, 3.0], peak=300, base=100, losses=[0.7, 0.60001]),
    }
    found = figures(tracks, replace(QUICK, steps=3))
    assert (found.wall.median, found.wall.low, found.wall.high) == (3.0, 2.0, 4.0)
    assert found.cpu == found.wall
    assert (found.train_memory, found.peak_memory) == (0.25, 0.5)
    assert found.setup_cpu == 3.0
    assert found.loss_difference == pytest.approx(1e-5)
    assert found.agree
    assert "| smoke-dpo | 4 | 3.00 (2.00–4.00) |" in table([("smoke-dpo", 4, found)])


@pytest.mark.parametrize("change", [{"digests": ["a", "c"]}, {"losses": [0.7]}, {"facts": {"threads": 2}}])
def test_unequal_work_is_refused(change):
    ours = track([1.0, 1.0, 1.0], 1, 1, [0.7, 0.7])
    check_equal({"alignkit": ours, "trl": ours}, 2)
    with pytest.raises(BenchFailed):
        check_equal({"alignkit": ours, "trl": replace(ours, **change)}, 2)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ValueError('boom')", r"exit code 1; its output:[\s\S]*ValueError: boom"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("import time; print('thinking', flush=True); time.sleep(60)", r"silent for 1 s; its output:\s*thinking"),
    ],
)
def test_a_side_that_dies_or_hangs_is_reported(tmp_path, code, said):
    runner = Runner("trl", [sys.executable, "-c", code], dict(os.environ), tmp_path / "log", timeout=1)
    try:
        with pytest.raises(BenchFailed, match=said):
            runner.receive("lap")
    finally:
        runner.close()


def test_a_side_that_fails_shows_its_traceback(tmp_path):
    job = Job("no-such-method", tmp_path, 4, 4, 64, 0, 1, "cpu", "auto", True)
    runner = Runner("trl", [sys.executable, "-m", "bench.child", "trl"], environment(job), tmp_path / "log", 60)
    try:
        runner.send((job, 1))
        with pytest.raises(BenchFailed, match=r"trl failed:\nTraceback[\s\S]*KeyError: 'no-such-method'"):
            runner.receive("imported")
    finally:
        runner.close()


def test_a_workload_without_an_algorithm_is_skipped(tmp_path, monkeypatch, capsys):
    workload = replace(SMOKE, algorithm="not_there")
    monkeypatch.setitem(WORKLOADS, "smoke-none", workload)
    document = Document(tmp_path / "bench.json", QUICK)
    assert run(["smoke-none"], QUICK, tmp_path, document) == 0
    assert "alignkit has no algorithm 'not_there' yet" in capsys.readouterr().err
    assert "smoke-none" in json.loads((tmp_path / "bench.json").read_text())["not_raced"]


def test_the_folder_runs_from_anywhere(tmp_path):
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(name in shown.stdout for name in WORKLOADS)
    assert "unmeasured" in shown.stdout
    assert make_parser().parse_args(["all"]).steps == 8


@pytest.mark.xdist_group("trl")
def test_both_sides_train_alike_step_by_step(tmp_path):
    said: list[str] = []
    tracks = race("smoke-dpo", SMOKE, QUICK, tmp_path / "race", said.append)
    ours, theirs = tracks["alignkit"], tracks["trl"]
    assert len(said) == 4
    assert ours.tokens == theirs.tokens
    assert ours.digests == theirs.digests
    assert ours.losses == pytest.approx(theirs.losses, rel=0, abs=5e-5)
    assert ours.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert theirs.facts["head_scores_completions_only"]
    found = figures(tracks, QUICK)
    assert found.agree
    assert found.grad_norm_difference < 1e-4
    numbers = (found.cpu.median, found.wall.median, found.train_memory, found.peak_memory, found.setup_cpu)
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    document = Document(tmp_path / "bench.json", QUICK)
    document.add("smoke-dpo", 4, found, tracks)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert len(written["workloads"]["smoke-dpo"]["raw"]["trl"]["steps"]) == 3
