"""Reward sources of a recipe → scores and one combined reward on every completion of a round."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from alignkit.core.contracts import Models, RewardSource
from alignkit.core.errors import DataError, RecipeError, RunFailed
from alignkit.core.lazy import torch
from alignkit.core.registry import Entry, register
from alignkit.core.types import Completion, Group, RewardBatch, RewardOutput, Score
from alignkit.rewards.config import RewardConfig
from alignkit.rewards.functions import FunctionReward

if TYPE_CHECKING:
    from torch import Tensor


def reward_name(config: RewardConfig) -> str:
    """The name under which scores are kept and logged: `exact` for `"my_pkg.rewards:exact"`."""
    return config.name.rpartition(":")[2]


def build_sources(configs: Sequence[RewardConfig]) -> list[tuple[RewardConfig, RewardSource]]:
    """The recipe's `rewards` as objects: registered names, entry points, or 'module:attribute'.

    A class is built with its `config_type` from `args`; a function becomes a FunctionReward and takes no `args`.

    Raises:
        RecipeError: unknown name, unusable object, bad `args`, or two rewards of one name.
    """
    names = [reward_name(config) for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(
                f"rewards: {name!r} is listed {names.count(name)} times; scores are kept by name, so list it once"
            )
    return [(config, _build(config, register.reward.get(config.name))) for config in configs]


def _build(config: RewardConfig, entry: Entry) -> RewardSource:
    target = entry.target
    if isinstance(target, type):
        if not hasattr(target, "config_type"):
            raise RecipeError(
                f"reward {config.name!r}: the class {target.__qualname__} has no `config_type`; a reward class names "
                "the pydantic config (alignkit.core.Config) its constructor takes, or use a plain function"
            )
        try:
            settings = target.config_type(**{**entry.preset, **config.args})
        except ValidationError as error:
            raise RecipeError(_explain(config, error, target.config_type.model_fields)) from None
        return cast(RewardSource, target(settings))
    if not callable(target):
        raise RecipeError(
            f"reward {config.name!r} is a {type(target).__name__}; expected a function "
            "reward(prompts, completions, completion_ids, **columns) or a RewardSource class"
        )
    if config.args:
        raise RecipeError(
            f"reward {config.name!r}: args {sorted(config.args)} were given, but a plain function takes none; make it "
            "a class with a `config_type` to give it settings"
        )
    return FunctionReward(target, reward_name(config))


def _explain(config: RewardConfig, error: ValidationError, known: Collection[str]) -> str:
    lines = [
        f"reward {config.name!r}: args.{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}; "
        f"got {problem['input']!r}"
        for problem in error.errors()
    ]
    return "\n".join([*lines, f"known args are {', '.join(known) or 'none'}"])


def score_groups(
    groups: Sequence[Group],
    sources: Sequence[tuple[RewardConfig, RewardSource]],
    step: int,
    models: Models | None = None,
    *,
    stop_ids: Collection[int],
) -> None:
    """Score every completion: fills `scores[name]` and sets `reward` to the weighted sum of the valid scores.

    A completion on which no source has anything to say keeps the reward nan. `stop_ids` tell a source which completions
    ended by themselves (`RewardBatch.ended`).

    Raises:
        DataError: a group lacks a column a source requires.
        RunFailed: a source's answer has the wrong shape or is not finite.
    """
    completions = [completion for group in groups for completion in group.completions]
    if not completions or not sources:
        return
    check_columns(groups, sources)
    rows = reward_batch(groups, step, stop_ids)
    for config, source in sources:
        _keep(reward_name(config), source.score(rows, models), completions)
    for completion in completions:
        parts = [(config.weight, completion.scores[reward_name(config)]) for config, _ in sources]
        valid = [weight * score.value for weight, score in parts if score.valid]
        completion.reward = sum(valid) if valid else math.nan


def check_columns(groups: Sequence[Group], sources: Sequence[tuple[RewardConfig, RewardSource]]) -> None:
    """Refuse groups that lack a column some source requires; worth calling before the first step.

    Raises:
        DataError: naming the reward, the group, and the columns it has.
    """
    for config, source in sources:
        for group in groups:
            missing = [column for column in source.requires if column not in group.fields]
            if missing:
                raise DataError(
                    f"reward {config.name!r} reads the column {missing[0]!r}, which group {group.id!r} lacks; its "
                    f"columns are {', '.join(sorted(group.fields)) or 'none'}. Map another one to it: "
                    f"data.N.fields: {{{missing[0]}: THEIR_COLUMN}}"
                )


def reward_batch(groups: Sequence[Group], step: int, stop_ids: Collection[int]) -> RewardBatch:
    """The completions of `groups` as flat rows; a column that only some groups have is None on the others."""
    rows = [(index, group, completion) for index, group in enumerate(groups) for completion in group.completions]
    tokens = [completion.tokens for _, _, completion in rows]
    longest = max(map(len, tokens), default=0)
    columns = sorted({name for group in groups for name in group.fields})
    return RewardBatch(
        prompts=[group.messages for _, group, _ in rows],
        completions=[completion.text for _, _, completion in rows],
        completion_ids=torch.tensor([ids + [0] * (longest - len(ids)) for ids in tokens], dtype=torch.long),
        completion_mask=torch.tensor(
            [[True] * len(ids) + [False] * (longest - len(ids)) for ids in tokens], dtype=torch.bool
        ),
        group=torch.tensor([index for index, _, _ in rows], dtype=torch.long),
        columns={name: [group.fields.get(name) for _, group, _ in rows] for name in columns},
        step=step,
        ended=torch.tensor([bool(ids) and ids[-1] in stop_ids for ids in tokens], dtype=torch.bool),
    )


def _keep(name: str, output: RewardOutput, completions: list[Completion]) -> None:
    """Write one source's answer into the completions, components as `name/component`."""
    valid = _checked(name, "valid", output.valid, len(completions))
    columns = {name: output.score, **{f"{name}/{part}": value for part, value in output.components.items()}}
    for column, values in columns.items():
        scores = _checked(name, column, values, len(completions))
        for row, completion in enumerate(completions):
            if not math.isfinite(scores[row]):
                raise RunFailed(
                    f"reward {name!r} answered {scores[row]} in {column!r} for row {row} (completion "
                    f"{completion.text[:60]!r}); expected a finite number, and valid=False where it has nothing to say"
                )
            completion.scores[column] = Score(value=scores[row], valid=bool(valid[row]))
    if output.per_token is not None:
        dense = _checked(name, "per_token", output.per_token, len(completions))
        for row, completion in enumerate(completions):
            completion.scores[name].per_token = dense[row][: len(completion.tokens)]


def _checked(name: str, what: str, values: Tensor, count: int) -> list[Any]:
    if values.shape[:1] != (count,):
        raise RunFailed(
            f"reward {name!r} answered {what!r} of shape {tuple(values.shape)} for {count} completions; expected one "
            "entry for each"
        )
    listed: list[Any] = values.tolist()
    return listed
