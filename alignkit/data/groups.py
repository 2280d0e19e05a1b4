"""One data entry → groups ready for training, with an account of every row that was left out or changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from alignkit.core.types import Completion, Group, Message, Score
from alignkit.data.config import DataConfig
from alignkit.data.operations import Item, Operation, build_operation
from alignkit.data.render import Rendered, Renderer
from alignkit.data.report import DataReport
from alignkit.data.shapes import CONSUMED, BadRow, Example, Text, choose_format, to_example
from alignkit.data.sources import Table, id_column, read_rows

CHUNK = 512
"""Rows rendered at once: enough for the tokenizer to work in parallel, little enough to stay small in memory."""


def load_groups(
    config: DataConfig, renderer: Renderer, *, max_length: int, room: int = 0, given: bool = False
) -> tuple[list[Group], DataReport]:
    """Read, render and cut the rows of one data entry to `max_length` tokens of prompt + completion.

    With `room` so many tokens are left free behind prompts, and only those are taken unless answers are asked for too
    (`given`).

    Raises: DataError when the source or a column is missing, no row is usable, or `max_bad_fraction` is exceeded.
    """
    table = read_rows(config)
    name = choose_format(config.format, table.columns, config.path)
    report = DataReport(config.path, name, len(table.rows), layout=table.layout)
    groups: list[Group] = []
    for start in range(0, len(table.rows), CHUNK):
        span = range(start, min(start + CHUNK, len(table.rows)))
        groups += _chunk_groups(table, span, config, renderer, report, max_length, room, given)
    report.kept = len(groups)
    report.check_budget(config.max_bad_fraction)
    return groups, report


def label_pairs(groups: Sequence[Group]) -> list[Group]:
    """Every preference pair as two groups, its chosen answer labelled true and its rejected one false."""
    return [
        replace(
            group,
            id=f"{group.id}/{'chosen' if desirable else 'rejected'}",
            completions=[completion],
            fields={**group.fields, "label": desirable},
        )
        for group in groups
        for completion, desirable in zip(group.completions, (True, False), strict=True)
    ]


def _chunk_groups(
    table: Table,
    span: range,
    config: DataConfig,
    renderer: Renderer,
    report: DataReport,
    max_length: int,
    room: int,
    given: bool,
) -> list[Group]:
    """The groups of some rows; every other row is counted in `report`."""
    items: list[tuple[int, Item]] = []
    operations = [build_operation(operation) for operation in config.operations]
    for i in span:
        try:
            if i in table.faults:
                raise table.faults[i]
            made = operate(_item(table, i, config.path, to_example(table.rows[i], report.format)), operations)
        except BadRow as bad:
            report.drop(bad.reason, _where(table, i, bad.note))
            continue
        report.added += len(made) - 1
        items += [(i, _prompt_only(item) if room and not given else item) for item in made]
    groups = []
    for (i, item), rendered in zip(items, renderer.render([item.example for _, item in items]), strict=True):
        if isinstance(rendered, BadRow):
            report.drop(rendered.reason, _where(table, i, rendered.note))
            continue
        prompt = len(rendered.prompt)
        report.measure(prompt=prompt)
        if rendered.completions:
            longest = max(map(len, rendered.completions))
            report.measure(completion=longest, total=prompt + longest)
        try:
            changes = fit(rendered, renderer.bos_id, max_length, config.overlong, max(1, room))
        except BadRow as bad:
            report.drop(bad.reason, _where(table, i, bad.note))
            continue
        for change in changes:
            report.change(change, _where(table, i))
        groups.append(_group(item, rendered))
    return groups


def _item(table: Table, i: int, path: str, example: Example) -> Item:
    row = table.rows[i]
    column = id_column(row)
    name = str(row[column]) if column else f"{Path(path).name}:{table.numbers[i]}"
    return Item(name, example, {key: value for key, value in row.items() if key not in CONSUMED and key != column})


def _prompt_only(item: Item) -> Item:
    return replace(item, example=replace(item.example, completions=[], rewards=[], scores=[], steps=[]))


def operate(item: Item, operations: Sequence[Operation[Any]]) -> list[Item]:
    """What the operations, one after the other, make of a row. Raises BadRow where one of them has no use for it."""
    items = [item]
    for operation in operations:
        items = [made for one in items for made in operation.apply(one)]
    return items


def fit(
    rendered: Rendered, bos_id: int | None, max_length: int, overlong: Literal["drop", "cut"], room: int = 1
) -> list[str]:
    """Cut `rendered` in place to `max_length` tokens and return what was changed, as the report names it.

    The prompt gives way first, from the left, down to one token behind BOS and to `room` free tokens; completions share
    what is left of it.
    Raises: BadRow when the longest completion still does not fit and may not be cut, or nothing is left to learn from.
    """
    changes = ["boundary merged"] * rendered.boundary_merged + ["turn rewritten"] * (rendered.turns_rewritten > 0)
    prompt, longest = rendered.prompt, max(map(len, rendered.completions), default=1)
    front = int(prompt[0] == bos_id)
    keep = max(max_length - max(longest, room), min(front + 1, max_length - room))
    if len(prompt) > keep:
        rendered.prompt = [*prompt[:front], *prompt[len(prompt) - keep + front :]]
        changes.append("prompt cut")
    left = max_length - len(rendered.prompt)
    if longest > left:
        if overlong == "drop":
            raise BadRow("overlong", f"{len(prompt)} prompt and {longest} completion tokens, room for {max_length}")
        rendered.completions = [completion[:left] for completion in rendered.completions]
        rendered.trained = [flags and flags[:left] for flags in rendered.trained]
        changes.append("completion cut")
    if len(rendered.completions) > 1 and all(tokens == rendered.completions[0] for tokens in rendered.completions):
        raise BadRow("equal completions", "once they are rendered and cut")
    if any(flags is not None and not any(flags) for flags in rendered.trained):
        raise BadRow("empty completion", "no token of an assistant turn is left")
    return changes


def _group(item: Item, rendered: Rendered) -> Group:
    example, prompt = item.example, item.example.prompt
    return Group(
        id=item.id,
        messages=[Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt,
        prompt=rendered.prompt,
        completions=[
            Completion(
                text=_answer(text),
                tokens=tokens,
                trained=trained,
                scores={name: Score(value) for name, value in scores.items()},
                reward=reward,
                step_ends=rendered.step_ends,
            )
            for text, tokens, trained, scores, reward in zip(
                example.completions,
                rendered.completions,
                rendered.trained,
                example.scores,
                example.rewards,
                strict=True,
            )
        ],
        fields=item.fields,
        plain=isinstance(prompt, str),
    )


def _answer(completion: Text) -> str:
    """What the assistant said last."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""


def _where(table: Table, i: int, note: str = "") -> str:
    return f"{table.where(i)}: {note}" if note else table.where(i)
