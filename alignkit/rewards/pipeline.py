"""Reward sources of a recipe → scores and one combined reward on every completion of a round.

Sources write columns, transforms rewrite them, a combiner reads them: raw score → transforms → weight → combine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from alignkit.core.config import CombineConfig
from alignkit.core.contracts import AsksModels, Models, RewardSource, World
from alignkit.core.errors import DataError, RecipeError
from alignkit.core.lazy import torch
from alignkit.core.reading import did_you_mean
from alignkit.core.registry import Entry, register
from alignkit.core.types import Completion, Group, Metric, RewardBatch, Score
from alignkit.rewards.calls import Answer, ask, finite_or_fail, scatter, select_rows
from alignkit.rewards.combine import MODES, check_direction, directed, routed
from alignkit.rewards.config import NO_ARGS, RewardConfig, args_type
from alignkit.rewards.functions import FunctionReward
from alignkit.rewards.table import RewardTable
from alignkit.rewards.transforms import build_transform

if TYPE_CHECKING:
    from torch import Tensor

Sources = Sequence[tuple[RewardConfig, RewardSource]]
NOTE_LENGTH = 2000
"""Characters kept of what a source said about one completion."""


def reward_name(config: RewardConfig) -> str:
    """The name under which scores are kept and logged: its label, or `exact` for `"my_pkg.rewards:exact"`."""
    return config.label if config.label is not None else config.name.rpartition(":")[2]


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
                f"rewards: {name!r} is listed {names.count(name)} times; scores are kept by name, so list it once, or "
                "give each its own `label`"
            )
    return [(config, _build(config, register.reward.get(config.name))) for config in configs]


def _build(config: RewardConfig, entry: Entry) -> RewardSource:
    takes, target = args_type(entry), entry.target
    if takes is not None:
        try:
            settings = takes.model_validate({**entry.preset, **config.args})
        except ValidationError as error:
            raise RecipeError(_explain(config, error, takes.model_fields)) from None
        return cast(RewardSource, target(settings))
    if config.args:
        raise RecipeError(f"reward {config.name!r}: args {sorted(config.args)} were given, but {NO_ARGS}")
    return FunctionReward(target, reward_name(config), config.timeout)


def _explain(config: RewardConfig, error: ValidationError, known: Collection[str]) -> str:
    lines = [
        f"reward {config.name!r}: {'.'.join(['args', *map(str, problem['loc'])])}: "
        f"{problem['msg'].removeprefix('Value error, ')}; got {problem['input']!r}"
        for problem in error.errors()
    ]
    return "\n".join([*lines, f"known args are {', '.join(known) or 'none'}"])


def check_asked(sources: Sources, known: Collection[str]) -> None:
    """Refuse a reward that asks a model which is neither the recipe's, nor the method's, nor the source's usual one.

    Raises RecipeError, naming the models there are.
    """
    for config, source in sources:
        if not isinstance(source, AsksModels):
            continue
        takes = args_type(register.reward.get(config.name))
        fields = {} if takes is None else takes.model_fields
        usual = {field.default for field in fields.values() if isinstance(field.default, str)}
        there = {"policy", *known}
        for name in source.models():
            if name not in there | usual:
                others = f"others stand in the recipe: `models: {{{name}: {{from: PATH}}}}`"
                hint = did_you_mean(name, there) or f"there are {', '.join(sorted(there))}; {others}"
                raise RecipeError(
                    f"reward {config.name!r} asks a model {name!r}, which nothing says where to find; {hint}"
                )


def score_groups(
    groups: Sequence[Group],
    sources: Sources,
    step: int,
    models: Models | None = None,
    *,
    stop_ids: Collection[int],
    combine: CombineConfig | None = None,
    world: World | None = None,
) -> list[Group]:
    """Score every completion and return the groups to go on with, all but those that `on_error: drop_group` leaves out.

    Fills `scores[name]`, components as `name/component`, what a transform started from as `name/raw`, and sets `reward`
    to the combined value. A completion on which no source has anything to say, and every one of a group left out, keeps
    the reward nan. `stop_ids` tell a source which completions ended by themselves (`RewardBatch.ended`). Every process
    must call this for every round, also without groups, when `world` is given.

    Raises:
        DataError: a group lacks a column a source requires.
        RecipeError: `when` and `combine.route` do not fit.
        RunFailed: a source failed under `on_error: fail`, or a score is not finite.
    """
    if not sources:
        return list(groups)
    combine = CombineConfig() if combine is None else combine
    check_columns(groups, sources, combine)
    rows = reward_batch(groups, step, stop_ids)
    completions = [completion for group in groups for completion in group.completions]
    names = [reward_name(config) for config, _ in sources]
    answers = [_answer(config, source, rows, models, combine) for config, source in sources]
    table = RewardTable(
        scores={name: answer.output.score.double() for name, answer in zip(names, answers, strict=True)},
        valid={name: answer.output.valid for name, answer in zip(names, answers, strict=True)},
        group=rows.group,
        columns=rows.columns,
        texts=rows.completions,
        step=step,
    )
    for config, _ in sources:
        table = _transformed(config, table, world)
    for (config, _), answer in zip(sources, answers, strict=True):
        _keep(config, answer, table, completions)
    weights = torch.tensor([config.weight for config, _ in sources], dtype=torch.float64)
    if combine.mode == "direction":
        weights = directed(weights, rows.columns.get("direction", []), rows.ids)
    combined, known = MODES["sum" if combine.level == "advantage" else combine.mode](*table.stack(names), weights)
    combined = finite_or_fail("combine", combine.mode, combined, known, rows.completions)
    dropped = _dropped(sources, answers, rows)
    for row, completion in enumerate(completions):
        lost = int(rows.group[row]) in dropped
        completion.reward = math.nan if lost or not bool(known[row]) else float(combined[row])
    return [group for number, group in enumerate(groups) if number not in dropped]


def check_columns(groups: Sequence[Group], sources: Sources, combine: CombineConfig | None = None) -> None:
    """Refuse groups that lack a column some source or transform requires; worth calling before the first step.

    Raises:
        DataError: naming the reward, the group, and the columns it has; a row that no reward scores; or a direction
            that is none.
        RecipeError: `when` without `combine.route`, or a route that no reward follows.
    """
    route = None if combine is None else combine.route
    branches = {config.when for config, _ in sources}
    if route is None and branches - {None}:
        branch = min(branch for branch in branches if branch is not None)
        raise RecipeError(f"rewards: `when: {branch}` needs `combine.route`, the data column that is meant")
    if route is not None and branches == {None}:
        raise RecipeError(f"combine.route: no reward has a `when`, so the column {route!r} would decide nothing")
    if combine is not None and combine.mode == "direction":
        for group in groups:
            check_direction(group.fields.get("direction"), sum(config.weight != 0 for config, _ in sources), group.id)
    for config, source in sources:
        required = required_columns(config, source)
        for group in groups:
            if route is not None and not routed([_routing(group, route, branches)], config.when)[0]:
                continue
            missing = [column for column in required if column not in group.fields]
            if missing:
                raise DataError(
                    f"reward {config.name!r} reads the column {missing[0]!r}, which group {group.id!r} lacks; its "
                    f"columns are {', '.join(sorted(group.fields)) or 'none'}. Map another one to it: "
                    f"data.N.fields: {{{missing[0]}: THEIR_COLUMN}}"
                )


def required_columns(config: RewardConfig, source: RewardSource) -> list[str]:
    """Data columns that a source and its transforms read."""
    transforms = [build_transform(transform) for transform in config.transforms]
    return [*source.requires, *(column for transform in transforms for column in transform.requires)]


def _routing(group: Group, route: str, branches: Collection[str | None]) -> object:
    """The value by which a group's rewards are chosen. Raises DataError where it chooses none."""
    value = group.fields.get(route)
    if value is None or (None not in branches and str(value) not in branches):
        known = ", ".join(sorted(branch for branch in branches if branch is not None))
        raise DataError(
            f"combine.route: group {group.id!r} has {value!r} in the column {route!r}, and no reward scores such rows; "
            f"there are rewards for {known}"
        )
    return value


def reward_batch(groups: Sequence[Group], step: int, stop_ids: Collection[int]) -> RewardBatch:
    """The completions of `groups` as flat rows; a column that only some groups have is None on the others."""
    rows = [(index, group, completion) for index, group in enumerate(groups) for completion in group.completions]
    tokens = [completion.tokens for _, _, completion in rows]
    last = [bool(ids) and ids[-1] in stop_ids for ids in tokens]
    longest = max(map(len, tokens), default=0)
    columns = sorted({name for group in groups for name in group.fields})
    padded = [ids + [0] * (longest - len(ids)) for ids in tokens]
    mask = [[True] * len(ids) + [False] * (longest - len(ids)) for ids in tokens]
    return RewardBatch(
        prompts=[group.messages for _, group, _ in rows],
        completions=[completion.text for _, _, completion in rows],
        completion_ids=torch.tensor(padded, dtype=torch.long).reshape(len(rows), longest),
        completion_mask=torch.tensor(mask, dtype=torch.bool).reshape(len(rows), longest),
        group=torch.tensor([index for index, _, _ in rows], dtype=torch.long),
        columns={name: [group.fields.get(name) for _, group, _ in rows] for name in columns},
        step=step,
        plain=[group.plain for _, group, _ in rows],
        prompt_ids=[group.prompt for _, group, _ in rows],
        ids=[group.id for _, group, _ in rows],
        given=[completion.version < 0 for _, _, completion in rows],
        ended=torch.tensor(
            [told if c.ended is None else c.ended for told, (_, _, c) in zip(last, rows, strict=True)], dtype=torch.bool
        ),
    )


def reward_metrics(groups: Sequence[Group], sources: Sources) -> dict[str, Metric]:
    """What to log of scored groups: means and spreads of each reward, and the share of rows it did not score.

    `std` is the mean over groups of the deviation within one, 1/(n − 1); that of the combined reward is `reward_std`,
    and `frac_reward_zero_std` the share of groups in which it is 0.
    """
    metrics: dict[str, Metric] = {}
    for config, _ in sources:
        name = reward_name(config)
        found = [completion.scores for group in groups for completion in group.completions]
        invalid = sum(not scores[name].valid for scores in found)
        metrics[f"rewards/{name}/invalid"] = Metric(float(invalid), float(len(found)))
        for column in sorted({column for scores in found for column in scores if column.startswith(f"{name}/")}):
            metrics[f"rewards/{column}"] = _mean([s[column].value for s in found if column in s and s[column].valid])
        metrics[f"rewards/{name}/mean"] = _mean([scores[name].value for scores in found if scores[name].valid])
        within = [[c.scores[name].value for c in group.completions if c.scores[name].valid] for group in groups]
        metrics[f"rewards/{name}/std"] = _mean([_deviation(values) for values in within if len(values) > 1])
    rewards = [[c.reward for c in group.completions if not math.isnan(c.reward)] for group in groups]
    spreads = [_deviation(values) for values in rewards if len(values) > 1]
    metrics["reward"] = _mean([value for values in rewards for value in values])
    metrics["reward_std"] = _mean(spreads)
    metrics["frac_reward_zero_std"] = Metric(float(sum(spread == 0 for spread in spreads)), float(len(spreads)))
    return metrics


def _mean(values: Sequence[float]) -> Metric:
    return Metric(math.fsum(values), float(len(values)))


def _deviation(values: Sequence[float]) -> float:
    if all(value == values[0] for value in values):
        return 0.0  # exactly: rounding of the mean would leave something of equal rewards
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _answer(
    config: RewardConfig, source: RewardSource, rows: RewardBatch, models: Models | None, combine: CombineConfig
) -> Answer:
    """What a source says of the rows that are its own; the others are not valid."""
    size, index = len(rows.completions), list(range(len(rows.completions)))
    if combine.route is not None and size:
        mine = routed(rows.columns[combine.route], config.when)
        index = [row for row in index if mine[row]]
    if not index:
        return Answer(scatter([], size), [""] * size)
    answer = ask(config, reward_name(config), source, select_rows(rows, index), models)
    reasons = [""] * size
    for row, reason in zip(index, answer.reasons, strict=True):
        reasons[row] = reason
    return Answer(scatter([(index, answer.output)], size), reasons)


def _transformed(config: RewardConfig, table: RewardTable, world: World | None) -> RewardTable:
    name = reward_name(config)
    valid = table.valid[name]
    for transform in config.transforms:
        scores = build_transform(transform).apply(table.scores[name], valid, table, world)
        scores = finite_or_fail(name, f"the transform {transform.name!r}", scores, valid, table.texts)
        table = table.with_scores(name, scores)
    return table


def _keep(config: RewardConfig, answer: Answer, table: RewardTable, completions: Sequence[Completion]) -> None:
    """Write one source's column into the completions, components as `name/component`."""
    name, output = reward_name(config), answer.output
    valid: list[bool] = output.valid.tolist()
    columns: dict[str, Tensor] = {f"{name}/{part}": values for part, values in output.components.items()}
    if config.transforms:
        columns[f"{name}/raw"] = output.score
    columns[name] = table.scores[name]
    for column, values in columns.items():
        for row, value in enumerate(values.tolist()):
            completions[row].scores[column] = Score(value=value, valid=valid[row])
    for row, completion in enumerate(completions):
        completion.scores[name].note = answer.reasons[row] or _note(output.info[row])
        if output.per_token is not None:
            completion.scores[name].per_token = output.per_token[row].tolist()[: len(completion.tokens)]


def _note(info: dict[str, Any]) -> str:
    return json.dumps(info, ensure_ascii=False, default=str)[:NOTE_LENGTH] if info else ""


def _dropped(sources: Sources, answers: Sequence[Answer], rows: RewardBatch) -> set[int]:
    """Numbers of the groups of which some row failed under a reward that drops them."""
    groups: list[int] = rows.group.tolist()
    return {
        groups[row]
        for (config, _), answer in zip(sources, answers, strict=True)
        if config.on_error == "drop_group"
        for row, reason in enumerate(answer.reasons)
        if reason
    }
