"""Every way from rows to a loss is exact: layouts and chunks against padded rows and whole logits, family by family."""

import copy
import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.core.types import Batch, Forward, Row
from alignkit.data.collate import collate, select_units
from alignkit.dist.engine import DistEngine
from alignkit.models import attention
from alignkit.models.policy import CausalPolicy, ForwardOptions
from alignkit.ops import logps
from alignkit.testing import gradient_step, relative_difference
from tests.models.workshop import LORA

VOCABULARY = 97
ALLOWED = 2e-6
"""Relative L2 between gradients in float32."""
LOGPS = frozenset({"logps"})
LOGGED = frozenset({"logps", "entropy", "correct"})
STREAMS = ("packed", "prefix_shared")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
WIDE = {**SIZES, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "qwen2, tied": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", WIDE),
    "gemma": ("Gemma", WIDE),
    "gemma2, softcaps and windows": (
        "Gemma2",
        {**WIDE, "sliding_window": 12, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3, windows": ("Gemma3Text", {**WIDE, "sliding_window": 12}),
    "mistral, window": ("Mistral", {**SIZES, "sliding_window": 12}),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.1,
        },
    ),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 with experts": (
        "Qwen3Moe",
        {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "cohere, scaled logits": ("Cohere", {**SIZES, "logit_scale": 0.3}),
    "granite, scaled logits": ("Granite", {**SIZES, "logits_scaling": 3.0}),
    "phi, biased head": (
        "Phi",
        {**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    ),
    "neox": (
        "GPTNeoX",
        {
            **{name: value for name, value in SIZES.items() if name != "num_key_value_heads"},
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        },
    ),
}


def build(family: str) -> Any:
    name, settings = FAMILIES[family]
    kind = getattr(transformers, f"{name}Config")
    config = kind(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero from the start: a bias left out would go unseen
                torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def pairs(count: int, prompt: int, answer: int, seed: int = 0) -> list[tuple[Row, ...]]:
    """Pairs of many lengths; one prompt serves two of them, answers of one begin alike, one has an untrained half."""
    draw = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, most))]

    prompts = [tokens(prompt) for _ in range(count)]
    prompts[1] = prompts[0]
    units = []
    for i, start in enumerate(prompts):
        answers = [tokens(answer), tokens(answer)]
        if i == 2:
            answers[1] = [*answers[0][:-1], 3, 4, 5]
        trained = [[True] * len(one) for one in answers]
        if i == 3:
            trained[0] = [j % 2 == 0 for j in range(len(answers[0]))]
        units.append(
            tuple(
                Row([*start, *one], [*[False] * len(start), *marks])
                for one, marks in zip(answers, trained, strict=True)
            )
        )
    return units


SHORT = collate(pairs(4, 20, 12))
LONG = collate(pairs(9, 60, 40))


def objective(out: Forward, batch: Batch) -> Tensor:
    """Couples the rows of a unit, and looks at every token."""
    chosen, rejected = batch.by_unit(out.logps.where(batch["mask"], 0.0).sum(-1)).unbind(1)
    return softplus(-0.1 * (chosen - rejected)).sum() + 0.1 * (out.logps**2).sum()


class Seen:
    """The objective, and what it was shown, unit by unit."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []

    def __call__(self, out: Forward, batch: Batch) -> Tensor:
        for n in range(batch.num_rows):
            self.rows.append(
                {
                    name: getattr(out, name)[n][batch["mask"][n]].detach()
                    for name in LOGGED
                    if getattr(out, name) is not None
                }
            )
        return objective(out, batch)

    def all(self, name: str) -> Tensor:
        return torch.cat([row[name] for row in self.rows])


def gradient(
    model: Any, layout: str, batch: Batch, *, later: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], float, Seen]:
    """Gradient by weight name, loss, and what the objective saw; `later`: the loss is made from a whole forward."""
    policy = CausalPolicy(model, DistEngine(dtype), ForwardOptions(layout))
    assert policy.path.layout == layout
    assert (policy.path.head is None) == (layout == "padded")
    model.zero_grad()
    seen = Seen()
    loss = seen(policy.forward(batch, LOGGED), batch) if later else policy.loss(batch, LOGGED, seen)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found, loss.item(), seen


@pytest.fixture
def small_chunks(monkeypatch):
    """Several units a chunk, some alone, some over the limit."""
    monkeypatch.setattr(logps, "CHUNK_BYTES", VOCABULARY * 4 * 50)
    monkeypatch.setattr(logps, "MAX_CHUNK_BYTES", VOCABULARY * 4 * 60)
    monkeypatch.setattr(logps, "BLOCK_ELEMENTS", {"cpu": VOCABULARY * 7})


@pytest.mark.parametrize("batch", [SHORT, LONG], ids=["a mask", "the cascade"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_loss_and_what_is_logged(small_chunks, family, batch):
    model = build(family)
    expected, loss, right = gradient(model, "padded", batch)
    assert min(float(g.norm()) for g in expected.values()) > 0
    for layout in STREAMS:
        for later in (False, True):
            found, same, seen = gradient(model, layout, batch, later=later)
            assert relative_difference(found, expected) <= ALLOWED, (layout, later)
            assert same == pytest.approx(loss, rel=1e-6)
            for name in ("logps", "entropy"):
                torch.testing.assert_close(seen.all(name), right.all(name), rtol=0, atol=2e-5)
            assert torch.equal(seen.all("correct"), right.all("correct"))


def test_the_batches_are_what_they_are_meant_to_be():
    """Both ways of attention, windows shorter than rows, chunks of every kind."""
    lengths = {}
    for batch in (SHORT, LONG):
        policy = CausalPolicy(build("llama"), DistEngine(torch.float32), ForwardOptions("prefix_shared"))
        heard: list[int] = []
        policy.bare.model.register_forward_pre_hook(
            lambda _, args, kwargs, heard=heard: heard.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        policy.forward(batch, LOGPS)
        lengths[id(batch)] = heard[0]
    assert lengths[id(SHORT)] <= attention.DENSE_TOKENS < lengths[id(LONG)]
    assert SHORT.inputs["attention"].sum(1).max() > 12
    sizes = LONG.by_unit(LONG["mask"].sum(-1)).sum(-1)
    assert int(sizes.min()) < 25
    assert int(sizes.max()) > 60


@pytest.mark.parametrize("layout", STREAMS)
def test_the_order_of_units_changes_nothing(small_chunks, layout):
    model = build("qwen2, tied")
    order = [5, 0, 8, 3, 1, 7, 2, 6, 4]
    expected, loss, right = gradient(model, layout, LONG)
    found, same, seen = gradient(model, layout, select_units(LONG, order))
    assert relative_difference(found, expected) <= ALLOWED
    assert same == pytest.approx(loss, rel=1e-6)
    for i, unit in enumerate(order):
        for j in range(2):
            torch.testing.assert_close(
                seen.rows[2 * i + j]["logps"], right.rows[2 * unit + j]["logps"], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("layout", STREAMS)
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, layout):
    model = build("phi, biased head")
    expected, loss, right = gradient(model, layout, LONG)
    for rows, most, block in ((1000, 1000, 3), (70, 100, 1000), (30, 40, 7), (1, 0, 1)):
        monkeypatch.setattr(logps, "CHUNK_BYTES", VOCABULARY * 4 * rows)
        monkeypatch.setattr(logps, "MAX_CHUNK_BYTES", VOCABULARY * 4 * most)
        monkeypatch.setattr(logps, "BLOCK_ELEMENTS", {"cpu": VOCABULARY * block})
        found, same, seen = gradient(model, layout, LONG)
        assert relative_difference(found, expected) <= ALLOWED
        assert same == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(seen.all("logps"), right.all("logps"), rtol=0, atol=1e-5)


def test_sharing_changes_nothing_but_the_tokens_that_are_fed():
    model = build("qwen3")
    shared, packed = (gradient(model, layout, LONG) for layout in ("prefix_shared", "packed"))
    assert relative_difference(shared[0], packed[0]) <= ALLOWED
    torch.testing.assert_close(shared[2].all("logps"), packed[2].all("logps"), rtol=0, atol=1e-5)


def test_a_step_of_the_trainer_is_the_same_however_it_is_laid_out_and_cut(workshop):
    expected, logged = gradient_step(workshop.recipe("padded", model={"layout": "padded"}))
    assert expected
    for layout in ("auto", "packed", "prefix_shared"):
        for tokens in (8, 60, 8192):
            recipe = workshop.recipe(
                f"{layout}-{tokens}", model={"layout": layout}, train={"micro_batch_tokens": tokens}
            )
            found, record = gradient_step(recipe)
            assert relative_difference(found, expected) <= ALLOWED, (layout, tokens)
            assert record.keys() == logged.keys()
            for name in record:
                if not name.startswith(("step_time", "perf/")):
                    assert record[name] == pytest.approx(logged[name], rel=1e-5, abs=1e-6), name


def test_a_group_cut_in_two_is_the_group():
    """A prompt with six answers, over the budget: it is repeated, and nothing changes."""
    draw = random.Random(1)
    prompt = [draw.randrange(3, VOCABULARY) for _ in range(30)]
    batch = collate(
        [
            tuple(
                Row([*prompt, *answer], [*[False] * 30, *[True] * len(answer)])
                for answer in ([draw.randrange(3, VOCABULARY) for _ in range(9)] for _ in range(2))
            )
            for _ in range(3)
        ]
    )
    model = build("llama")
    expected, loss, _ = gradient(model, "prefix_shared", batch)
    policy = CausalPolicy(model, DistEngine(torch.float32), ForwardOptions("prefix_shared"))
    micros = policy.cut(batch, range(3), 64)
    assert [len(micro) for micro in micros] == [2, 1]
    model.zero_grad()
    total = 0.0
    for micro in micros:
        share = policy.loss(select_units(batch, micro), LOGPS, objective)
        share.backward()
        total += share.item()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert relative_difference(found, expected) <= ALLOWED
    assert total == pytest.approx(loss, rel=1e-6)


def test_nothing_to_train_on_reaches_every_weight_with_zero():
    """Other processes wait for these gradients."""
    blank = SHORT.with_columns({"mask": torch.zeros_like(SHORT["mask"])})
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("padded", *STREAMS):
            model = build("llama")
            policy = CausalPolicy(model, DistEngine(dtype), ForwardOptions(layout))
            policy.loss(blank, LOGGED, lambda out, _: out.logps.sum()).backward()
            missing = {name for name, p in model.named_parameters() if p.grad is None}
            assert missing == set(), (dtype, layout)
            assert not any(p.grad.any() for p in model.parameters())


def test_logits_are_the_models_own_at_their_place_when_a_method_asks():
    model = build("gemma2, softcaps and windows")
    policy = CausalPolicy(model, DistEngine(torch.float32), ForwardOptions("padded"))
    expected = policy.forward(SHORT, frozenset({"logits"})).logits
    plain = model(input_ids=SHORT.inputs["tokens"]).logits
    torch.testing.assert_close(expected[:, 1:][SHORT["mask"][:, 1:]], plain[:, :-1][SHORT["mask"][:, 1:]])
    assert not expected[~SHORT["mask"]].any()
    for layout in STREAMS:
        streamed = CausalPolicy(model, DistEngine(torch.float32), ForwardOptions(layout))
        out = streamed.forward(SHORT, frozenset({"logits"}))
        torch.testing.assert_close(out.logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_is_no_further_from_the_truth_than_padded_rows(small_chunks, family):
    """Over three batches. The 0.15 is for luck: in another order of sums the same roundings fall differently, by up to
    a fifth for one batch, by a few hundredths on average of many."""
    model = build(family)
    exact = copy.deepcopy(model).double()
    ways = [("padded", False), *((layout, later) for layout in STREAMS for later in (False, True))]
    errors = {way: torch.zeros(2, dtype=torch.float64) for way in ways}
    for seed in range(3):
        batch = collate(pairs(9, 60, 40, seed))
        truth, _, right = gradient(exact, "padded", batch)
        assert {x.dtype for x in truth.values()} == {torch.float64}
        for layout, later in ways:
            found, _, seen = gradient(model, layout, batch, later=later, dtype=torch.bfloat16)
            off = (seen.all("logps") - right.all("logps")).pow(2).mean()
            doubled = {name: x.double() for name, x in found.items()}
            errors[layout, later] += torch.stack([torch.tensor(relative_difference(doubled, truth) ** 2), off])
    limit = errors["padded", False].sqrt()
    assert (limit > 1e-3).all()  # there is an error to compare with
    for way, found in errors.items():
        assert (found.sqrt() <= 1.15 * limit).all(), (way, (found.sqrt() / limit).tolist())


@pytest.mark.parametrize("layout", STREAMS)
@pytest.mark.parametrize("family", ["llama", "gemma2, softcaps and windows"])
def test_activation_checkpointing_changes_no_gradient(family, layout):
    plain, saving = build(family), build(family)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    passes: list[int] = []
    saving.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    expected, found = gradient(plain, layout, LONG), gradient(saving, layout, LONG)
    assert len(passes) == 2  # once more in the backward pass
    assert relative_difference(found[0], expected[0]) <= 1e-7
    assert found[1] == expected[1]


@pytest.fixture
def adapted():
    """Llama under an adapter that is no longer at its start."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(build("llama"), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def test_gradients_of_an_adapter(small_chunks, adapted):
    expected, loss, _ = gradient(adapted, "padded", LONG)
    assert all("lora_" in name for name in expected)
    for layout in STREAMS:
        for later in (False, True):
            found, same, _ = gradient(adapted, layout, LONG, later=later)
            assert relative_difference(found, expected) <= ALLOWED
            assert same == pytest.approx(loss, rel=1e-6)


def test_the_reference_without_its_adapter_in_the_same_stream(adapted):
    scores = {}
    for layout in ("padded", *STREAMS):
        policy = CausalPolicy(adapted, DistEngine(torch.float32), ForwardOptions(layout))
        with policy.evaluating():
            with policy.as_reference():
                reference = policy.forward(LONG, LOGPS).logps
            scores[layout] = reference, policy.forward(LONG, LOGPS).logps
    bare = CausalPolicy(build("llama"), DistEngine(torch.float32), ForwardOptions("padded"))
    with bare.evaluating():
        alone = bare.forward(LONG, LOGPS).logps
    for reference, own in scores.values():
        torch.testing.assert_close(reference, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(own, scores["padded"][1], rtol=0, atol=1e-5)
        assert (reference - own).abs().max() > 0.1
