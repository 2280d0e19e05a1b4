"""Which way a model takes and what is said about it: by its config, and by a first use that is compared."""

import re
from typing import Any

import pytest
import torch
import transformers

from alignkit.core.errors import RecipeError
from alignkit.core.types import Row
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.models import attention, plain, policy
from alignkit.models.attention import stream_attention
from alignkit.models.paths import Path, choose_path
from alignkit.models.plain import plain_logps
from alignkit.models.policy import CausalPolicy, ForwardOptions
from tests.models.test_exactness import LOGPS, WIDE, build, pairs

SHARED = "rows packed without padding, shared prompts once; log-probabilities in chunks"
UNITS = pairs(4, 20, 12)


def other(name: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)


OTHERS = {
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "GptOss": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
}


def tried(model: Any, layout: str = "auto", units: Any = UNITS, dtype: torch.dtype = torch.float32) -> CausalPolicy:
    found = CausalPolicy(model, DistEngine(dtype), ForwardOptions(layout))
    found.try_path(units)
    return found


def assert_padded(path: Path, reason: str) -> None:
    assert (path.layout, path.head is not None, path.why) == ("padded", True, (reason,))


def assert_answers_as_padded(found: CausalPolicy) -> None:
    batch = collate(UNITS)
    plain = CausalPolicy(found.bare, found.dist, ForwardOptions("padded"))
    with found.evaluating():
        torch.testing.assert_close(
            found.forward(batch, LOGPS).logps, plain.forward(batch, LOGPS).logps, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2, softcaps and windows", "gpt2", "mixtral"])
def test_families_that_can_share_prompts_do(family, dtype):
    found = tried(build(family), dtype=dtype)
    assert str(found.path) == SHARED
    assert found.path.why == ()


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("packed", "rows packed without padding; log-probabilities in chunks"),
        ("prefix_shared", SHARED),
        ("padded", "padded rows; whole logits"),
    ],
)
def test_a_layout_asked_for_by_name(layout, said):
    model = build("llama")
    before = model.config._attn_implementation
    assert str(tried(model, layout).path) == said
    assert (model.config._attn_implementation == before) == (layout == "padded")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mamba", "mamba carries a state from token to token"),
        ("Bloom", "bloom does not use transformers' attention interface"),
    ],
)
def test_models_that_cannot_are_known_by_their_config(name, reason):
    model = other(name, **OTHERS[name])
    before = model.config._attn_implementation
    found = tried(model)
    assert_padded(found.path, reason)
    assert model.config._attn_implementation == before
    assert_answers_as_padded(found)
    for layout in ("packed", "prefix_shared"):
        with pytest.raises(RecipeError, match=rf"model\.layout: {layout} is not possible with this model: {reason}"):
            choose_path(model, layout, None)


def test_attention_sinks_are_found_by_a_first_use():
    model = other("GptOss", **OTHERS["GptOss"])
    found = CausalPolicy(model, DistEngine(torch.float32))
    assert str(found.path) == SHARED
    found.try_path(UNITS)
    assert_padded(found.path, "its attention has s_aux")
    assert_answers_as_padded(found)
    with pytest.raises(RecipeError, match=r"model\.layout: packed .* its attention has s_aux"):
        tried(model, "packed")


@pytest.mark.parametrize("kernel", ["eager", "flash_attention_2", "flex_attention"])
def test_a_kernel_asked_for_by_name_works_on_rows(kernel):
    reason = f"model.attn_implementation: {kernel} works on rows"
    assert_padded(choose_path(build("llama"), "auto", kernel), reason)
    with pytest.raises(RecipeError, match=reason):
        choose_path(build("llama"), "prefix_shared", kernel)
    assert str(choose_path(build("llama"), "auto", "sdpa")) == SHARED


def test_a_kernel_the_model_came_with():
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    assert_padded(choose_path(model, "auto", None), "its attention is flex_attention")


def test_layers_of_a_kind_nobody_taught():
    model = build("qwen2, tied")
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert_padded(choose_path(model, "auto", None), "qwen2 has layers of linear_attention")


def test_a_loss_of_its_own_over_tokens():
    model = build("mixtral")
    model.config.output_router_logits = True
    assert_padded(
        choose_path(model, "auto", None), "its router's loss counts tokens, and a shared prompt would count once"
    )


def test_an_adapter_on_the_head_keeps_whole_logits():
    from peft import LoraConfig, get_peft_model

    def adapted(*targets: str) -> Any:
        return get_peft_model(
            build("llama"),
            LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False),
        )

    found = tried(adapted("q_proj", "lm_head"))
    assert (found.path.layout, found.path.head) == ("prefix_shared", None)
    assert found.path.why == ("its output layer is peft.tuners.lora.layer.Linear, not a plain linear one",)
    assert_answers_as_padded(found)
    assert str(tried(adapted("q_proj")).path) == SHARED


def test_every_reason_is_said():
    path = Path("padded", None, ("one", "other"))
    assert re.fullmatch(r"padded rows; whole logits \(.*one; other\)", str(path))


def blind(*arguments: Any, **options: Any) -> Any:
    """Rows see the rows before them."""
    module, query, key, value, segments = arguments
    whole = type(segments)((sum(segments.lengths),), (), segments.longest, segments.device)
    return stream_attention(module, query, key, value, whole, **options)


def test_attention_that_lies_is_found_out(monkeypatch):
    monkeypatch.setattr(attention, "stream_attention", blind)
    found = tried(build("llama"))
    assert (found.path.layout, found.path.head is not None) == ("padded", True)
    assert len(found.path.why) == 1
    assert found.path.why[0].startswith("at first use it gave other numbers than plain transformers, by ")
    assert_answers_as_padded(found)
    for layout in ("packed", "prefix_shared"):
        with pytest.raises(RecipeError, match=rf"model\.layout: {layout} .* at first use it gave other"):
            tried(build("llama"), layout)


def test_positions_that_are_ignored_are_found_out(monkeypatch):
    original = policy._arguments

    def without(inputs: Any) -> dict[str, Any]:
        return {name: value for name, value in original(inputs).items() if name != "position_ids"}

    monkeypatch.setattr(policy, "_arguments", without)
    assert tried(build("llama")).path.layout == "padded"


def test_attention_that_lies_is_found_out_in_bfloat16(monkeypatch):
    monkeypatch.setattr(attention, "stream_attention", blind)
    assert tried(build("llama"), dtype=torch.bfloat16).path.layout == "padded"


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError])
def test_a_first_use_that_fails_is_said(monkeypatch, error):
    def broken(*_: Any, **__: Any) -> Any:
        raise error("no kernel for this\nand a long story")

    monkeypatch.setattr(attention, "stream_attention", broken)
    found = tried(build("llama"))
    assert_padded(found.path, "a first use failed: no kernel for this")


def test_a_head_that_does_more_than_its_weights_say():
    """Its forward halves the logits, and no entry of its config tells."""
    model = build("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits / 2)
    found = tried(model)
    assert (found.path.layout, found.path.head) == ("prefix_shared", None)
    assert found.path.why[-1].startswith("at first use it gave other numbers than plain transformers, by ")
    assert_answers_as_padded(found)


@pytest.mark.parametrize(
    "units",
    [[], [(Row([1, 2, 3], [False] * 3), Row([1, 2], [False] * 2))]],
    ids=["no unit", "nothing trained"],
)
def test_nothing_to_try_changes_nothing(monkeypatch, units):
    monkeypatch.setattr(attention, "stream_attention", blind)
    found = tried(build("llama"), units=units)
    assert str(found.path) == SHARED


def test_padded_rows_need_no_trial(monkeypatch):
    found = CausalPolicy(build("llama"), DistEngine(torch.float32), ForwardOptions("padded"))
    monkeypatch.setattr(found, "plain_logps", None)
    found.try_path(UNITS)


def test_a_trial_leaves_the_model_as_it_was():
    model = build("llama")
    assert model.training
    found = tried(model)
    assert found.bare.training
    assert all(p.grad is None for p in model.parameters())


def test_the_longest_unit_with_its_mates_and_the_shortest_row_are_tried(monkeypatch):
    shown: list[int] = []
    original = CausalPolicy.plain_logps

    def watch(self: CausalPolicy, row: Row) -> Any:
        shown.append(len(row.tokens))
        return original(self, row)

    monkeypatch.setattr(CausalPolicy, "plain_logps", watch)
    tried(build("llama"))
    lengths = [[len(row.tokens) for row in unit] for unit in UNITS]
    assert shown == [*sorted(max(lengths, key=max), reverse=True), min(min(unit) for unit in lengths)]


def test_rows_trained_too_far_from_their_end_tell_nothing(monkeypatch):
    monkeypatch.setattr(plain, "KEPT", 4)
    row = Row([3, *range(4, 20)], [False, True] + [False] * 15)
    found = CausalPolicy(build("llama"), DistEngine(torch.float32))
    found.try_path([(row,)])
    assert found.path.why == ()


def test_only_the_end_of_a_long_row_is_compared_where_the_model_lets_one_choose(monkeypatch):
    model = build("llama")
    row = max((row for unit in UNITS for row in unit), key=lambda row: len(row.tokens))
    whole = plain_logps(model, row, torch.device("cpu"))
    assert whole.known.tolist() == row.trained
    monkeypatch.setattr(plain, "KEPT", 6)
    end = plain_logps(model, row, torch.device("cpu"))
    assert end.known.nonzero().flatten().tolist() == list(range(len(row.tokens) - 4, len(row.tokens)))
    torch.testing.assert_close(end.by_shift[:, end.known], whole.by_shift[:, end.known])
