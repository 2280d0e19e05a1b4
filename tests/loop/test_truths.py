"""Step-0 truths: a planted fault stops the run before its first step and is named; a sound run is left alone."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import alignkit.assemble
import alignkit.assemble_models
import alignkit.models.policy
from alignkit.core.errors import RunFailed
from alignkit.core.types import Batch, Forward, Row
from alignkit.dist.engine import DistEngine
from alignkit.loop.truths import check_closed_form, check_rows
from alignkit.models.layout import Inputs, Segments
from alignkit.models.policy import CausalPolicy
from alignkit.recipe import Recipe, load_recipe
from alignkit.run import train
from alignkit.testing import Bench, build_tiny_model, read_metrics


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench("dpo", folder=tmp_path_factory.mktemp("bench"))


@pytest.fixture
def recipe(bench: Bench, tmp_path: Path) -> Callable[..., Recipe]:
    def build(**model: Any) -> Recipe:
        values = bench.recipe("run", max_steps=1).model_dump(mode="json", by_alias=True)
        values["output_dir"] = str(tmp_path / "run")
        values["model"] |= model
        return load_recipe(values)

    return build


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[CausalPolicy, Batch, Forward], torch.Tensor]) -> None:
    """The policy answers with the log-probabilities that `fault` makes of the right ones."""
    sound = CausalPolicy.forward

    def forward(self: CausalPolicy, batch: Batch, outputs: frozenset[str]) -> Forward:
        out = sound(self, batch, outputs)
        return replace(out, logps=fault(self, batch, out).where(batch["mask"], 0.0))

    monkeypatch.setattr(CausalPolicy, "forward", forward)


def stopped(recipe: Recipe) -> str:
    """The message of a run that a truth stopped before its first step."""
    with pytest.raises(RunFailed, match=r"^step-0 truth: ") as caught:
        train(recipe, quiet=True, report=False)
    assert read_metrics(Path(recipe.output_dir)) == []
    assert "Nothing was trained" in str(caught.value)
    assert "train.step0_checks: false" in str(caught.value)
    return str(caught.value)


def table(policy: CausalPolicy, batch: Batch) -> torch.Tensor:
    logits = policy.bare(input_ids=batch.inputs["tokens"], attention_mask=batch.inputs["attention"].long()).logits
    return logits.log_softmax(-1)


def never_shifted(policy: CausalPolicy, batch: Batch, out: Forward) -> torch.Tensor:
    """Position t is asked about token t, which it has just read."""
    return table(policy, batch).gather(2, batch.inputs["tokens"][:, :, None])[:, :, 0]


def shifted_twice(policy: CausalPolicy, batch: Batch, out: Forward) -> torch.Tensor:
    """Position t is asked about token t + 2: the model shifts, and then the trainer does."""
    late = table(policy, batch)[:, :-2].gather(2, batch.inputs["tokens"][:, 2:, None])[:, :, 0]
    return torch.nn.functional.pad(late, (2, 0))


def stored_one_late(policy: CausalPolicy, batch: Batch, out: Forward) -> torch.Tensor:
    return out.logps.roll(1, dims=1)


def stored_one_early(policy: CausalPolicy, batch: Batch, out: Forward) -> torch.Tensor:
    return out.logps.roll(-1, dims=1)


@pytest.mark.parametrize("fault", [never_shifted, shifted_twice, stored_one_late, stored_one_early])
def test_labels_shifted_by_one(recipe, monkeypatch: pytest.MonkeyPatch, fault) -> None:
    plant(monkeypatch, fault)
    assert "Probable cause: labels are shifted by one token." in stopped(recipe())


def test_attention_mask_ignored(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows padded on the left, and nothing tells the model: it reads the padding, and counts positions from it."""

    def unmasked(policy: CausalPolicy, batch: Batch, out: Forward) -> torch.Tensor:
        tokens, width = batch.inputs["tokens"], batch.inputs["tokens"].shape[1]
        blanks = width - batch.inputs["attention"].sum(1)
        place = (torch.arange(width) - blanks[:, None]) % width
        moved = tokens.gather(1, place)
        logps = policy.bare(input_ids=moved).logits.log_softmax(-1)[:, :-1].gather(2, moved[:, 1:, None])[:, :, 0]
        back = (torch.arange(width) + blanks[:, None]) % width
        return torch.nn.functional.pad(logps, (1, 0)).gather(1, back)

    plant(monkeypatch, unmasked)
    said = stopped(recipe())
    assert "Probable cause: padding that is not masked, or position ids" in said
    assert "group 'row-" in said


def test_dropout_left_on(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    load = alignkit.assemble.load_policy

    def noisy(*arguments: Any) -> Any:
        model = load(*arguments)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return model

    monkeypatch.setattr(alignkit.assemble, "load_policy", noisy)
    assert "Probable cause: dropout is on" in stopped(recipe())


def test_reference_from_other_weights(recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache takes another model for this one: its numbers are stale."""
    monkeypatch.setattr(alignkit.assemble_models, "fingerprint", lambda model: "the same")
    other = recipe(name_or_path=str(build_tiny_model(tmp_path / "other", seed=1)))
    train(other.model_copy(update={"output_dir": str(tmp_path / "first")}), quiet=True, report=False)
    said = stopped(recipe())
    assert "differ from the reference's by" in said
    assert "a stale cache of its log-probabilities" in said


def test_closed_form_that_does_not_hold() -> None:
    with pytest.raises(RunFailed, match=r"loss is 0.7 on the first batch; .* it must be 0.693147"):
        check_closed_form({"loss": 0.6931471805599453}, {"loss": 0.7}, torch.float32)
    check_closed_form({"loss": 0.6931471805599453, "absent": 1.0}, {"loss": 0.693147}, torch.float32)
    check_closed_form({"loss": 0.6931471805599453}, {"loss": 0.70}, torch.bfloat16)
    with pytest.raises(RunFailed):
        check_closed_form({"loss": 0.6931471805599453}, {"loss": float("nan")}, torch.bfloat16)


def test_the_checks_can_be_left_out(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, stored_one_late)
    off = recipe()
    off = off.model_copy(update={"train": off.train.model_copy(update={"step0_checks": False})})
    assert train(off, quiet=True, report=False).steps == 1


def positions_of_the_stream(inputs: Inputs) -> Inputs:
    """Positions run on where a row begins; a row of its own cannot show it, since only distances count."""
    return replace(inputs, positions=torch.arange(inputs.tokens.shape[1])[None])


def one_long_row(inputs: Inputs) -> Inputs:
    """Every token sees all that stand before it, whatever their row."""
    assert inputs.segments is not None
    length = sum(inputs.segments.lengths)
    return replace(inputs, segments=Segments((length,), (), length, inputs.segments.device))


def scored_one_late(inputs: Inputs) -> Inputs:
    return replace(inputs, scored=(inputs.scored + 1) % inputs.tokens.numel())


def plant_in_streams(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Inputs], Inputs]) -> None:
    """Streams are laid out wrongly, padded rows rightly, and the first use of the model saw nothing of it."""
    sound = alignkit.models.policy.lay_out

    def lay_out(*arguments: Any) -> Inputs:
        inputs = sound(*arguments)
        return inputs if inputs.segments is None else fault(inputs)

    monkeypatch.setattr(alignkit.models.policy, "lay_out", lay_out)
    monkeypatch.setattr(CausalPolicy, "try_path", lambda *_: None)


LAYOUT_BLAMED = (
    "Probable cause: the way rows are laid out and scored (rows packed without padding, shared prompts once; "
    "log-probabilities in chunks); `model.layout: padded` goes around it."
)


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        (positions_of_the_stream, "float32"),  # to a model this small they mean less than bfloat16 rounds
        (one_long_row, "float32"),
        (one_long_row, "bfloat16"),
        (scored_one_late, "float32"),
        (scored_one_late, "bfloat16"),
    ],
)
def test_wrong_stream(recipe, monkeypatch: pytest.MonkeyPatch, fault, dtype: str) -> None:
    plant_in_streams(monkeypatch, fault)
    assert LAYOUT_BLAMED in stopped(recipe(dtype=dtype))


def test_padded_rows_go_around_a_wrong_stream(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_streams(monkeypatch, one_long_row)
    assert train(recipe(layout="padded"), quiet=True, report=False).steps == 1


def test_wrong_head(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = alignkit.models.policy.choose_path

    def choose(*arguments: Any, **options: Any) -> Any:
        path = sound(*arguments, **options)
        assert path.head is not None
        return replace(path, head=replace(path.head, scale=2.0))

    monkeypatch.setattr(alignkit.models.policy, "choose_path", choose)
    monkeypatch.setattr(CausalPolicy, "try_path", lambda *_: None)
    assert LAYOUT_BLAMED in stopped(recipe())


def test_a_prompt_that_few_rows_share_is_among_those_rescored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the shortest, the middle nor the longest row shares its prompt, and the fault is in shared ones alone."""
    plant_in_streams(monkeypatch, positions_of_the_stream)
    policy = CausalPolicy(alignkit.assemble.load_policy(bench.recipe("few").model), DistEngine(torch.float32))

    def unit(first: int, length: int) -> tuple[Row]:
        tokens = [first, 4, 5, *range(20 + length, 17 + 2 * length)]
        return (Row(tokens, [i >= 3 for i in range(length)], group=f"g{first}-{length}"),)

    alone = [unit(6, 5), unit(7, 10), unit(8, 11), unit(9, 12), unit(10, 18)]
    check_rows(policy, alone, torch.float32)
    with pytest.raises(RunFailed, match=r"group 'g11-(7|8)'"):
        check_rows(policy, [*alone, unit(11, 7), unit(11, 8)], torch.float32)


LORA = {"r": 4, "alpha": 8}


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "lora": LORA},
        {"lora": LORA},
        {"lora": {**LORA, "dropout": 0.5}},
        {"gradient_checkpointing": True},
        {"attn_implementation": "eager"},
        {"layout": "padded"},
        {"layout": "packed"},
        {"layout": "prefix_shared", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_no_false_alarm(recipe, model: dict[str, Any]) -> None:
    assert train(recipe(**model), quiet=True, report=False).steps == 1


@pytest.fixture
def noisy_model(bench: Bench, tmp_path: Path) -> Iterator[Path]:
    folder = shutil.copytree(bench.model, tmp_path / "noisy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    return folder


def test_no_false_alarm_for_a_model_whose_config_has_dropout(recipe, noisy_model: Path) -> None:
    assert train(recipe(name_or_path=str(noisy_model)), quiet=True, report=False).steps == 1


def test_no_false_alarm_for_a_trained_adapter_with_dropout(recipe, tmp_path: Path) -> None:
    lora = {**LORA, "dropout": 0.5}
    first = recipe(lora=lora).model_copy(update={"output_dir": str(tmp_path / "first")})
    train(first, quiet=True, report=False)
    assert train(recipe(lora=lora, name_or_path=str(tmp_path / "first")), quiet=True, report=False).steps == 1
