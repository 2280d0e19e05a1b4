"""Attention over a stream of rows that share prompts, for any model that uses transformers' attention interface.

Models keep their code: `install` makes them call a function that does as the model did before, unless the call carries
`segments`. Over a stream a token sees its own branch up to itself, and the whole prompt of that branch. Two ways:

*cascade*: every segment attends causally to itself; branches also attend, unmasked, to their prompt; the two softmaxes
are merged by their log-sum-exps. Exact. Backward calls the flash kernel of each part with the merged output and
log-sum-exp, for which its formula holds unchanged, and adds up the gradients of the prompt's keys and values.

*dense*: an explicit mask of who sees whom, one segment with its prompt at a time. For what the kernels cannot do:
sliding windows shorter than a row, softcaps, values of another width. Also for streams so short that one call is best.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from alignkit.models.layout import Segments

DENSE_TOKENS = 384
"""On a CPU, streams up to this length are one masked call; many small calls would cost more."""
KERNELS: str | None = None
"""The kind of device whose kernels are called; None = that of the tensors. A prediction for another machine sets it."""
NAMES = {"sdpa": "alignkit_sdpa", "eager": "alignkit_eager"}
"""What a model used before → the name under which it is registered here."""

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_CUDA = torch.ops.aten._flash_attention_forward.default
_CUDA_BACKWARD = torch.ops.aten._flash_attention_backward.default


class UnsupportedAttention(Exception):
    """A model's attention asks for what a stream cannot give."""


def install(model: Any) -> None:
    """Make `model`, which uses sdpa or eager attention, able to read streams."""
    before = model.config._attn_implementation
    if before in NAMES:
        model.set_attn_implementation(NAMES[before])


def stream_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **options: Any
) -> tuple[Tensor, None]:
    """Attention output [1, T, H, D_v] of a stream; query [1, H, T, D], key and value [1, H_kv, T, D].

    `options` are those of transformers' attention functions: scaling, dropout, sliding_window, softcap.

    Raises:
        UnsupportedAttention: attention sinks, biases by position, a cache, or attention to what comes after.
    """
    for name in ("s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise UnsupportedAttention(f"its attention has {name}")
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttention("its attention is not causal")
    query, key, value = autocast(query, key, value)
    scaling = options.get("scaling")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    window, softcap, dropout = options.get("sliding_window"), options.get("softcap"), options.get("dropout", 0.0)
    if window is not None and window >= segments.longest:
        window = None
    plain = window is None and softcap is None and dropout == 0.0 and query.shape[-1] == value.shape[-1]
    if plain and _has_kernel(query) and (_kind(query) != "cpu" or query.shape[2] > DENSE_TOKENS):
        out: Tensor = _Cascade.apply(query, key, value, segments, scale)  # type: ignore[no-untyped-call]
    else:
        out = _dense(query, key, value, segments, scale, window, softcap, dropout)
    return out.transpose(1, 2), None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does before products and attention: rotations and norms leave float32 beside bfloat16."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _kind(x: Tensor) -> str:
    return KERNELS or x.device.type


def _has_kernel(query: Tensor) -> bool:
    if _kind(query) == "cuda":
        return query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    return _kind(query) == "cpu"


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        if softcap is None:
            return scaled_dot_product_attention(q, k, v, seen[None, None], dropout, scale=scale)
        scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32)
        return torch.dropout(weights.to(q.dtype), dropout, train=dropout > 0) @ v

    if query.shape[2] <= DENSE_TOKENS:
        return attend(query, key, value, segments.whole_mask(window))
    outputs = []
    for a, b, c, d in segments.readers:
        k, v = (x[:, :, a:b] if c == d else torch.cat([x[:, :, c:d], x[:, :, a:b]], 2) for x in (key, value))
        outputs.append(attend(query[:, :, a:b], k, v, segments.own_mask(b - a, d - c, window)))
    return torch.cat(outputs, 2)


class _Cascade(torch.autograd.Function):
    """query [1, H, T, D], key and value [1, H_kv, T, D] → [1, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        kernels = _forward_cpu if _kind(query) == "cpu" else _forward_cuda
        out, lse, seeds = kernels(query, key, value, segments, scale)
        ctx.save_for_backward(query, key, value, out, lse, *seeds)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse, *seeds = ctx.saved_tensors
        kernels = _backward_cpu if _kind(query) == "cpu" else _backward_cuda
        return (*kernels(grad, query, key, value, out, lse, seeds, ctx.segments, ctx.scale), None, None)


def _like_rows(x: Tensor) -> Tensor:
    """An empty [1, H, T, D] whose memory is ordered [1, T, H, D], as projections read and write it."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _forward_cpu(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    out = _like_rows(query)
    lse = query.new_empty(1, query.shape[2], query.shape[1], dtype=_lse_dtype(query)).transpose(1, 2)
    for a, b in segments.causal:
        part = slice(a, b)
        out[:, :, part], lse[:, :, part] = _CPU(
            query[:, :, part], key[:, :, part], value[:, :, part], 0.0, True, scale=scale
        )
    for a, b, c, d in segments.crossing:
        part, prompt = slice(a, b), slice(c, d)
        seen, seen_lse = _CPU(query[:, :, part], key[:, :, prompt], value[:, :, prompt], 0.0, False, scale=scale)
        _merge(out[:, :, part], lse[:, :, part], seen, seen_lse)
    return out, lse, []


def _backward_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seeds: list[Tensor],
    segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    del seeds
    repeats = query.shape[1] // key.shape[1]
    grads = tuple(_like_rows(x) for x in (query, key, value))

    def by_repeat(x: Tensor) -> Tensor:
        """[1, H, …] → [repeats, H_kv, …], a view."""
        return x[0].view(-1, repeats, *x.shape[2:]).transpose(0, 1)

    # The kernel works on as many heads at a time as keys have. Repeats of a key stand in the place of a batch, so that
    # one key head does not mean one thread; and their gradients are not added up in low precision on the way.
    query_grad, query, out, grad, lse = (by_repeat(x) for x in (grads[0], query, out, grad, lse))
    key, value = (x.expand(repeats, -1, -1, -1) for x in (key, value))

    def backward(part: slice, seen: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        q, o, g = (x[:, :, part] for x in (query, out, grad))
        k, v = key[:, :, seen], value[:, :, seen]
        dq, dk, dv = _CPU_BACKWARD(g, q, k, v, o, lse[:, :, part], 0.0, causal, scale=scale)
        return dq, dk.sum(0, keepdim=True), dv.sum(0, keepdim=True)

    for a, b in segments.causal:
        part = slice(a, b)
        query_grad[:, :, part], grads[1][:, :, part], grads[2][:, :, part] = backward(part, part, True)
    for a, b, c, d in segments.crossing:
        part, prompt = slice(a, b), slice(c, d)
        dq, dk, dv = backward(part, prompt, False)
        query_grad[:, :, part] += dq
        grads[1][:, :, prompt] += dk
        grads[2][:, :, prompt] += dv
    return grads  # type: ignore[return-value]


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Two softmaxes over different keys → the softmax over both, in place. out [1, H, T, D], lse [1, H, T]."""
    both = torch.logaddexp(lse, more_lse)
    share = (lse - both).exp_()[..., None]
    merged = torch.lerp(more.to(both.dtype), out.to(both.dtype), share)
    out.copy_(merged)
    lse.copy_(both)


def _forward_cuda(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Three launches whatever the number of rows. Written from the kernels' signatures; never run on a GPU yet."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    own, branches, prompts = segments.offsets
    longest = max(b - a for a, b in segments.causal)
    out, lse, *seeds = _CUDA(q, k, v, own, own, longest, longest, 0.0, True, False, scale=scale)[:4]
    if segments.crossing:
        (a, b), (c, d) = _crossing_span(segments)
        most = (max(z - y for y, z, _, _ in segments.crossing), max(z - y for _, _, y, z in segments.crossing))
        seen, seen_lse, *more = _CUDA(q[a:b], k[c:d], v[c:d], branches, prompts, *most, 0.0, False, False, scale=scale)[
            :4
        ]
        _merge(out[a:b].transpose(0, 1)[None], lse[None, :, a:b], seen.transpose(0, 1)[None], seen_lse[None])
        seeds += more
    return out.transpose(0, 1)[None], lse, list(seeds)


def _backward_cuda(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seeds: list[Tensor],
    segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v, o = (x[0].transpose(0, 1) for x in (grad, query, key, value, out))
    g = g.contiguous()
    own, branches, prompts = segments.offsets
    longest = max(b - a for a, b in segments.causal)
    grads = _CUDA_BACKWARD(g, q, k, v, o, lse, own, own, longest, longest, 0.0, True, *seeds[:2], scale=scale)
    if segments.crossing:
        (a, b), (c, d) = _crossing_span(segments)
        most = (max(z - y for y, z, _, _ in segments.crossing), max(z - y for _, _, y, z in segments.crossing))
        more = _CUDA_BACKWARD(
            g[a:b], q[a:b], k[c:d], v[c:d], o[a:b], lse[:, a:b].contiguous(), branches, prompts, *most, 0.0, False,
            *seeds[2:], scale=scale,
        )  # fmt: skip
        for whole, (start, stop), part in zip(grads, ((a, b), (c, d), (c, d)), more, strict=True):
            whole[start:stop] += part
    return tuple(x.transpose(0, 1)[None] for x in grads)


def _crossing_span(segments: Segments) -> tuple[tuple[int, int], tuple[int, int]]:
    """All branches and all prompts, each one range: that is how a stream is ordered."""
    crossing = segments.crossing
    return (crossing[0][0], crossing[-1][1]), (crossing[0][2], crossing[-1][3])


def _attention(before: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        segments = options.pop("segments", None)
        if segments is None:
            return before(module, query, key, value, attention_mask, **options)
        return stream_attention(module, query, key, value, segments, **options)

    return attention


def _eager(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """The eager attention of the file a model is defined in, as transformers itself finds it."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **options)


AttentionInterface.register(NAMES["sdpa"], _attention(sdpa_attention_forward))
AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
AttentionInterface.register(NAMES["eager"], _attention(_eager))
AttentionMaskInterface.register(NAMES["eager"], eager_mask)
