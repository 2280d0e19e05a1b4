"""A recipe's rewards, tried on cheap texts beside the data's own answers: `alignkit rewards probe`."""

from __future__ import annotations

import math
from dataclasses import replace

from alignkit.core.config import CombineConfig
from alignkit.core.errors import RecipeError
from alignkit.core.types import Completion, Group
from alignkit.data.groups import load_groups
from alignkit.models.load import load_renderer
from alignkit.recipe import Recipe
from alignkit.rewards.pipeline import build_sources
from alignkit.rewards.probe import Probe, probe

ANSWERS = ("answer", "solution", "demonstration", "response", "reference")
"""Columns that hold a real answer where rows come without completions: the first that has something."""


def probe_recipe(recipe: Recipe, rows: int) -> Probe:
    """Probe the recipe's `rewards` on the first rows of each entry of `data`, else `eval.rewards` on `eval.data`.

    Raises:
        RecipeError: the recipe has no rewards.
        DataError: the data is missing, or a reward lacks a column.
        RunFailed: a reward failed.
    """
    configs, entries, combine = recipe.rewards, recipe.data, recipe.combine
    if not configs:
        configs, entries, combine = recipe.eval.rewards, recipe.eval.data, CombineConfig()
    if not configs:
        raise RecipeError("the recipe has neither `rewards` nor `eval.rewards`, so there is nothing to probe")
    sources = build_sources(configs)
    renderer = load_renderer(recipe.model)
    groups: list[Group] = []
    for entry in entries:
        first = entry.model_copy(update={"limit": min(rows, entry.limit or rows), "max_bad_fraction": 1.0})
        groups += load_groups(first, renderer, max_length=recipe.train.max_length)[0][:rows]

    def encode(text: str) -> list[int]:
        return [*renderer.tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0], renderer.eos_id]

    return probe([_with_its_answer(group) for group in groups], sources, combine, encode)


def _with_its_answer(group: Group) -> Group:
    """The prompt with its real answer as the only completion: the best of those it has, else what a column holds."""
    alone = len(group.completions) == 1  # with the reward 0 when the data labels it undesirable
    liked = [completion for completion in group.completions if not (alone and completion.reward == 0)]
    if liked:
        best = max(liked, key=lambda completion: completion.reward if math.isfinite(completion.reward) else 0.0)
        return replace(group, completions=[best])
    values = [group.fields[column] for column in ANSWERS if group.fields.get(column) is not None]
    text = next((str(value) for value in values if isinstance(value, str | int | float) and str(value).strip()), None)
    return replace(group, completions=[] if text is None else [Completion(text=text, tokens=[])])
