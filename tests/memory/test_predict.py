"""Predicted memory against memory measured, and how it is shared out."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from alignkit.dist.config import DistConfig
from alignkit.dist.zero import BUCKET
from alignkit.memory import profile
from alignkit.memory.predict import KEPT_GATHERED, Sharing, predict
from alignkit.memory.profile import Model, Profile, Rows, Sizes
from alignkit.models.config import LoraConfig, ModelConfig
from alignkit.recipe import load_recipe


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["memory_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model of four layers."""
    shape = script.Shape(vocabulary=512, hidden=64, layers=4, feed_forward=160, heads=2, key_value_heads=1)
    return str(script.build(script.Case("dpo", {}, shape), tmp_path_factory.mktemp("deep"))["model"]["name_or_path"])


@pytest.mark.parametrize("name", ["dpo-lora-checkpointed-packed", "dpo-padded", "grpo"])
def test_the_predicted_peak_is_that_of_a_real_run(
    name: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = script.Shape(vocabulary=1024, hidden=128, layers=2, feed_forward=352, heads=2, key_value_heads=1)
    monkeypatch.setitem(script.CASES, name, replace(script.CASES[name], shape=small))
    found = script.compare(name, "cpu", tmp_path)
    assert -script.LOW <= script.off(found) <= script.WITHIN, found
    for phase in ("forward", "backward"):
        ratio = found["predicted"][phase] / found["measured"][phase]
        assert 0.95 <= ratio <= 1.15, (phase, found)


@pytest.mark.parametrize(
    ("device", "checkpointing", "lora"),
    [
        ("cuda", True, None),
        ("cpu", False, LoraConfig(r=4)),
    ],
)
def test_a_deep_model_is_what_two_shallow_ones_say(
    device: str, checkpointing: bool, lora: LoraConfig | None, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(name_or_path=model, gradient_checkpointing=checkpointing, lora=lora, dtype="bfloat16")
    rows = Rows(4, 2, 128, 16, 1, frozenset({"logps", "entropy"}), 512, None)
    whole = Profile(Model(config), device)
    assert len(whole.policy.bare.get_base_model().model.layers if lora else whole.policy.bare.model.layers) == 4
    monkeypatch.setattr(profile, "MEASURED_WHOLE", 3)
    short = Profile(Model(config), device)
    said, counted = short.train(rows), whole.train(rows)
    assert (said.forward, said.backward) == (counted.forward, counted.backward)
    # when gradients come while activations go, it is known from above
    assert counted.arriving <= said.arriving <= 1.15 * (counted.arriving + whole.sizes.weights)
    assert short.score(rows) == whole.score(rows)


def test_a_micro_batch_is_as_large_as_the_recipe_allows(model: str) -> None:
    found = Profile(Model(ModelConfig(name_or_path=model, dtype="float32")), "cpu")
    rows = Rows(64, 2, 128, 16, 1, frozenset({"logps"}), 1000, None)
    # a pair takes 16 + 2 · 112 - 2 = 238 tokens, of which four fit; what they leave is filled by shorter rows
    small = found.train(rows)
    assert small.forwards == 16
    assert 1000 - 2 <= small.fed <= 1000
    large = found.train(Rows(64, 2, 128, 16, 1, frozenset({"logps"}), 2000, None))
    assert large.forward > 1.8 * small.forward
    one = found.train(Rows(64, 2, 128, 16, 1, frozenset({"logps"}), 2000, 1))
    assert (one.forwards, one.fed) == (64, 238)


def test_how_processes_share_it() -> None:
    gib = 2**30
    # 4 GiB of float32 weights that all train; 1 GiB outside the layers, 0.5 GiB a layer
    sizes = Sizes(4 * gib, 4 * gib, gib, gib // 2, gib, gib)

    def shared(world: int = 4, device: str = "cuda", **settings: object) -> Sharing:
        return Sharing(DistConfig.model_validate(settings), world, device)

    alone, ddp = shared(1), shared()
    assert (alone.weights(sizes), alone.optimizer(sizes), alone.gradients(sizes, arrived=True)) == (
        4 * gib,
        8 * gib,
        4 * gib,
    )
    assert ddp.gradients(sizes, arrived=True) == 8 * gib  # and the buffers they are exchanged through
    assert ddp.gradients(sizes, arrived=False) == 4 * gib
    one, two, three = (shared(backend=f"zero{stage}") for stage in (1, 2, 3))
    assert one.optimizer(sizes) == two.optimizer(sizes) == 3 * gib  # two moments and a copy
    assert three.optimizer(sizes) == 2 * gib  # it moves the float32 parts themselves
    assert one.gradients(sizes, arrived=True) == 4 * gib + 8 * BUCKET
    assert two.gradients(sizes, arrived=True) == gib + 8 * BUCKET
    assert three.gradients(sizes, arrived=True) == gib + 4 * BUCKET
    assert one.weights(sizes) == two.weights(sizes) == 4 * gib
    assert three.weights(sizes) == gib + min(4 * gib, gib + 4 * KEPT_GATHERED)
    fsdp = shared(backend="fsdp2")
    assert fsdp.weights(sizes) == gib + gib + 3 * gib // 2
    assert fsdp.optimizer(sizes) == 2 * gib
    assert fsdp.gathered(sizes) == 5 * gib
    away = shared(backend="fsdp2", offload_optimizer=True, offload_weights=True)
    assert (away.held(sizes), away.optimizer(sizes)) == (0, 0)
    assert shared(backend="zero2", offload_optimizer=True).optimizer(sizes) == 0


def test_other_models_and_phases(model: str) -> None:
    def phases(algorithm: str, *overrides: str, **settings: object) -> dict[str, dict[str, int]]:
        recipe = load_recipe(
            {
                "output_dir": "run",
                "model": {"name_or_path": model, "dtype": "bfloat16"},
                "data": [{"path": "rows.jsonl"}],
                "algorithm": {"name": algorithm},
                "train": {"max_length": 128, "micro_batch_tokens": 1024, "batch_size": 8},
                **settings,
            },
            overrides,
        )
        return {phase.name: dict(phase.parts) for phase in predict(recipe, config=model).phases}

    online = {"rewards": [{"name": "length"}], "rollout": {"num_generations": 4, "max_completion_length": 32}}
    sft, dpo, adapted = phases("sft"), phases("dpo"), phases("dpo", "model.lora.r=4")
    assert "reference" not in sft
    assert dpo["reference"]["others"] == dpo["loading"]["weights"]
    assert dpo["forward"]["others"] == 0  # it was freed
    assert adapted["reference"]["others"] == 0  # the adapter is off
    assert adapted["loading"]["weights"] < 0.6 * dpo["loading"]["weights"]
    kept = phases("dpo", "models.reference.precompute=false")
    assert kept["forward"]["others"] == kept["loading"]["weights"]
    tethered, free = phases("grpo", **online), phases("grpo", "algorithm.beta=0", **online)
    assert tethered["forward"]["others"] == tethered["loading"]["weights"]
    assert free["forward"]["others"] == 0
    assert free["rollout"]["activations"] > 0
    assert "rollout" not in phases("grpo", "rollout.engine=vllm", **online)
    critic = phases("ppo", **online)
    assert critic["loading"]["weights"] > 1.8 * free["loading"]["weights"]
    assert critic["step"]["optimizer"] == 2 * critic["step"]["gradients"]
    scored = phases("reward_model")
    assert "rollout" not in scored
    assert scored["loading"]["weights"] < 1.01 * dpo["loading"]["weights"]
    many = phases("mah_dpo", "algorithm.objectives=[helpful, honest]")
    assert many["loading"]["weights"] > dpo["loading"]["weights"]
