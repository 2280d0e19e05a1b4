"""Which few changes of a recipe make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from alignkit.core.errors import RecipeError
from alignkit.memory.predict import Unpredictable, least, predict
from alignkit.recipe import Recipe, find_algorithm, load_recipe

ENOUGH = 3
MOST_PREDICTED = 48
"""Predictions that a search may cost."""
SHORTEST = 128
"""Tokens below which no row is cut."""


@dataclass(frozen=True)
class Change:
    """Overrides to paste, and how far they go: 1 changes speed alone, 4 or more what is learned."""

    overrides: tuple[str, ...] = ()
    price: float = 0.0


@dataclass(frozen=True)
class Remedy:
    """A change that makes a recipe fit, and the bytes it then takes."""

    change: Change
    peak: int


def remedies(recipe: Recipe, limit: int, *, world_size: int, device: str, config: str) -> list[Remedy]:
    """The smallest changes after which no phase takes more than `limit` bytes: few keys first, then gentle ones.

    None contains another.
    """
    found: list[Remedy] = []
    predicted = 0
    for change in _combinations(recipe, world_size):
        if any(set(known.change.overrides) <= set(change.overrides) for known in found):
            continue
        try:
            changed = load_recipe(recipe.model_dump(mode="json", by_alias=True), change.overrides)
            if least(changed, world_size=world_size, device=device, config=config) > limit:
                continue
            told = predict(changed, world_size=world_size, device=device, config=config)
        except (RecipeError, Unpredictable):  # the change does not go with this method or model
            continue
        predicted += 1
        if told.peak.total <= limit:
            found.append(Remedy(change, told.peak.total))
        if len(found) == ENOUGH or predicted == MOST_PREDICTED:
            break
    return found


def _combinations(recipe: Recipe, world_size: int) -> list[Change]:
    """Every choice of at most one change of each kind, the smallest first."""
    none = Change()
    kinds = [[none, *kind] for kind in _kinds(recipe, world_size)]
    found = []
    for chosen in product(*kinds):
        overrides = tuple(text for change in chosen for text in change.overrides)
        found.append(Change(overrides, sum(change.price for change in chosen)))
    return sorted((change for change in found if change.overrides), key=lambda x: (len(x.overrides), x.price))


def _kinds(recipe: Recipe, world_size: int) -> Iterator[Sequence[Change]]:
    model, train = recipe.model, recipe.train
    if not model.gradient_checkpointing:
        yield [Change(("model.gradient_checkpointing=true",), 1)]
    unit = find_algorithm(recipe.algorithm.name).target.rows_per_unit(recipe.algorithm) * train.max_length
    halves = [train.micro_batch_tokens >> i for i in range(1, 12)]
    sizes = [tokens for tokens in halves if tokens >= min(unit, train.max_length)][:4]
    yield [Change((f"train.micro_batch_tokens={tokens}",), 1 + i / 10) for i, tokens in enumerate(sizes)]
    if world_size > 1:
        yield list(_sharing(recipe))
    if model.dtype == "float32":
        yield [Change(("model.dtype=bfloat16",), 4)]
    adapter = ("model.lora.r=16",) if model.lora is None else ()
    packed = ("model.quantization=nf4",) if model.quantization is None else ()
    yield [Change(keys, 5) for keys in dict.fromkeys([adapter, (*adapter, *packed)]) if keys]
    shortest = max(SHORTEST, recipe.rollout.max_completion_length + 1)
    yield [
        Change((f"train.max_length={train.max_length >> i}",), 5 + i)
        for i in (1, 2)
        if train.max_length >> i >= shortest
    ]


def _sharing(recipe: Recipe) -> Iterator[Change]:
    """Backends that spread more than the recipe's does."""
    ladder = ["ddp", "zero1", "zero2", "fsdp2", "zero3"]
    present = "ddp" if recipe.dist.backend == "auto" else recipe.dist.backend
    for i, backend in enumerate(ladder[ladder.index(present) + 1 :]):
        yield Change((f"dist.backend={backend}",), 1 + i / 10)
    for i, backend in enumerate(ladder[max(1, ladder.index(present)) :]):
        name = () if backend == present else (f"dist.backend={backend}",)
        both = ("dist.offload_optimizer=true", "dist.offload_weights=true")
        offload = both if backend == "fsdp2" else both[:1]
        if not recipe.dist.offload_optimizer:
            yield Change((*name, *offload), 2 + i / 10)
