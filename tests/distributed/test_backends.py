"""Every backend in two processes against one process, on CPU over gloo: one launch a backend does everything."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit.algorithms.dpo import DPO
from alignkit.core.registry import register
from alignkit.loop.checkpoint import find_fault
from alignkit.recipe import dump_recipe, load_recipe
from alignkit.run import train
from alignkit.testing import (
    Bench,
    Killed,
    _assert_close_metrics,
    comparable_metrics,
    digest,
    killed_at,
    read_metrics,
    run_processes,
    toy_rows,
    weight_difference,
    world_recipe,
)
from tests.distributed.backends_worker import KILLED_AT

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("backends")]

WORKER = str(Path(__file__).with_name("backends_worker.py"))
BACKENDS = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
SHARDED = BACKENDS[1:]
NAMES = register.algorithm.names()
KILLED = ["dpo", "grpo", "ppo"]
"""Methods whose runs are killed and resumed: of pairs, of rounds, and of two models."""
LORA = {"r": 4, "alpha": 8}


class Launched:
    """A folder with the recipes of all methods, and what each backend made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.benches = {}
        self._done: set[str] = set()
        for name in NAMES:
            place = folder / "bench" / name
            place.mkdir(parents=True)
            self.benches[name] = Bench(name, folder=place)
            self._write("recipes", name, world_recipe(self.benches[name], 2))
        lora = self.benches["dpo"].recipe("lora", model={"lora": LORA}, max_steps=3, num_epochs=5, batch_size=3)
        self._write("recipes", "dpo-lora", lora)
        bfloat16 = self.benches["dpo"].recipe("bfloat16", model={"dtype": "bfloat16"}, max_steps=2, num_epochs=5)
        self._write("recipes", "dpo-bfloat16", bfloat16)
        for name in KILLED:
            settings = {"batch_size": 3, "num_epochs": 5, "max_steps": 5, "epochs_per_round": 2, "save_steps": 2}
            self._write("killed", f"{name}-killed", self.benches[name].recipe("killed", **settings))

        self._write_back()

    def _write_back(self) -> None:
        """Rounds that a rule of drift takes back: the policy ends with the weights that it started from."""
        bench = self.benches["self_rewarding"]
        labels = bench.folder / "labels.jsonl"
        labels.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(DPO, 8)))
        made = json.loads(bench.recipe("back", batch_size=3).model_dump_json(by_alias=True))
        made["algorithm"] |= {"prompts_per_round": 7, "rounds": 3}
        rule = {"metric": "drift/chosen_logps_change", "above": 1e-9, "action": "rollback"}
        made["drift"] = {"labels": [{"path": str(labels)}], "rules": [rule]}
        (self.folder / "back.yaml").write_text(dump_recipe(load_recipe(made)))

    def _write(self, kind: str, name: str, recipe) -> None:
        (self.folder / kind).mkdir(exist_ok=True)
        (self.folder / kind / f"{name}.yaml").write_text(dump_recipe(recipe))

    def alone(self, kind: str, name: str, folder: Path | None = None, *, resume: bool = False) -> Path:
        """The recipe in this process; run once."""
        target = folder or self.folder / "alone" / name
        if resume or not (target / "README.md").exists():  # the last file of a run
            recipe = load_recipe(self.folder / kind / f"{name}.yaml").model_copy(update={"output_dir": str(target)})
            train(recipe, resume=resume, quiet=True, report=False)
        return target

    def of(self, backend: str) -> Path:
        """The runs of a backend."""
        target = self.folder / backend
        if backend not in self._done:
            for name in KILLED:  # one process begins what two go on with
                with killed_at(KILLED_AT), pytest.raises(Killed):
                    self.alone("killed", f"{name}-killed", target / f"{name}-killed-grown")
            run_processes([WORKER, str(self.folder), backend], 2)
            self._done.add(backend)
        return target

    def seen(self, backend: str) -> list[list[dict]]:
        """What each rank wrote."""
        self.of(backend)
        return [json.loads((self.folder / f"{backend}-rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return Launched(tmp_path_factory.mktemp("backends"))


def assert_same_run(found: Path, expected: Path, bench: Bench, tolerance: float = 1e-5) -> None:
    assert weight_difference(expected, found) <= tolerance
    _assert_close_metrics(bench, found.parent.name, read_metrics(found), read_metrics(expected), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_process_knows_the_world_and_the_backend(launched, backend):
    """Asserted in the workers too, at every run's start."""
    first, second = launched.seen(backend)
    assert len(first) == len(second) >= (len(NAMES) if backend != "ddp" else 1)
    for facts in (*first, *second):
        assert (facts["world"], facts["group"], facts["backend"]) == (2, 2, backend)


@pytest.mark.parametrize("backend", SHARDED)
def test_processes_share_what_they_say_they_share(launched, backend):
    for rank, found in enumerate(launched.seen(backend)):
        for facts in found:
            state, weights = facts["state"] / facts["all_state"], facts["weights"] / facts["all_weights"]
            assert 0.3 < state < 0.7, rank
            assert weights == 1 if backend in ("zero1", "zero2") else 0.4 < weights < 0.65, rank


@pytest.mark.parametrize("backend", SHARDED)  # DDP: tests/contract
@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_as_in_one_process(launched, name, backend):
    folder = launched.of(backend) / name
    assert_same_run(folder, launched.alone("recipes", name), launched.benches[name])


@pytest.mark.parametrize("backend", SHARDED)
def test_adapters_train_as_in_one_process(launched, backend):
    assert_same_run(launched.of(backend) / "dpo-lora", launched.alone("recipes", "dpo-lora"), launched.benches["dpo"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_computes_and_exports_as_in_one_process(launched, backend):
    found, alone = launched.of(backend) / "dpo-bfloat16", launched.alone("recipes", "dpo-bfloat16")
    assert json.loads((found / "config.json").read_text())["dtype"] == "bfloat16"
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (found, alone)]
    assert {p.dtype for model in models for p in model.parameters()} == {torch.bfloat16}
    # Adam's first steps are as long as the rate: a gradient of 0 that rounding turns round moves by twice that.
    assert weight_difference(alone, found) <= 2 * 2 * 1e-3 + 2**-8  # a number of up to 1 is rounded by half of that


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KILLED)
def test_killed_run_resumes_to_the_same_bits(launched, name, backend):
    killed, whole = (launched.of(backend) / f"{name}-killed{ending}" for ending in ("", "-whole"))
    assert digest(killed) == digest(whole)
    assert comparable_metrics(killed) == comparable_metrics(whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KILLED)
def test_one_process_goes_on_with_what_two_left(launched, name, backend):
    left = launched.of(backend) / f"{name}-killed-left"
    assert not (left / "config.json").exists()
    launched.alone("killed", f"{name}-killed", left, resume=True)
    assert read_metrics(left)[-1]["step"] == 5
    if name == "dpo":  # the checkpoint stands between two rounds: nothing is passed over
        alone = launched.alone("killed", f"{name}-killed")
        assert weight_difference(alone, left) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KILLED)
def test_two_processes_go_on_with_what_one_left(launched, name, backend):
    grown = launched.of(backend) / f"{name}-killed-grown"
    assert read_metrics(grown)[-1]["step"] == 5
    if name == "dpo":
        alone = launched.alone("killed", f"{name}-killed")
        assert weight_difference(alone, grown) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_export_loads_in_plain_transformers_with_the_same_logits(launched, backend):
    folders = launched.of(backend) / "dpo", launched.alone("recipes", "dpo")
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        found, expected = (AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in folders)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_that_drift_are_taken_back(launched, backend):
    """Weights that are set while they are whole stay, wherever they are kept."""
    folder = launched.of(backend) / "back"
    assert read_metrics(folder)[-2]["step"] == 3, "it took the steps of a round"
    assert find_fault(folder / "checkpoint-4") is None, "the way back counts as a step"
    assert weight_difference(folder, launched.benches["self_rewarding"].model) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_that_is_not_finite_stops_the_run_before_the_step(launched, backend):
    for rank in launched.seen(backend):
        told = next(facts["broken"] for facts in rank if "broken" in facts)
        assert told.startswith("step 3: grad_norm not finite; stopped before the step.")
    folder = launched.folder / backend / "broken"
    assert find_fault(folder / "checkpoint-2") is None
    assert len(list((folder / "debug" / "step-3").glob("batch-rank-*.json"))) == 2


def test_weights_that_drift_apart_stop_the_run(launched):
    for rank in launched.seen("ddp"):
        assert "the weights of rank 1 are not those of rank 0" in rank[-1]["drifted"]
    assert not list((launched.folder / "ddp" / "drifted").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("backend", "complaint"), [("fsdp2", "nothing was spread"), ("zero2", "DeepSpeed runs stage 1")]
)
def test_backend_that_does_not_share_stops_the_run(launched, backend, complaint):
    for rank in launched.seen(backend):
        assert complaint in rank[-1]["unsharded"]
    assert not (launched.folder / backend / "unsharded" / "metrics.jsonl").exists()
