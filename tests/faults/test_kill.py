"""Killed at any point and resumed, a run ends as if nothing had happened: same weights, same records."""

import signal

import pytest

from alignkit.core.rng import generator
from alignkit.testing import digest
from tests.faults import plants
from tests.faults.bench import STEPS, VARIANTS, Runs, Whole, checkpoints, leftovers

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults-kill")]

STEPS_TO_DIE_AT = sorted(generator(0, "kill").sample(range(1, STEPS + 1), 5))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", STEPS_TO_DIE_AT)
def test_killed_in_a_step_and_resumed_equals_unbroken(runs: Runs, whole: Whole, variant: str, step: int) -> None:
    name = f"killed-{variant}-{step}"
    code, said = runs.train(name, *VARIANTS[variant], plant=(plants.kill_in_step, step))
    assert code == -signal.SIGKILL, said
    last = (step - 1) // 2 * 2
    assert checkpoints(runs[name]) == [saved for saved in (last - 2, last) if saved > 0]
    said = runs.resume_to(name, whole(variant))
    assert (f"continuing from {runs[name] / f'checkpoint-{last}'}" in said) == (last > 0)


@pytest.mark.parametrize("fault", [plants.kill_in_checkpoint, plants.kill_in_model, plants.kill_in_record])
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_while_writing_and_resumed_equals_unbroken(runs: Runs, whole: Whole, variant: str, fault) -> None:
    name = f"{fault.__name__}-{variant}"
    code, said = runs.train(name, *VARIANTS[variant], plant=(fault, 6))
    assert code == -signal.SIGKILL, said
    assert checkpoints(runs[name]) == [2, 4]
    assert leftovers(runs[name]) == ([] if fault is plants.kill_in_record else [".writing-checkpoint-6"])
    runs.resume_to(name, whole(variant))


@pytest.mark.parametrize("fault", [plants.kill_in_checkpoint, plants.kill_in_model])
def test_killed_while_writing_the_best_and_resumed_equals_unbroken(runs: Runs, fault) -> None:
    settings = ("eval.best_metric=eval_loss", "train.save_total_limit=1", "train.save_steps=5")
    code, said = runs.train(f"best-whole-{fault.__name__}", *settings)
    assert code == 0, said
    whole, name = runs[f"best-whole-{fault.__name__}"], f"best-{fault.__name__}"
    code, said = runs.train(name, *settings, plant=(fault, 4))
    assert code == -signal.SIGKILL, said
    assert checkpoints(runs[name]) == [0]
    runs.resume_to(name, whole)
    assert digest(runs[name] / "best") == digest(whole / "best")
    assert (runs[name] / "best.json").read_bytes() == (whole / "best.json").read_bytes()


def test_killed_again_and_again_equals_unbroken(runs: Runs, whole: Whole) -> None:
    code, said = runs.train("worn", plant=(plants.kill_in_step, 3))
    assert code == -signal.SIGKILL, said
    for plant in [(plants.kill_in_checkpoint, 4), (plants.kill_in_step, 5), (plants.kill_in_record, 9)]:
        code, said = runs.resume("worn", plant=plant)
        assert code == -signal.SIGKILL, said
    runs.resume_to("worn", whole("full"))
