"""The in-process sampler: draws, log-probabilities, stops, its cache, and independence from the batch."""

import math
import random
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.core.errors import DataError, RecipeError, RunFailed
from alignkit.core.types import Completion, Group
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.models.policy import CausalPolicy, ForwardOptions
from alignkit.rollout import native, writer
from alignkit.rollout.config import RolloutConfig, SamplingConfig
from alignkit.rollout.draw import NUCLEUS, draw, support_logps
from alignkit.rollout.fused import FusedWriter
from alignkit.rollout.native import NativeEngine
from alignkit.rollout.plain import PlainWriter, _Layer

STOP = 4
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
WIDE = {**SIZES, "head_dim": 8}
STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "qwen2, tied": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", WIDE),
    "llama, biases and a stretched rotation": (
        "Llama",
        {**SIZES, "attention_bias": True, "mlp_bias": True, "rope_parameters": STRETCHED},
    ),
    "gemma": ("Gemma", WIDE),
    "gemma2, softcaps and a window": ("Gemma2", {**WIDE, "sliding_window": 6, "attn_logit_softcapping": 4.0}),
    "gemma3, a window on some layers": (
        "Gemma3Text",
        {**WIDE, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral, a window": ("Mistral", {**SIZES, "sliding_window": 6}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}),
    "bloom, no positions": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "lfm2, states beside keys": ("Lfm2", {**SIZES, "layer_types": ["conv", "full_attention"]}),
    "llama with an adapter": ("Llama", SIZES),
}
MIXED = ["llama", "gemma3, a window on some layers", "gpt2", "lfm2, states beside keys"]
BOTH = ["llama", "qwen2, tied", "qwen3", "llama, biases and a stretched rotation", "llama with an adapter"]
"""Families that the fused writer takes; the plain one takes all."""
WAYS = [*((family, False) for family in FAMILIES), *((family, True) for family in BOTH)]
LETTERS = "".join(chr(ord("0") + i) for i in range(40))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=STOP,
    )
    return LlamaForCausalLM(config).float()


def build(family):
    name, settings = FAMILIES[family]
    kind = getattr(transformers, f"{name}Config")
    config = kind(vocab_size=40, bos_token_id=1, eos_token_id=STOP, pad_token_id=0, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases of 0 and norms of 1 would not be missed
                parameter.data += 0.2 * torch.randn_like(parameter)
        if family == "llama with an adapter":
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def engine(model, *, stop_ids=(STOP,), seed=0, max_batch=64, decode=None, fused=True, **sampling):
    return NativeEngine(
        model,
        stop_ids=stop_ids,
        pad_id=0,
        decode=decode or (lambda tokens: " ".join(map(str, tokens))),
        sampling=SamplingConfig(**{"max_completion_length": 12, **sampling}),
        seed=seed,
        max_batch=max_batch,
        fused=fused,
    )


def prompts(count):
    """Groups with prompts of 1 to 9 tokens."""
    draws = random.Random(1)
    return [
        Group(f"g{i}", [], [1, *(draws.randrange(5, 40) for _ in range(draws.randrange(0, 9)))]) for i in range(count)
    ]


def tokens_by_id(groups):
    return {group.id: [completion.tokens for completion in group.completions] for group in groups}


def letters(tokens):
    return "".join(LETTERS[token] for token in tokens)


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request, monkeypatch):
    """Whether the fused writer writes: the other one is not there, and no comparison of the two is made."""
    other = PlainWriter if request.param else FusedWriter
    monkeypatch.setattr(native, other.__name__, lambda *_: pytest.fail(f"{other.__name__} was used"))
    monkeypatch.setattr(NativeEngine, "_difference", lambda *_: None)
    return request.param


@pytest.fixture
def shapes(model, fused, monkeypatch):
    """The shape [N, T] of every pass through the layers; prompts are one row for the fused writer."""
    seen: list[tuple[int, ...]] = []
    if fused:
        forward = FusedWriter._forward

        def observed(own, tokens, positions, attend, asked=None):
            seen.append((len(tokens), 1) if asked is None else (1, len(tokens)))
            return forward(own, tokens, positions, attend, asked)

        monkeypatch.setattr(FusedWriter, "_forward", observed)
        yield seen
        return
    handle = model.register_forward_pre_hook(
        lambda _, __, options: seen.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    handle.remove()


def full_forward_logps(model, prompt, tokens, sampling):
    """Log-probabilities of `tokens` by one unpadded forward without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    table = support_logps(logits[len(prompt) - 1 : -1], sampling)
    return table.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1).tolist()


def test_tokens_do_not_depend_on_the_batch(model):
    groups = prompts(8)
    together = tokens_by_id(engine(model).fill(groups, 3))
    alone = tokens_by_id(engine(model, max_batch=1).fill(groups, 3))
    backwards = tokens_by_id(engine(model, max_batch=5).fill(groups[::-1], 3))
    assert together == alone == backwards
    lengths = {len(tokens) for completions in together.values() for tokens in completions}
    assert len(lengths) > 3, "rows must finish at different times for this test to say anything"


def test_seed_version_and_index_change_the_draw(model):
    groups = prompts(4)
    first = engine(model)
    base = tokens_by_id(first.fill(groups, 2))
    assert base == tokens_by_id(engine(model).fill(groups, 2))
    assert any(one != two for one, two in base.values())
    assert base != tokens_by_id(engine(model, seed=1).fill(groups, 2))
    first.sync(3)
    later = first.fill(groups, 2)
    assert base != tokens_by_id(later)
    assert {completion.version for group in later for completion in group.completions} == {3}


@pytest.mark.parametrize(("family", "fused"), WAYS)
def test_logps_are_those_the_trainer_computes(family, fused, monkeypatch):
    bare = build(family)
    policy = CausalPolicy(bare, DistEngine(torch.float32), ForwardOptions("auto"))
    if fused:
        monkeypatch.setattr("alignkit.rollout.fused.LARGE", 0)
        monkeypatch.setattr(native, "PlainWriter", lambda *_: pytest.fail("it was written with the model's forward"))
    groups = engine(bare, max_batch=9, max_completion_length=24, fused=fused).fill(prompts(8), 3)
    rows = [(group, completion) for group in groups for completion in group.completions]
    batch = collate([(group.row(completion),) for group, completion in rows])
    with policy.evaluating():
        expected = policy.forward(batch, frozenset({"logps"})).logps
    found = torch.zeros_like(expected)
    for i, (group, completion) in enumerate(rows):
        start = len(group.prompt)
        found[i, start : start + len(completion.tokens)] = torch.tensor(completion.logps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert max(len(completion.tokens) for _, completion in rows) == 24


@pytest.mark.parametrize(("family", "fused"), [*((family, False) for family in MIXED), ("llama", True)])
def test_no_setting_of_the_batch_changes_a_sample(family, fused, monkeypatch):
    bare, groups = build(family), prompts(9)
    groups.append(Group("same prompt", [], groups[0].prompt))

    def written(groups, max_batch):
        filled = engine(bare, max_batch=max_batch, max_completion_length=24, fused=fused).fill(groups, 3)
        return {
            group.id: [(completion.tokens, completion.logps) for completion in group.completions] for group in filled
        }

    expected = written(groups, 64)
    monkeypatch.setattr(writer, "BLOCK", 4)  # the cache grows, and forgets, every few tokens
    monkeypatch.setattr(native, "PREFILL_TOKENS", 16)
    ways = [written(groups, size) for size in (1, 2, 4, 7, 64)] + [written(groups[::-1], 5)]
    ways.append({name: told for group in groups for name, told in written([group], 64).items()})
    for way in ways:
        for name, completions in expected.items():
            for (tokens, logps), (same_tokens, same_logps) in zip(completions, way[name], strict=True):
                assert same_tokens == tokens
                assert same_logps == pytest.approx(logps, abs=1e-5)
    assert expected["same prompt"] != expected["g0"]


def test_a_prompt_is_read_once_for_all_its_completions(model, fused, shapes):
    groups = [Group("g", [], [1, 7, 8, 9]), Group("h", [], [1, 7, 8, 9])]
    filled = engine(model, max_batch=3, fused=fused).fill(groups, 4)
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 4)]
    assert len({tuple(completion.tokens) for group in filled for completion in group.completions}) > 4


def test_a_row_that_ends_costs_nothing_more_and_the_next_takes_its_place(model, fused, shapes):
    groups = [Group(f"g{i}", [], [1, 5 + i]) for i in range(12)]
    completions = [c for group in engine(model, max_batch=4, fused=fused).fill(groups, 2) for c in group.completions]
    steps = [rows for rows, width in shapes if width == 1]
    assert sum(rows * width for rows, width in shapes if width > 1) == 12 * 2
    assert sum(steps) == sum(len(completion.tokens) - 1 for completion in completions)
    assert steps[0] == 4
    assert steps == sorted(steps, reverse=True), "a place stood empty while completions were waiting"


def test_the_memory_holds_no_more_than_the_rows_under_way(model, fused, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK", 4)
    capacities, kind = [], FusedWriter if fused else _Layer
    memory = kind._memory

    def observed(own, told):
        capacities.append(told if fused else own.capacity)
        return memory(own, told)

    monkeypatch.setattr(kind, "_memory", observed)
    engine(model, max_batch=3, fused=fused).fill(prompts(30), 2)
    assert len(capacities) > 10  # again and again
    shared = 0 if fused else max(len(group.prompt) for group in prompts(30))
    assert max(capacities) <= shared + 12 + 4


def test_columns_that_no_row_needs_are_given_up(model, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK", 4)
    unused = []

    def look(_, __, options):
        if options["input_ids"].shape[1] == 1 and options["attention_mask"] is not None:
            unused.append(int((options["attention_mask"].sum(0) == 0).sum()))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    engine(model, max_batch=3, fused=False).fill([Group("long", [], [1] + [7] * 17), *prompts(30)], 2)
    handle.remove()
    assert 0 < max(unused) < 4


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_k": 7, "top_p": 0.8}, {"top_p": 0.9, "min_p": 0.1}, {"min_p": 0.2}],
)
def test_logps_agree_with_a_plain_forward(model, sampling):
    sampler = engine(model, **sampling)
    for group in sampler.fill(prompts(8), 2):
        for completion in group.completions:
            expected = full_forward_logps(model, group.prompt, completion.tokens, sampler.sampling)
            assert completion.logps == pytest.approx(expected, abs=1e-5)


def test_stop_token_is_kept_in_tokens_and_left_out_of_the_text(model):
    completions = [c for group in engine(model).fill(prompts(16), 2) for c in group.completions]
    stopped = [c for c in completions if c.tokens[-1] == STOP]
    assert stopped
    assert len(stopped) < len(completions)
    for completion in completions:
        assert STOP not in completion.tokens[:-1]
        assert len(completion.tokens) == 12 or completion.tokens[-1] == STOP
        spoken = completion.tokens[:-1] if completion.tokens[-1] == STOP else completion.tokens
        assert completion.text == " ".join(map(str, spoken))
        assert len(completion.logps) == len(completion.tokens)


def test_a_stop_string_ends_a_completion(model):
    whole = engine(model, decode=letters, stop_ids=(), max_completion_length=20).fill(prompts(12), 2)
    texts = [completion.text for group in whole for completion in group.completions]
    stops = [texts[0][14:16], texts[1][3], texts[2][12:16]]  # the first comes late: only the end is decoded till then
    sampler = engine(model, decode=letters, stop_ids=(), max_completion_length=20, stop_strings=stops)
    ended = 0
    for before, after in zip(whole, sampler.fill(prompts(12), 2), strict=True):
        for full, cut in zip(before.completions, after.completions, strict=True):
            last = next((i for i in range(1, 20) if any(stop in full.text[:i] for stop in stops)), 20)
            assert cut.tokens == full.tokens[:last]
            assert cut.logps == pytest.approx(full.logps[:last], abs=1e-5)
            said = min((full.text.index(stop) for stop in stops if stop in full.text[:last]), default=last)
            assert cut.text == full.text[:said]
            ended += last < 20
    assert 0 < ended < 24


def test_an_end_that_reads_differently_by_itself_stops_nothing(model):
    settings = {"stop_ids": (), "max_completion_length": 20}
    whole = engine(model, decode=letters, **settings).fill(prompts(1), 1)[0].completions[0]
    later = next(letter for letter in whole.text[1:11] if letter != whole.text[0])
    sampler = engine(model, decode=lambda tokens: "^" + letters(tokens), stop_strings=["^" + later], **settings)
    assert sampler.fill(prompts(1), 1)[0].completions[0].tokens == whole.tokens


def test_full_groups_pass_and_inputs_stay_as_they_are(model):
    mine = Completion("mine", [5, 6])
    full = Group("full", [], [1, 5], [mine, Completion("too", [7])])
    half = Group("half", [], [1, 6], [mine])
    filled = engine(model).fill([full, half], 2)
    assert filled[0] is full
    assert half.completions == [mine]
    assert filled[1].completions[0] is mine
    assert len(filled[1].completions) == 2
    # the second sample of a group is the same whether or not the first one was already there
    empty = Group("half", [], [1, 6])
    assert filled[1].completions[1].tokens == engine(model).fill([empty], 2)[0].completions[1].tokens


def test_temperature_zero_takes_the_likeliest_token(model):
    group = engine(model, temperature=0.0, stop_ids=()).fill([Group("g", [], [1, 9, 12])], 1)[0]
    tokens = [1, 9, 12]
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    assert group.completions[0].tokens == tokens[3:]
    assert group.completions[0].logps == [0.0] * 12


def test_completion_ends_with_the_context(model):
    group = Group("long", [], [1] + [7] * 28)
    filled = engine(model, stop_ids=()).fill([group], 1)[0]
    assert len(filled.completions[0].tokens) == 3
    with pytest.raises(DataError, match=r"'long'.*32 tokens.*context is 32"):
        engine(model).fill([Group("long", [], [1] * 32)], 1)
    with pytest.raises(DataError, match=r"'empty'.*no tokens"):
        engine(model).fill([Group("empty", [], [])], 1)


def test_a_model_without_such_a_cache_is_refused_when_it_is_to_write():
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)
    sampler = engine(transformers.MambaForCausalLM(config))
    with pytest.raises(RecipeError, match=r"mamba.*past_key_values"):
        sampler.fill(prompts(1), 1)


def test_training_mode_and_checkpointing_are_left_as_they_were(model):
    model.train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    expected = tokens_by_id(engine(model).fill(prompts(4), 1))
    assert model.training
    assert model.model.layers[0].mlp.training
    assert not model.model.layers[1].mlp.training
    model.gradient_checkpointing_disable()
    model.eval()
    assert expected == tokens_by_id(engine(model).fill(prompts(4), 1))


def test_broken_weights_are_named(model):
    broken = LlamaForCausalLM(model.config)
    sampler = engine(broken)
    sampler.fill(prompts(1), 1)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(RunFailed, match=r"group 'g0'.*not finite"):
        sampler.fill(prompts(1), 1)


def test_support_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    by_k = support_logps(logits, SamplingConfig(top_k=2)).exp()
    torch.testing.assert_close(by_k, torch.tensor([[0.625, 0.375, 0.0, 0.0]]).double(), rtol=0, atol=1e-7)
    # 0.5 does not reach 0.7, 0.5 + 0.3 does
    by_p = support_logps(logits, SamplingConfig(top_p=0.7)).exp()
    torch.testing.assert_close(by_p, torch.tensor([[0.625, 0.375, 0.0, 0.0]]).double(), rtol=0, atol=1e-7)
    cooler = support_logps(logits, SamplingConfig(temperature=0.5)).exp()
    total = 0.25 + 0.09 + 0.0225 + 0.0025
    torch.testing.assert_close(cooler, torch.tensor([[0.25, 0.09, 0.0225, 0.0025]]).double() / total, rtol=0, atol=1e-7)
    # top_p looks at what top_k left: 0.625 reaches 0.6 alone
    both = support_logps(logits, SamplingConfig(top_k=2, top_p=0.6)).exp()
    torch.testing.assert_close(both, torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double())
    # at least 0.25 × 0.5: the third may stay, the last may not
    by_share = support_logps(logits, SamplingConfig(min_p=0.25)).exp()
    expected = torch.tensor([[0.5, 0.3, 0.15, 0.0]]).double() / 0.95
    torch.testing.assert_close(by_share, expected, rtol=0, atol=1e-7)
    # top_p leaves 0.5, 0.3, 0.15; min_p then asks for 0.35 whatever share that is of all
    all_three = support_logps(logits, SamplingConfig(top_p=0.9, min_p=0.7)).exp()
    torch.testing.assert_close(all_three, torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double())


@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_a_nucleus_of_any_size_is_the_smallest_that_reaches_its_share(top_p):
    torch.manual_seed(1)
    logits = torch.randn(4, 3000) * torch.tensor([[0.1], [1.0], [3.0], [9.0]])
    exact = logits.double().softmax(-1)
    found = support_logps(logits, SamplingConfig(top_p=top_p)).exp()
    sizes = []
    for row, share in zip(found, exact, strict=True):
        kept = row > 0
        sizes.append(int(kept.sum()))
        assert share[kept].min() > share[~kept].max()
        assert share[kept].sum() >= top_p > share[kept].sum() - share[kept].min()
        torch.testing.assert_close(row[kept], share[kept] / share[kept].sum(), rtol=1e-5, atol=0)
    assert min(sizes) < NUCLEUS < max(sizes)


@pytest.mark.parametrize("size", [40, 256, 1000])
@pytest.mark.parametrize("sampling", [{}, {"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.05}, {"temperature": 0.0}])
def test_a_draw_in_two_steps_is_the_draw_in_one(size, sampling):
    torch.manual_seed(2)
    logits, uniforms = 3 * torch.randn(200, size), torch.rand(200, dtype=torch.float64)
    tokens, logps = draw(logits, uniforms, SamplingConfig(**sampling))
    table = support_logps(logits, SamplingConfig(**sampling))
    expected = (table.exp().cumsum(-1) > uniforms[:, None]).int().argmax(-1)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(logps, table.gather(-1, tokens[:, None])[:, 0], rtol=0, atol=1e-6)


def test_inverse_cdf_by_hand():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    tokens, logps = draw(logits, uniforms, SamplingConfig())
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]  # the token of probability 0 is never drawn, not even on its border
    assert logps.tolist() == pytest.approx([math.log(p) for p in (0.25, 0.25, 0.5, 0.5, 0.25, 0.25)], abs=1e-7)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_k": 4, "top_p": 0.95}])
def test_frequencies_follow_the_distribution(sampling):
    torch.manual_seed(3)
    toy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=5,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            initializer_range=0.7,
        )
    )
    count = 6000
    sampler = engine(toy, stop_ids=(), max_batch=2000, max_completion_length=1, **sampling)
    drawn = [c.tokens[0] for c in sampler.fill([Group("toy", [], [1, 2, 3])], count)[0].completions]
    with torch.no_grad():
        logits = toy(input_ids=torch.tensor([[1, 2, 3]])).logits[:, -1]
    exact = support_logps(logits, sampler.sampling).exp()[0].tolist()
    possible = [token for token in range(5) if exact[token] > 0]
    assert set(drawn) <= set(possible)
    chi_square = sum((drawn.count(t) - count * exact[t]) ** 2 / (count * exact[t]) for t in possible)
    assert chi_square < {2: 10.8, 3: 13.8, 4: 16.3, 5: 18.5}[len(possible)]  # 99.9 % quantiles


def test_settings_that_mean_nothing_are_refused():
    assert RolloutConfig(num_generations=2, top_p=0.9).engine == "native"
    for keys in ({"engine": "other"}, {"num_generations": 0}, {"min_p": 1.5}, {"stop_strings": [""]}):
        with pytest.raises(ValidationError, match=next(iter(keys))):
            RolloutConfig(**keys)
