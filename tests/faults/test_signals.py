"""Ctrl-C and SIGTERM: a checkpoint at the next step border, a way to go on, exit 130."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.faults import plants
from tests.faults.bench import VARIANTS, Runs, Whole, checkpoints, leftovers

pytestmark = pytest.mark.xdist_group("faults-signals")


@pytest.mark.parametrize(
    ("number", "variant"),
    [(signal.SIGINT, "full"), (signal.SIGTERM, "full"), (signal.SIGUSR1, "full"), (signal.SIGTERM, "lora")],
)
def test_signal_stops_at_the_step_border_and_resume_equals_unbroken(
    runs: Runs, whole: Whole, number: signal.Signals, variant: str
) -> None:
    name = f"{number.name}-{variant}"
    code, said = runs.train(name, *VARIANTS[variant], plant=(plants.signal_in_step, (5, [number])))
    assert code == 130, said
    assert f"error: stopped by {number.name} after step 5; continue with `alignkit resume {runs[name]}`" in said
    assert "Traceback" not in said
    assert checkpoints(runs[name]) == [4, 5]
    assert leftovers(runs[name]) == []
    said = runs.resume_to(name, whole(variant))
    assert f"continuing from {runs[name] / 'checkpoint-5'}" in said


def test_second_interrupt_stops_at_once(runs: Runs, whole: Whole) -> None:
    code, said = runs.train("twice", plant=(plants.signal_in_step, (6, [signal.SIGINT, signal.SIGINT])))
    assert code == 130, said
    assert "Traceback" not in said
    assert checkpoints(runs["twice"]) == [2, 4]  # nothing was written after the second one
    runs.resume_to("twice", whole("full"))


def test_a_plain_process_interrupted_from_outside(runs: Runs, whole: Whole) -> None:
    """No plant and no fork server: `python -m alignkit`, and a signal whenever it comes."""
    folder = runs["outside"]
    settings = ["train.num_epochs=3000", "train.save_steps=0", "eval.every_steps=0", "train.lr_scheduler=constant"]
    command = [sys.executable, "-m", "alignkit", "train", str(runs.recipe), f"output_dir={folder}", *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    metrics, patience = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < patience, "no step in two minutes"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (step,) = checkpoints(folder)
    assert f"stopped by SIGINT after step {step}; continue with `alignkit resume {folder}`" in said
