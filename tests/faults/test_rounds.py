"""Killed in any phase of a round and resumed, a run ends as if nothing had happened, and redoes nothing finished."""

import json
import signal
from contextlib import contextmanager

import pytest

from alignkit import assemble
from alignkit.algorithms.dpo import DPO
from alignkit.recipe import dump_recipe, load_recipe
from alignkit.run import resume, train
from alignkit.testing import Bench, Killed, comparable_metrics, digest, killed_at, toy_rows
from alignkit.track.folder import read_lines
from tests.faults import plants
from tests.faults.process import alignkit

pytestmark = pytest.mark.xdist_group("faults-rounds")

STEPS = 3
"""Optimizer steps of a round: seven pairs in batches of three."""
DAMP = {"metric": "drift/judge_accuracy", "above": 0.0, "action": "damp", "factor": 0.75}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench("self_rewarding", folder=tmp_path_factory.mktemp("rounds"))
    rows = "".join(json.dumps(row) + "\n" for row in toy_rows(DPO, 4))
    (made.folder / "labels.jsonl").write_text(rows, encoding="utf-8")
    return made


def recipe(bench, run, *rules):
    """Three rounds, judged by a toy reward and by what the policy prefers; checkpoints fall inside rounds."""
    made = json.loads(bench.recipe(run, batch_size=3, save_steps=2).model_dump_json(by_alias=True))
    made["algorithm"] |= {"prompts_per_round": 7, "rounds": 3}
    made["rewards"].append({"name": "implicit"})
    made["drift"] = {"labels": [{"path": str(bench.folder / "labels.jsonl")}], "rules": [DAMP, *rules]}
    made["eval"] |= {"data": [{"path": str(bench.data)}], "num_samples": 2, "each_round": True}
    made["eval"]["sampling"]["max_completion_length"] = 6
    return load_recipe(made)


@pytest.fixture(scope="module")
def going_back(bench):
    """A rule that undoes the third round: about the first number that was never so high before it."""
    watched = train(recipe(bench, "watched"), quiet=True, report=False).folder
    first, second, third = (line["metrics"] for line in read_lines(watched / "rounds.jsonl") if "metrics" in line)
    name = next(name for name in third if name != "round" and third[name] > max(first[name], second.get(name, 1e9)))
    return {"metric": name, "above": (third[name] + max(first[name], second[name])) / 2, "action": "rollback"}


@pytest.fixture(scope="module")
def whole(bench, going_back):
    result = train(recipe(bench, "whole", going_back), quiet=True, report=False)
    assert result.steps == 2 * STEPS + 1, "two rounds, and the way back"
    return result.folder


@contextmanager
def watching(phase=None, version=None):
    """Versions at which rounds were written, scored and held to labels; dies when that work is done, unkept."""
    done = {"sampling": [], "judging": [], "measuring": []}
    write, score = assemble._Autocast.fill, assemble.score_groups

    def finished(what, at):
        done[what].append(at)
        if (what, at) == (phase, version):
            raise Killed

    def fill(self, groups, n):
        filled = write(self, groups, n)
        finished("sampling", filled[0].completions[0].version)
        return filled

    def scored(groups, sources, step, models, **options):
        found = score(groups, sources, step, models, **options)
        if "world" in options:  # not an evaluation
            finished("measuring" if groups[0].completions[0].version < 0 else "judging", step)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble._Autocast, "fill", fill)
        patch.setattr(assemble, "score_groups", scored)
        yield done


def killed(bench, name, going_back, phase, number):
    """Begin a run that dies in a phase of a round."""
    step = number * STEPS
    with killed_at(step + 2 if phase == "updating" else -1), watching(phase, step), pytest.raises(Killed):
        train(recipe(bench, name, going_back), quiet=True, report=False)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *((phase, number) for number in (0, 1) for phase in ("sampling", "judging", "measuring", "updating")),
        ("measuring", 2),
    ],
)
def test_killed_in_a_phase_and_resumed_equals_unbroken(bench, whole, going_back, phase, number):
    name = f"{phase}-{number}"
    killed(bench, name, going_back, phase, number)
    with watching() as done:
        resume(bench.folder / name, quiet=True, report=False)
    found = bench.folder / name
    assert digest(found) == digest(whole)
    assert comparable_metrics(found) == comparable_metrics(whole)
    for file in ("rounds.jsonl", "samples.jsonl"):
        assert (found / file).read_bytes() == (whole / file).read_bytes()
    later = [step for step in (0, STEPS, 2 * STEPS) if step > number * STEPS]
    # An unfinished first round has no checkpoint before it; of the second the kill comes behind one inside the round.
    again = [number * STEPS] if number == 0 or phase != "updating" else []
    assert done["sampling"] == (again if phase == "sampling" else []) + later
    assert done["judging"] == (again if phase in ("sampling", "judging") else []) + later
    assert done["measuring"] == again + later


def test_killed_again_and_again_equals_unbroken(bench, whole, going_back):
    killed(bench, "worn", going_back, "judging", 0)
    for phase, step in (("sampling", STEPS), ("measuring", STEPS), ("judging", 2 * STEPS), ("measuring", 2 * STEPS)):
        with watching(phase, step), pytest.raises(Killed):
            resume(bench.folder / "worn", quiet=True, report=False)
    resume(bench.folder / "worn", quiet=True, report=False)
    assert digest(bench.folder / "worn") == digest(whole)
    assert comparable_metrics(bench.folder / "worn") == comparable_metrics(whole)
    assert (bench.folder / "worn" / "rounds.jsonl").read_bytes() == (whole / "rounds.jsonl").read_bytes()


def in_a_process(bench, name, verb="train", plant=None):
    """`alignkit train` or `resume` in a process of its own."""
    path = bench.folder / f"{name}.yaml"
    path.write_text(dump_recipe(recipe(bench, name)), encoding="utf-8")
    told = path if verb == "train" else bench.folder / name
    return alignkit(verb, told, said=bench.folder / f"{name}-{verb}.log", plant=plant)


@pytest.fixture(scope="module")
def untouched(bench):
    code, said = in_a_process(bench, "untouched")
    assert code == 0, said
    return bench.folder / "untouched"


@pytest.mark.parametrize("step", [0, STEPS, 2 * STEPS])
@pytest.mark.parametrize("phase", ["written", "scored", "updated"])
def test_a_process_ended_by_kill_9_goes_on_to_the_same_bits(bench, untouched, phase, step):
    """Half of what was written or scored is on disk, or a step is half done."""
    plant = (plants.kill_in_step, step + 2) if phase == "updated" else (plants.kill_in_phase, (phase, step))
    name = f"{phase}-{step}"
    code, said = in_a_process(bench, name, plant=plant)
    assert code == -signal.SIGKILL, said
    code, said = in_a_process(bench, name, "resume")
    assert code == 0, said
    found = bench.folder / name
    assert digest(found) == digest(untouched)
    assert comparable_metrics(found) == comparable_metrics(untouched)
    for file in ("rounds.jsonl", "samples.jsonl"):
        assert (found / file).read_bytes() == (untouched / file).read_bytes()
    assert not (found / "rounds").exists(), "what a round wrote is of no use to a finished run"
