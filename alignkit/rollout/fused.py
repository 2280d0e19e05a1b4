"""Writing on a CPU with Llama's block (Llama, Mistral, Qwen 2 and 3), without the model's own forward; same formula.

Queries, keys and values are one matrix product. Weights are laid out once for the few rows of a step, and a rotation is
one complex product. The keys and values of a prompt exist once: rows that share it attend to it together, then each to
what it wrote, and the two softmaxes are merged by their log-sum-exps.

    o = σ(a − b)·o_prompt + (1 − σ(a − b))·o_own        a, b: log-sum-exp of the scores of each part

Weights are read when a writer is made, and used as they were then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from alignkit.models.affine import read_affine
from alignkit.models.paths import causal_model
from alignkit.rollout import writer
from alignkit.rollout.writer import close_up

MODEL_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
ROTATIONS = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings in which a position turns by the same angle whatever the length of the row."""
ROWS = 16
"""Rows for which weights are laid out; other numbers work as well."""
LARGE = 2**17
"""Numbers of a matrix from which laying it out pays: its products are quicker, but every call costs more."""

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def why_not(model: Any, longest: int) -> str | None:
    """Why such a model cannot be written with here, rows having up to `longest` tokens; None = it can."""
    bare = causal_model(model)
    config = bare.config
    if bare.device.type != "cpu":
        return f"its attention has no kernel on {bare.device.type}"
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type} has another block"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if config.rope_parameters["rope_type"] not in ROTATIONS:
        return f"its rotary embedding is {config.rope_parameters['rope_type']}"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and slides and window < longest:
        return f"rows of up to {longest} tokens do not fit its window of {window}"
    if type(bare.get_input_embeddings()) is not nn.Embedding:
        return "its embedding is not a plain one"
    return None


class _Product:
    """x [N, in] → [N, out], of layers side by side; what is done with the result costs no pass of its own."""

    def __init__(self, *layers: tuple[Tensor, Tensor | None]) -> None:
        weights, biases = zip(*layers, strict=True)
        self._bias = None
        if any(bias is not None for bias in biases):
            self._bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in layers])
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        has_library = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._laid_out = has_library and self._weight.dtype == torch.float32 and self._weight.numel() >= LARGE
        if self._laid_out:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach(), ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        return self._unary(x, "none") if self._laid_out else linear(x, self._weight, self._bias)

    def activated(self, x: Tensor) -> Tensor:
        """Its SiLU."""
        return self._unary(x, "swish") if self._laid_out else silu(linear(x, self._weight, self._bias))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """Multiplied by `other` [N, out]."""
        return self._binary(x, other, "mul") if self._laid_out else linear(x, self._weight, self._bias).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Added to `other` [N, out]."""
        return self._binary(x, other, "add") if self._laid_out else linear(x, self._weight, self._bias).add_(other)

    def _unary(self, x: Tensor, name: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, name, [], "")
        return out

    def _binary(self, x: Tensor, other: Tensor, name: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, name)
        return out


class _Norm:
    """x / √(mean x² + ε) · weight, in float32 at least: as x / √(|x|² + n·ε) · √n·weight, which takes fewer passes."""

    def __init__(self, module: Any, order: Tensor | None = None) -> None:
        weight = module.weight.detach() if order is None else module.weight.detach()[order]
        self._exact = torch.promote_types(weight.dtype, torch.float32)
        self._weight = weight.to(self._exact) * len(weight) ** 0.5
        self._floor = weight.new_tensor((len(weight) * module.variance_epsilon) ** 0.5, dtype=self._exact)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self._exact)
        return (x / torch.hypot(length, self._floor)).mul_(self._weight).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Block:
    """The weights of a layer; `query_norm` and `key_norm` are Qwen 3's."""

    before_attention: _Norm
    attention: _Product
    query_norm: _Norm | None
    key_norm: _Norm | None
    after_attention: _Product
    before_feed_forward: _Norm
    gate: _Product
    up: _Product
    down: _Product


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """Keys and values of a prompt by layer, [1, key-value heads, L, width] each."""

    layers: list[tuple[Tensor, Tensor]]


class FusedWriter:
    """See `Writer`. `count`: rows at most; `longest`: tokens of the longest row there can be.

    Raises:
        ValueError: a weight is not what such a model has.
    """

    mixes = True

    def __init__(self, model: Any, count: int, longest: int) -> None:
        bare = causal_model(model)
        config = bare.config
        self._heads, self._pairs = config.num_attention_heads, config.num_key_value_heads
        body = bare.model
        self._embedding: Tensor = body.embed_tokens.weight
        self._width = body.layers[0].self_attn.head_dim
        self._scale = body.layers[0].self_attn.scaling
        # A rotation turns a half of a head against the other half; here the numbers that turn together are neighbours.
        self._order = torch.arange(self._width).view(2, -1).T.flatten()
        self._blocks = [self._read_block(layer, config.model_type == "qwen3") for layer in body.layers]
        self._norm = _Norm(body.norm)
        self._head = _Product(read_affine(bare.get_output_embeddings()))
        self._turns = self._read_turns(body.rotary_emb, longest)
        self._count = count
        self._own = self._memory(writer.BLOCK)
        self._column = 0
        self._told: list[_Told] = []
        self._starts: list[int] = []

    def read(self, prompts: Sequence[list[int]]) -> tuple[list[_Told], Tensor]:
        """As `Writer.read`: one behind the other, without padding."""
        ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).tolist()
        spans = list(zip([0, *ends], ends, strict=False))
        told: list[_Told] = [_Told([]) for _ in prompts]
        final = len(self._blocks) - 1

        def attend(index: int, query: Tensor, memory: Tensor) -> Tensor:
            """Of the last layer only the last token of a prompt is asked for."""
            parts = []
            for (start, stop), mine in zip(spans, told, strict=True):
                key, value = memory[start:stop].transpose(0, 1).contiguous()[None].chunk(2, 1)
                mine.layers.append((key, value))
                asking = query[stop - 1 : stop] if index == final else query[start:stop]
                out = scaled_dot_product_attention(
                    asking.transpose(0, 1)[None], key, value,
                    is_causal=index < final, scale=self._scale, enable_gqa=True,
                )  # fmt: skip
                parts.append(out[0].transpose(0, 1))
            return torch.cat(parts)

        tokens = [token for prompt in prompts for token in prompt]
        positions = [position for prompt in prompts for position in range(len(prompt))]
        return told, self._forward(tokens, positions, attend, [stop - 1 for stop in ends])

    def enter(self, told: list[_Told], numbers: Sequence[int]) -> None:
        """As `Writer.enter`."""
        if not self._told:
            self._column = 0
        self._told += [told[number] for number in numbers]
        self._starts += [self._column] * len(numbers)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `Writer.step`."""
        hidden = self._make_room()
        count, self._column = len(tokens), self._column + 1
        own = self._own[:, :count]
        last = own[:, :, :, self._column - 1].unbind()
        keys, values = (part.unbind() for part in own[:, :, :, : self._column].chunk(2, 2))
        families = [(told, len(list(rows))) for told, rows in groupby(self._told)]
        sizes = [rows for _, rows in families]

        def attend(index: int, query: Tensor, memory: Tensor) -> Tensor:
            last[index].copy_(memory)
            query = query.view(count, self._pairs, -1, self._width)
            out, total = _attention(query, keys[index], values[index], self._scale, hidden)
            seen, totals = [], []
            for (told, rows), part in zip(families, query.split_with_sizes(sizes), strict=True):
                asking = part.transpose(0, 1).reshape(1, self._pairs, -1, self._width)
                more, more_total = _attention(asking, *told.layers[index], self._scale)
                seen.append(more.view(self._pairs, rows, -1, self._width))
                totals.append(more_total.view(self._pairs, rows, -1))
            share = (torch.cat(totals, 1).transpose(0, 1) - total).sigmoid_()[..., None]
            return out.lerp_(torch.cat(seen, 1).transpose(0, 1), share.to(out.dtype))

        return self._forward(tokens, positions, attend)

    def keep(self, kept: Sequence[int]) -> list[int]:
        """As `Writer.keep`."""
        order = close_up(kept, self._told)
        for place, row in enumerate(order):
            if place != row:
                used = slice(self._starts[row], self._column)
                self._own[:, place, :, used] = self._own[:, row, :, used]
        self._told = [self._told[row] for row in order]
        self._starts = [self._starts[row] for row in order]
        return order

    def _forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        attend: Callable[[int, Tensor, Tensor], Tensor],
        asked: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits [N, V] after tokens [T], or after those `asked` for.

        `attend`: layer, queries [T, heads, width], keys and values [T, 2·key-value heads, width] → [N', heads·width in
        any shape], N' = T but in the last layer N.
        """
        states = embedding(torch.tensor(tokens), self._embedding)
        turns = self._turns[torch.tensor(positions), None]
        rotated, shape = self._heads + self._pairs, (len(tokens), -1, self._width)
        for index, block in enumerate(self._blocks):
            mixed = block.attention(block.before_attention(states)).view(shape)
            if block.query_norm is not None and block.key_norm is not None:
                mixed[:, : self._heads] = block.query_norm(mixed[:, : self._heads])
                mixed[:, self._heads : rotated] = block.key_norm(mixed[:, self._heads : rotated])
            _turn(mixed[:, :rotated], turns)
            seen = attend(index, mixed[:, : self._heads], mixed[:, self._heads :])
            if asked is not None and index == len(self._blocks) - 1:
                states = states[torch.tensor(asked)]
            states = block.after_attention.plus(seen.reshape(len(states), -1), states)
            inner = block.before_feed_forward(states)
            states = block.down.plus(block.up.times(inner, block.gate.activated(inner)), states)
        return self._head(self._norm(states))

    def _make_room(self) -> Tensor | None:
        """Room for one more column. Returns what it may not see, [rows, 1, 1, columns] with -inf there; None = all."""
        first = min(self._starts)
        if self._column == self._own.shape[3] or first >= writer.BLOCK:
            before = self._own[:, : len(self._starts), :, first : self._column]
            self._column -= first
            self._own = self._memory(self._column + writer.BLOCK)
            self._own[:, : len(self._starts), :, : self._column] = before
            self._starts = [start - first for start in self._starts]
        if not any(self._starts):
            return None
        starts = torch.tensor(self._starts)[:, None, None, None]
        unseen = torch.arange(self._column + 1) < starts
        return torch.zeros_like(unseen, dtype=self._own.dtype).masked_fill_(unseen, -torch.inf)

    def _memory(self, columns: int) -> Tensor:
        # Zeros, since what a mask hides is still multiplied by 0, which nan would survive.
        return self._embedding.new_zeros(len(self._blocks), self._count, 2 * self._pairs, columns, self._width)

    def _read_block(self, layer: Any, normed: bool) -> _Block:
        attention, feed_forward = layer.self_attn, layer.mlp
        query, key = (self._reorder(*read_affine(x)) for x in (attention.q_proj, attention.k_proj))
        return _Block(
            _Norm(layer.input_layernorm),
            _Product(query, key, read_affine(attention.v_proj)),
            _Norm(attention.q_norm, self._order) if normed else None,
            _Norm(attention.k_norm, self._order) if normed else None,
            _Product(read_affine(attention.o_proj)),
            _Norm(layer.post_attention_layernorm),
            _Product(read_affine(feed_forward.gate_proj)),
            _Product(read_affine(feed_forward.up_proj)),
            _Product(read_affine(feed_forward.down_proj)),
        )

    def _reorder(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        def reorder(x: Tensor) -> Tensor:
            heads: Tensor = x.view(-1, self._width, *x.shape[1:])
            return heads[:, self._order].flatten(0, 1)

        return reorder(weight), None if bias is None else reorder(bias)

    def _read_turns(self, rotation: Any, longest: int) -> Tensor:
        """How far each pair of numbers turns at each position, [longest, width/2], complex."""
        positions = torch.arange(longest)[None]
        like = torch.promote_types(self._embedding.dtype, torch.float32)
        cosine, sine = rotation(self._embedding.new_zeros(1, dtype=like), positions)
        if cosine.shape[-1] != self._width:
            raise ValueError("only a part of every head is rotated")
        half = self._width // 2
        return torch.complex(cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous())


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of queries [N, H, Q, D] to keys and values [N, H, T, D], and its log-sum-exp [N, H, Q] in nats.

    `hidden` is added to the scores [N, H, Q, T].
    """
    out, total = _KERNEL(query, key, value, 0.0, False, attn_mask=hidden, scale=scale)
    return out, total


def _turn(x: Tensor, turns: Tensor) -> None:
    """Rotate pairs of neighbours of [T, H, D] in place by [T, 1, D/2]."""
    exact = x if x.dtype == turns.real.dtype else x.to(turns.real.dtype)
    torch.view_as_complex(exact.view(*exact.shape[:2], -1, 2)).mul_(turns)
    if exact is not x:
        x.copy_(exact)
