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

from bench import cli  # noqa: E402
from bench.cli import make_parser, run, run_samples  # noqa: E402
from bench.gate import Lap  # noqa: E402
from bench.job import Job  # noqa: E402
from bench.online import online_figures, online_table  # noqa: E402
from bench.race import BenchFailed, Runner, Settings, Track, check_equal, environment, prepare, race  # noqa: E402
from bench.report import Document, figures, table  # noqa: E402
from bench.sampling import SAMPLES, Written, make_prompts, race_samples, sample_figures, sample_table  # noqa: E402
from bench.workloads import STOP_HAZARD, WORKLOADS, even_share, in_training_order, make_rows, write_model  # noqa: E402

SMOKE, SMOKE_ONLINE = WORKLOADS["smoke-dpo"], WORKLOADS["smoke-grpo"]
QUICK = Settings(steps=2, warmup=1, setup_pairs=0)


def track(seconds: list[float], peak: int, base: int, losses: list[float]) -> Track:
    laps = [Lap(wall=second, cpu=2 * second, peak=peak, resident=base) for second in seconds]
    return Track(laps[0], laps[1:], base, losses, [1.0] * len(losses), [9, 9], ["a", "b"], [], {"threads": 1})


@pytest.mark.parametrize("name", WORKLOADS)
def test_rows_are_within_their_ranges_and_do_not_depend_on_how_many_there_are(name):
    workload = WORKLOADS[name]
    rows = make_rows(workload, 40, seed=1)
    assert rows[:7] == make_rows(workload, 7, seed=1)
    assert rows[:7] != make_rows(workload, 7, seed=2)
    low, high = workload.lengths.prompt_range
    prompts = [len(row["prompt"].split()) for row in rows]
    assert all(low <= length <= high for length in prompts)
    assert len(set(prompts)) > 10 or low == high
    shortest, longest = workload.lengths.completion_range
    completions = [row[column] for row in rows for column in ("chosen", "rejected", "completion") if column in row]
    assert all(shortest <= len(text.split()) + 1 <= longest for text in completions)  # the end token is the last
    assert bool(completions) is not bool(workload.samples)
    words = {int(word[1:]) for row in rows for text in row.values() if isinstance(text, str) for word in text.split()}
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


def test_a_job_that_writes_completions_holds_whole_groups(tmp_path):
    job = prepare(SMOKE_ONLINE, replace(QUICK, batch_size=24, setup_pairs=10), tmp_path / "race")
    assert (job.rows, job.rows_a_step, job.samples, job.longest) == (12, 3, 8, 24)
    with pytest.raises(BenchFailed, match="a batch of 12 cannot hold 8 completions of every prompt"):
        prepare(SMOKE_ONLINE, replace(QUICK, batch_size=12), tmp_path / "other")


def test_models_that_write_stop_as_often_as_they_should(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    write_model(tmp_path, SMOKE_ONLINE.shape, SMOKE_ONLINE.lengths.longest, 1, written_after=20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = torch.randint(2, SMOKE_ONLINE.shape.vocabulary, (32, 44), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        hazard = model(texts).logits[:, 19:].softmax(-1)[..., 1]
    assert float(hazard.mean()) == pytest.approx(STOP_HAZARD, rel=0.1)
    assert float(hazard.min()) > STOP_HAZARD / 3
    assert float(hazard.max()) < STOP_HAZARD * 3


def test_the_reward_is_a_share_of_words():
    assert even_share([" w2 w4 w7 w13", "", "<pad> w8"], prompts=["a"] * 3) == [0.5, 0.0, 0.5]


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


def test_figures_of_written_completions_are_by_token():
    ours = track([1.0, 9.0, 1.0, 2.0, 1.0], peak=150, base=100, losses=[0.0])
    theirs = track([3.0, 9.0, 4.0, 4.0, 3.0], peak=300, base=100, losses=[0.0])
    facts = {"threads": 1, "sampling_logp_difference": 2e-6}
    tracks = {
        "alignkit": replace(ours, lengths=[[99], [1, 9], [10, 10], [10]], facts=facts),
        "trl": replace(theirs, lengths=[[99], [20], [10], [3, 7]]),
    }
    found = online_figures(tracks, replace(QUICK, steps=3))
    assert (found.cpu.median, found.cpu.low, found.cpu.high) == (3.0, 2.0, 4.0)
    ratio = found.cpu_per_token  # seconds a token 0.2 : 0.4, 0.2 : 0.8, 0.2 : 0.6
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3.0, 2.0, 4.0))
    assert found.wall_per_token == ratio
    assert (found.tokens, found.mean_length) == ({"alignkit": 40, "trl": 40}, {"alignkit": 8.0, "trl": 10.0})
    assert (found.train_memory, found.agree) == (0.25, True)
    assert "| smoke-grpo | 16 | 3.00 (2.00–4.00) |" in online_table([("smoke-grpo", 16, found)])
    tracks["alignkit"].facts["sampling_logp_difference"] = 6e-5
    wrong = online_figures(tracks, replace(QUICK, steps=3))
    assert not wrong.agree
    assert "they differ" in online_table([("smoke-grpo", 16, wrong)])


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
    job = Job("dpo", tmp_path, 4, 4, 64, 0, 1, "cpu", "auto", True)
    runner = Runner(
        "trl", [sys.executable, "-m", "bench.child", "no-such-side"], environment(job), tmp_path / "log", 60
    )
    try:
        runner.send((job, 1))
        with pytest.raises(BenchFailed, match=r"trl failed:\nTraceback[\s\S]*KeyError: 'no-such-side'"):
            runner.receive("imported")
    finally:
        runner.close()


def test_a_workload_without_an_algorithm_is_skipped(tmp_path, monkeypatch, capsys):
    workload = replace(SMOKE, algorithm="not_there")
    monkeypatch.setitem(WORKLOADS, "smoke-none", workload)
    document = Document(tmp_path / "bench.json", QUICK)
    assert run(["smoke-none"], QUICK, tmp_path, document, figures, table) == 0
    assert "alignkit has no algorithm 'not_there' yet" in capsys.readouterr().err
    assert "smoke-none" in json.loads((tmp_path / "bench.json").read_text())["not_raced"]


def test_the_folder_runs_from_anywhere(tmp_path):
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(name in shown.stdout for name in [*WORKLOADS, *SAMPLES])
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


@pytest.mark.xdist_group("trl")
def test_both_sides_write_after_the_same_prompts_and_train_on_it(tmp_path):
    tracks = race("smoke-grpo", SMOKE_ONLINE, QUICK, tmp_path / "race", lambda _: None)
    ours, theirs = tracks["alignkit"], tracks["trl"]
    assert ours.digests == theirs.digests
    assert ours.lengths != theirs.lengths, "each side draws for itself"
    for side in (ours, theirs):
        assert [len(step) for step in side.lengths] == [16] * 3
        lengths = {length for step in side.lengths for length in step}
        assert 1 <= min(lengths) < max(lengths) == 24
        assert all(norm > 1e-3 for norm in side.grad_norms)
    assert theirs.facts["head_scores_completions_only"]
    found = online_figures(tracks, QUICK)
    assert found.agree
    assert found.logp_difference > 0
    assert all(math.isfinite(x) and x > 0 for x in (found.cpu_per_token.median, found.train_memory))
    document = Document(tmp_path / "bench.json", QUICK)
    document.add("smoke-grpo", 16, found, tracks)
    assert json.loads((tmp_path / "bench.json").read_text())["workloads"]["smoke-grpo"]["figures"]["agree"]


def test_figures_of_samplers_are_medians_of_pairs():
    ours = Written(cpu=[1.0, 2.0, 1.0], wall=[1.0, 1.0, 1.0], tokens=[10, 20, 10])
    theirs = Written(cpu=[3.0, 4.0, 4.0], wall=[5.0, 5.0, 5.0], tokens=[10, 10, 20])
    found = sample_figures({"alignkit": ours, "generate": theirs}, 2e-6)
    assert (found.cpu.median, found.cpu.low, found.cpu.high) == (3.0, 2.0, 4.0)
    assert found.cpu_per_token.median == pytest.approx(3.0)  # 0.1 : 0.3, 0.1 : 0.4, 0.1 : 0.2
    assert found.tokens == {"alignkit": 40, "generate": 40}
    assert found.agree
    assert not sample_figures({"alignkit": ours, "generate": theirs}, 2e-5).agree
    assert "| smoke-sample | 2 x 8 | 3.00 (2.00–4.00) |" in sample_table(
        [("smoke-sample", SAMPLES["smoke-sample"], found)]
    )


@pytest.mark.parametrize(("difference", "code"), [(2e-6, 0), (2e-5, 1)])
def test_samplers_that_are_not_the_trainer_fail(tmp_path, monkeypatch, capsys, difference, code):
    written = {side: Written([1.0], [1.0], [10]) for side in ("alignkit", "generate")}
    monkeypatch.setattr(cli, "race_samples", lambda *_: (sample_figures(written, difference), written))
    document = Document(tmp_path / "bench.json", QUICK)
    assert run_samples(["smoke-sample"], QUICK, tmp_path, document) == code
    assert ("they differ" in capsys.readouterr().out) == (code == 1)
    assert json.loads((tmp_path / "bench.json").read_text())["workloads"]["smoke-sample"]["raw"] == {
        side: {"cpu": [1.0], "wall": [1.0], "tokens": [10]} for side in written
    }


def test_samplers_write_the_same_number_of_tokens_after_the_same_prompts(tmp_path):
    said: list[str] = []
    sample = SAMPLES["smoke-sample"]
    found, written = race_samples("smoke-sample", sample, 2, 0, 1, tmp_path, said.append)
    assert len(said) == 2
    most = sample.prompts * sample.samples * sample.new
    assert all(0.8 * most < tokens <= most for side in written.values() for tokens in side.tokens)
    assert found.agree
    assert found.cpu.median > 1
    prompts = make_prompts(sample, 0, 1)
    assert prompts == make_prompts(sample, 0, 1) != make_prompts(sample, 0, 2)
    assert len(prompts[0]) == sample.prompt > len(prompts[1])
