"""Attention over a stream against plain causal attention row by row: outputs and gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from alignkit.models import attention
from alignkit.models.attention import NAMES, UnsupportedAttention, install, stream_attention
from alignkit.models.layout import Segments
from tests.models.workshop import TEXT, plain_logits

CPU = torch.device("cpu")
HEADS, WIDTH = 4, 8
EXACT = {torch.float64: 1e-12, torch.float32: 2e-6}

STREAMS = {
    "pair": ((5, 4, 6), (2,)),
    "two prompts, branches without tokens, rows of their own": ((7, 3, 2, 0, 5, 4, 0, 6, 1), (3, 2)),
    "no prompt": ((4, 1, 6), ()),
    "one row": ((9,), ()),
    "prompts of one token": ((1, 1, 3, 2, 1, 4), (2, 2)),
}
"""Lengths of the segments, and branches of each prompt."""


def segments_of(lengths, branches) -> Segments:
    found, at = [*lengths[len(branches) + sum(branches) :]], len(branches)
    for g, count in enumerate(branches):
        found += [lengths[g] + x for x in lengths[at : at + count]]
        at += count
    return Segments(tuple(lengths), tuple(branches), max(found), CPU)


def rows_of(segments: Segments) -> list[list[int]]:
    """Places in the stream of every row, from its first token."""
    spans = [range(a, b) for a, b in zip(segments.bounds, segments.bounds[1:], strict=False)]
    at, found = segments.num_prompts, []
    for g, count in enumerate(segments.branches):
        found += [[*spans[g], *branch] for branch in spans[at : at + count]]
        at += count
    return found + [[*span] for span in spans[at:]]


def inputs(segments: Segments, kv_heads: int = HEADS, dtype=torch.float64, width=WIDTH) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    size = sum(segments.lengths)
    shapes = [(HEADS, WIDTH), (kv_heads, WIDTH), (kv_heads, width)]
    tensors = [torch.randn(1, h, size, d, dtype=torch.float64, generator=draw) for h, d in shapes]
    return [x.to(dtype).requires_grad_() for x in tensors]


def row_by_row(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling=None, window=None, softcap=None
) -> Tensor:
    """[1, T, H, D_v] from every row alone; what a prompt's token gets is that of the first row it begins."""
    out: dict[int, Tensor] = {}
    for places in rows_of(segments):
        q, k, v = (x[:, :, places] for x in (query, key, value))
        size = len(places)
        if window is None and softcap is None:
            found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        else:
            k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
            distance = torch.arange(size)[:, None] - torch.arange(size)
            seen = (distance >= 0) & (distance < (window or size))
            scores = q @ k.transpose(-1, -2) * (scaling or WIDTH**-0.5)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            found = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        for i, place in enumerate(places):
            out.setdefault(place, found[:, :, i])
    return torch.stack([out[i] for i in range(query.shape[2])], 1)


def with_gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def apart(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative L2 of each."""
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]


def compare(segments: Segments, kv_heads: int, dtype: torch.dtype, *, width=WIDTH, **options) -> None:
    ours, exact = (inputs(segments, kv_heads, kind, width) for kind in (dtype, torch.float64))
    found = with_gradients(stream_attention(nn.Module(), *ours, segments, **options)[0], ours)
    names = {"sliding_window": "window", "scaling": "scaling", "softcap": "softcap"}
    settings = {names[name]: value for name, value in options.items() if name in names}
    expected = with_gradients(row_by_row(*exact, segments, **settings), exact)
    assert found[0].dtype == dtype
    if dtype in EXACT:
        # Under a softcap the softmax is in float32, as in the models that have one.
        assert max(apart(found, expected)) <= (EXACT[torch.float32] if "softcap" in options else EXACT[dtype])
        return
    rounded = inputs(segments, kv_heads, dtype, width)
    plain = apart(with_gradients(row_by_row(*rounded, segments, **settings), rounded), expected)
    # Merging, and adding up what each branch says of its prompt's keys, round once more than one kernel over a row.
    assert all(a <= 1.5 * b for a, b in zip(apart(found, expected), plain, strict=True))


@pytest.fixture(params=["cascade", "dense", "dense by segments"])
def way(request, monkeypatch):
    """Take this way whatever the length of the stream, and be sure that it was taken."""
    name = request.param
    monkeypatch.setattr(attention, "DENSE_TOKENS", 384 if name == "dense" else 0)
    if name == "dense by segments":
        monkeypatch.setattr(attention, "_has_kernel", lambda query: False)
    took = []
    for function in ("_dense", "_forward_cpu"):
        original = getattr(attention, function)
        monkeypatch.setattr(
            attention, function, lambda *a, f=function, original=original: took.append(f) or original(*a)
        )
    yield name
    assert set(took) == {"_forward_cpu" if name == "cascade" else "_dense"}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("dtype", [*EXACT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_stream_is_its_rows(way, stream, dtype, kv_heads):
    compare(segments_of(*STREAMS[stream]), kv_heads, dtype)


def test_a_scaling_of_the_models_own(way):
    compare(segments_of(*STREAMS["pair"]), 2, torch.float64, scaling=0.7)


def test_memory_ordered_otherwise(way):
    """Projections write [1, T, H, D] and hand over a transposed view; so may the gradient come."""
    segments = segments_of(*STREAMS["pair"])
    plain = inputs(segments, 2)
    views = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in plain]
    found = stream_attention(nn.Module(), *(x.transpose(1, 2) for x in views), segments)[0]
    expected = with_gradients(row_by_row(*plain, segments), plain)
    got = with_gradients(found, views)
    assert max(apart([got[0], *(x.transpose(1, 2) for x in got[1:])], expected)) <= 1e-12


def test_autocast_makes_one_dtype_of_what_rotations_and_norms_left(way):
    segments = segments_of(*STREAMS["pair"])
    query, key, value = inputs(segments, 2, torch.float32)
    mixed = [query, key, value.bfloat16()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(stream_attention(nn.Module(), *mixed, segments)[0], mixed)
    low = [x.detach().bfloat16().requires_grad_() for x in mixed]
    expected = with_gradients(stream_attention(nn.Module(), *low, segments)[0], low)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, expected, strict=True))


def test_long_streams_take_the_cascade_and_short_ones_a_mask(monkeypatch):
    took = []
    for name in ("_dense", "_forward_cpu"):
        original = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, n=name, original=original: took.append(n) or original(*a))
    for length in (attention.DENSE_TOKENS, attention.DENSE_TOKENS + 1):
        compare(segments_of((length - 200, 100, 100), (2,)), 2, torch.float32)
    assert took == ["_dense", "_forward_cpu"]


@pytest.fixture(params=[384, 0], ids=["at once", "by segments"])
def dense(request, monkeypatch):
    """What the kernels cannot do takes a mask, however long the stream."""
    monkeypatch.setattr(attention, "DENSE_TOKENS", request.param)
    monkeypatch.setattr(attention, "_forward_cpu", None)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("options", [{"sliding_window": 3}, {"sliding_window": 2}, {"softcap": 1.5},
                                     {"sliding_window": 4, "softcap": 0.5, "scaling": 0.6}], ids=str)  # fmt: skip
def test_windows_and_softcaps(dense, stream, dtype, options):
    compare(segments_of(*STREAMS[stream]), 2, dtype, **options)


def test_values_of_another_width(dense):
    compare(segments_of(*STREAMS["pair"]), 2, torch.float64, width=12)


def test_a_window_as_long_as_the_longest_row_is_none(monkeypatch):
    monkeypatch.setattr(attention, "DENSE_TOKENS", 0)
    segments = segments_of(*STREAMS["pair"])
    assert segments.longest == 11
    ours = inputs(segments)
    without = stream_attention(nn.Module(), *ours, segments)[0]
    assert torch.equal(stream_attention(nn.Module(), *ours, segments, sliding_window=11)[0], without)
    assert not torch.allclose(stream_attention(nn.Module(), *ours, segments, sliding_window=10)[0], without)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_is_drawn_on_the_dense_way(dense, softcap):
    segments = segments_of(*STREAMS["pair"])
    ours = inputs(segments)
    torch.manual_seed(0)
    sharp, *noisy = (
        stream_attention(nn.Module(), *ours, segments, dropout=p, softcap=softcap)[0] for p in (1e-9, 0.5, 0.5)
    )
    assert not torch.allclose(noisy[0], noisy[1])
    torch.testing.assert_close(sharp, row_by_row(*ours, segments, softcap=softcap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"s_aux": torch.zeros(HEADS)}, "its attention has s_aux"),
        ({"position_bias": torch.zeros(1, HEADS, 3, 3)}, "its attention has position_bias"),
        ({"cache": object()}, "its attention has cache"),
    ],
)
def test_what_a_stream_cannot_give_is_said(options, said):
    segments = segments_of((3,), ())
    with pytest.raises(UnsupportedAttention, match=said):
        stream_attention(nn.Module(), *inputs(segments), segments, **options)


def test_attention_to_what_comes_after_is_refused():
    module = nn.Module()
    module.is_causal = False
    segments = segments_of((3,), ())
    with pytest.raises(UnsupportedAttention, match="not causal"):
        stream_attention(module, *inputs(segments), segments)


@pytest.mark.parametrize("before", list(NAMES))
def test_a_model_that_was_taught_answers_rows_bit_for_bit_as_before(workshop, before):
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(workshop.model, attn_implementation=before)

    plain, taught = load(), load()
    install(taught)
    assert taught.config._attn_implementation == NAMES[before]
    assert torch.equal(plain_logits(taught), plain_logits(plain))
    install(taught)  # twice changes nothing
    assert taught.config._attn_implementation == NAMES[before]
    ids = torch.tensor([TEXT[1], [0, *TEXT[1][:3]]])
    seen = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])  # padding on the left needs the mask
    with torch.no_grad():
        answers = [model(input_ids=ids, attention_mask=seen).logits for model in (plain, taught)]
        longer = [model.generate(ids, attention_mask=seen, max_new_tokens=3, do_sample=False) for model in
                  (plain, taught)]  # fmt: skip
    assert torch.equal(*answers)
    assert torch.equal(*longer)


def test_other_kernels_are_left_alone(workshop):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workshop.model, attn_implementation="flex_attention")
    install(model)
    assert model.config._attn_implementation == "flex_attention"
