"""Writing with any transformers causal language model: its own forward, and a cache that is reserved beforehand.

A prompt goes through the model once, whatever the number of its completions: what the model remembers of it is copied
to each of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from alignkit.core.errors import RecipeError
from alignkit.models.paths import causal_model
from alignkit.rollout import writer
from alignkit.rollout.writer import close_up

REMEMBERS_TOKENS = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
"""Cache layers that hold keys and values of tokens, and nothing else that moves from token to token."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What the model remembers of prompts that it read together, and their lengths in tokens."""

    cache: Any
    lengths: list[int]


class PlainWriter:
    """See `Writer`. `count`: rows at most; `pad_id` fills prompts up on the left, and is masked out.

    Raises:
        RecipeError: the model cannot write token by token.
    """

    def __init__(self, model: Any, count: int, pad_id: int) -> None:
        self._model, self._pad_id = model, pad_id
        self._takes = inspect.signature(causal_model(model).forward).parameters.keys()
        if "past_key_values" not in self._takes:
            raise RecipeError(
                f"the in-process sampler keeps what {model.config.model_type} remembers in transformers' "
                "`past_key_values`, which this model does not take; write its completions elsewhere and train on those"
            )
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        self._places: _Places | _States = _Places(count) if kinds <= REMEMBERS_TOKENS else _States(model.config)
        self.mixes = self._places.mixes

    def read(self, prompts: Sequence[list[int]]) -> tuple[_Told, Tensor]:
        """As `Writer.read`."""
        tokens, attention = _pad_left(prompts, self._pad_id)
        positions, cache = (attention.cumsum(-1) - 1).clamp(min=0), self._places.for_prompts()
        logits = self._forward(tokens, None if bool(attention.all()) else attention, positions, cache)
        return _Told(cache, [len(prompt) for prompt in prompts]), logits

    def enter(self, told: _Told, numbers: Sequence[int]) -> None:
        """As `Writer.enter`."""
        self._places.enter(told, numbers)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `Writer.step`."""
        attention = self._places.make_room()
        columns = (torch.tensor(numbers)[:, None] for numbers in (tokens, positions))
        return self._forward(next(columns), attention, next(columns), self._places.cache)

    def keep(self, kept: Sequence[int]) -> list[int]:
        """As `Writer.keep`."""
        order = close_up(kept, [0] * (max(kept, default=0) + 1))
        self._places.keep(order)
        return order

    def _forward(self, tokens: Tensor, attention: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """Logits [N, V] after these tokens [N, T], behind what `cache` holds; `attention` [N, columns] is 1 on tokens
        that a row may see, None = all, which fast kernels ask for."""
        device = next(self._model.parameters()).device
        arguments = {
            "input_ids": tokens.to(device),
            "attention_mask": None if attention is None else attention.to(device),
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in self._takes:
            arguments["position_ids"] = positions.to(device)
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        logits: Tensor = self._model(**arguments).logits[:, -1]
        return logits


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, each [places, heads, capacity, width]: `length` columns are in use."""

    def __init__(self, places: int, capacity: int) -> None:
        super().__init__()
        self.places, self.capacity, self.length = places, capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for states like these, [rows, heads, T, width]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._memory(key_states), self._memory(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the next tokens of the first rows, [rows, heads, T, width]; returns all that these rows have, views."""
        del args, kwargs
        rows, stop = key_states.shape[0], self.length + key_states.shape[2]
        self.keys[:rows, :, self.length : stop] = key_states
        self.values[:rows, :, self.length : stop] = value_states
        self.length = stop
        return self.keys[:rows, :, :stop], self.values[:rows, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that `update` will return, and the number of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def write(self, rows: slice, first: int, told: Any, number: int) -> None:
        """The last tokens of prompt `number` of another cache's layer, into the columns from `first` of these rows."""
        count = self.length - first
        self.keys[rows, :, first : self.length] = told.keys[number, :, -count:]
        self.values[rows, :, first : self.length] = told.values[number, :, -count:]

    def move_row(self, row: int, place: int, first: int) -> None:
        """The columns from `first` of a row, to another place."""
        for x in (self.keys, self.values):
            x[place, :, first : self.length] = x[row, :, first : self.length]

    def shift(self, rows: int, first: int, capacity: int) -> None:
        """New memory, in which column `first` of the first `rows` places is column 0."""
        keys, values = self.keys, self.values
        used, self.capacity = slice(first, self.length), capacity
        self.length -= first
        self.keys, self.values = self._memory(keys), self._memory(values)
        self.keys[:rows, :, : self.length] = keys[:rows, :, used]
        self.values[:rows, :, : self.length] = values[:rows, :, used]

    def _memory(self, like: Tensor) -> Tensor:
        # Zeros, since what a mask hides is still multiplied by 0, which nan would survive.
        return like.new_zeros(self.places, like.shape[1], self.capacity, like.shape[3])


class _Places:
    """What the model remembers of the rows under way: keys and values in memory that is reserved beforehand.

    Row i stands in place i. All rows end in the same column, and begin in different ones: what is before is masked out.
    So a query is in one column, and how far two tokens are apart in columns is how far they are apart in their row,
    which is all that masks of sliding windows go by. The last row moves to the place of one that leaves.
    """

    mixes = True
    """Rows of different lengths may stand side by side, and enter at any time."""

    def __init__(self, count: int) -> None:
        self.cache: Any = None
        self._count = count
        self._layers: list[_Layer] = []
        self._starts: list[int] = []

    def for_prompts(self) -> Any:
        """An empty cache in which the model may leave what it remembers of prompts."""
        return DynamicCache()  # without a config windows are not cut, and every layer has the same columns

    def enter(self, told: _Told, numbers: Sequence[int]) -> None:
        """Further rows behind those under way, which begin with these prompts, by number."""
        if self.cache is None:
            self._reserve(told.cache)
        if not self._starts:
            for layer in self._layers:
                layer.length = max(told.lengths[number] for number in numbers)
        for number, copies in groupby(numbers):
            first = self._length - told.lengths[number]
            rows = slice(len(self._starts), len(self._starts) + len(list(copies)))
            for index, layer in enumerate(self.cache.layers):
                if isinstance(layer, _Layer):
                    layer.write(rows, first, told.cache.layers[index], number)
            self._starts += [first] * (rows.stop - rows.start)

    def make_room(self) -> Tensor | None:
        """Room for one more column. Returns what the rows may see with it, [rows, columns]; None = everything."""
        first = min(self._starts)
        if self._length == self._layers[0].capacity or first >= writer.BLOCK:
            capacity = self._length - first + writer.BLOCK
            for layer in self._layers:
                layer.shift(len(self._starts), first, capacity)
            self._starts = [start - first for start in self._starts]
        if not any(self._starts):
            return None
        return (torch.arange(self._length + 1) >= torch.tensor(self._starts)[:, None]).long()

    def keep(self, order: Sequence[int]) -> None:
        """Only these rows go on; row `order[i]` in place i, which is its own or that of a row that leaves."""
        for place, row in enumerate(order):
            if place != row:
                for layer in self._layers:
                    layer.move_row(row, place, self._starts[row])
        self._starts = [self._starts[row] for row in order]

    @property
    def _length(self) -> int:
        return self._layers[0].length

    def _reserve(self, told: Any) -> None:
        layers: list[Any] = []
        for layer in told.layers:
            if layer.is_initialized:
                own = _Layer(self._count, layer.keys.shape[2] + writer.BLOCK)
                own.lazy_initialization(layer.keys, layer.values)
                self._layers.append(own)
                layers.append(own)
            else:
                layers.append(DummyLayer())  # it reads what another layer keeps
        self.cache = Cache(layers=layers)


class _States:
    """What the model remembers of the rows under way, in transformers' own cache: more than keys and values of tokens.

    A state takes in padding like any token, so there is none: rows enter together, after prompts of one length.
    """

    mixes = False

    def __init__(self, config: Any) -> None:
        self.cache: Any = None
        self._config = config

    def for_prompts(self) -> Any:
        """As `_Places.for_prompts`."""
        return DynamicCache(config=self._config)

    def enter(self, told: _Told, numbers: Sequence[int]) -> None:
        """As `_Places.enter`, when no row is under way."""
        self.cache = copy.deepcopy(told.cache)  # more completions of these prompts may follow
        self.keep(numbers)

    def make_room(self) -> Tensor | None:
        """As `_Places.make_room`; this cache grows by itself."""
        return None

    def keep(self, order: Sequence[int]) -> None:
        """As `_Places.keep`; a row may also be named several times."""
        self.cache.reorder_cache(torch.tensor(order, dtype=torch.long))


def _pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts → tokens and attention (1 = real), both [N, L] with the last token of every prompt in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    attention = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens), torch.tensor(attention)
