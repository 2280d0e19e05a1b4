import io

import pytest
from rich.console import Console

from alignkit.track.console import ConsoleSink
from alignkit.track.text import duration, flatten, number, tracker_names
from tests.track.fake_run import eval_record, train_record


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(facts, *, terminal=False, quiet=False, records=None, width=80):
    out, clock = io.StringIO(), Clock()
    sink = ConsoleSink(Console(file=out, force_terminal=terminal, width=width), quiet=quiet, clock=clock)
    sink.start(facts)
    for record in records or [train_record(3), eval_record(10)]:
        clock.now += 6
        sink.log(record)
    sink.close()
    return out.getvalue()


def test_plain_lines_are_exact_and_unwrapped(facts):
    training, evaluation = run(facts).splitlines()
    assert training == (
        "step 3/30  epoch 0.3  loss 0.6025  rewards/chosen 0.145  rewards/rejected -0.2175  rewards/margins 0.3625  "
        "rewards/accuracies 0.5816  grad_norm 1.819  lr 0.0005  elapsed 0:06  eta 0:54"
    )
    assert evaluation == "eval  step 10/30  epoch 1  loss 0.4403  rewards/accuracies 0.8045  win_rate 0.7718"


def test_eta_of_a_resumed_run_counts_only_its_own_steps(facts):
    resumed = {**facts, "start_step": 10, "resumed": True}
    first, line = run(resumed, records=[train_record(12)]).splitlines()
    assert first == "resumed after step 10 of 30"
    assert line.endswith("elapsed 0:06  eta 0:54")  # 2 steps took 6 s, 18 are left


def test_a_terminal_gets_a_bar_and_evaluations_as_lines(facts):
    text = run(facts, terminal=True, records=[train_record(3), eval_record(10), train_record(30)])
    assert "━" in text
    assert "30/30" in text
    assert "loss 0.2206  accuracies 0.9252" in text
    assert "margins" not in text.rsplit("30/30", 1)[1]
    assert "…" not in text, "80 columns hold the whole bar"
    assert "eval  step 10/30" in text
    assert "step 3/30  epoch" not in text


def test_a_wide_terminal_gets_more_numbers(facts):
    text = run(facts, terminal=True, records=[train_record(30)], width=120)
    assert "loss 0.2206  accuracies 0.9252  margins 1.89  grad_norm 1.055" in text


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("NO_COLOR", "1"), ("TERM", "dumb")])
def test_these_variables_ask_for_plain_lines(facts, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    text = run(facts, terminal=True)
    assert "step 3/30  epoch 0.3" in text
    assert "━" not in text


def test_quiet_shows_nothing(facts):
    assert run(facts, quiet=True) == ""
    assert run(facts, quiet=True, terminal=True) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.69314718, "0.6931"), (5e-07, "5e-07"), (-0.0, "0"), (12345.6, "12346"), (30000, "30000"), (0.5, "0.5")],
)
def test_number(value, text):
    assert number(value) == text


def test_duration():
    assert [duration(s) for s in (6.6, 754, 12345)] == ["0:07", "12:34", "3:25:45"]


def test_flatten():
    facts = {"a": {"b": [1, 2], "c": None}, "d": [{"e": True}], "f": {}}
    assert list(flatten(facts)) == [("a.b", "1, 2"), ("a.c", "null"), ("d.0.e", "true"), ("f", "none")]


def test_tracker_names():
    record = {"step": 4, "loss": 1.0, "eval_rewards/accuracies": 0.5}
    assert tracker_names(record) == {"train/loss": 1.0, "eval/rewards/accuracies": 0.5}
