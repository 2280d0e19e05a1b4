"""Rewrite a data file in one of our shapes; what the new shape cannot hold is counted and said."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from alignkit.core.errors import DataError, EnvironmentProblem
from alignkit.data.config import DataConfig
from alignkit.data.groups import operate
from alignkit.data.operations import Item, build_operation
from alignkit.data.report import Tally
from alignkit.data.shapes import CONSUMED, BadRow, Example, Text, choose_format, to_example
from alignkit.data.sources import Table, id_column, read_rows

Target = Literal["preference", "unpaired", "ranked", "prompt_completion"]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SOURCE = "source_row"
"""Column of rows that were one before: the id or line of that one, by which they can be put together again."""

LOST = {
    "unusable": "the row has not the shape it should have",
    "unjudged": "nothing says how good its answer is",
    "no preference": "its answers are equally good",
    "no partner": "there is no other answer to the same prompt to compare it with",
    "no threshold": "scores become labels with --threshold",
    "answers between": "the best and the worst of its answers became a pair, the others are left out",
    "worse answers": "the best of its answers is kept, the others are left out",
    "undesirable": "its answer is labelled false, nothing is to be imitated",
    "step labels": "the labels of its steps have no place in the new shape",
    "scores": "its scores have no place beside the objectives, or contradict the order, which is kept",
    "differing column": "rows were put together that differ in it",
    "other texts": "a column of text that its shape does not use",
}
"""What a conversion leaves out → why."""

SOURCES: dict[Target, tuple[str, ...]] = {
    "preference": ("preference", "ranked", "unpaired", "prompt_completion"),
    "ranked": ("preference", "ranked", "unpaired", "prompt_completion"),
    "unpaired": ("preference", "ranked", "unpaired", "prompt_completion"),
    "prompt_completion": (
        *("preference", "ranked", "unpaired", "prompt_completion"),
        *("messages", "text", "stepwise"),
    ),
}
"""Shape to write → shapes it can be made of."""

USED = {
    "preference": ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
    "ranked": ("prompt", "completions", "scores"),
    "unpaired": ("prompt", "completion", "label", "score"),
    "prompt_completion": ("prompt", "completion", "score"),
    "messages": ("messages",),
    "text": ("text",),
    "stepwise": ("prompt", "completions", "labels"),
    "prompt": ("prompt",),
}
"""Shape → columns that are read of it, besides `scores: {objective: …}`; every other one is copied."""


@dataclass(slots=True)
class Answered:
    """A row between two shapes: a prompt and its answers, the best first where rewards say so.

    `rewards` are nan where nobody judged; `fields` are the columns that are neither text nor scores.
    """

    where: str
    number: int
    prompt: Text
    answers: list[Text]
    rewards: list[float]
    scores: list[dict[str, float]]
    fields: dict[str, Any]


@dataclass(slots=True)
class Conversion:
    """The account of a conversion: rows read and written, and what was `lost`, by a key of `LOST`."""

    source: str
    shape: str
    target: str
    layout: str | None
    read: int
    written: int = 0
    lost: dict[str, Tally] = field(default_factory=dict)

    def lose(self, reason: str, where: str) -> None:
        """Count something that the new shape does not hold."""
        self.lost.setdefault(reason, Tally()).add(where)

    def lines(self) -> list[str]:
        """The account for a console."""
        layout = f" from {self.layout}" if self.layout else ""
        lines = [f"{self.source}: {self.read} rows as {self.shape}{layout} → {self.written} rows as {self.target}"]
        for reason, tally in self.lost.items():
            lines.append(f"  lost {tally.count:>6}  {reason}: {LOST[reason]}")
            lines.append(f"      {'; '.join(tally.examples)}{'; …' if tally.count > len(tally.examples) else ''}")
        return lines if self.lost else [*lines, "  nothing is lost"]

    def to_json(self) -> dict[str, Any]:
        """The account as plain numbers, strings and lists."""
        lost = {reason: {"count": tally.count, "examples": tally.examples} for reason, tally in self.lost.items()}
        return {
            "path": self.source,
            "format": self.shape,
            "layout": self.layout,
            "rows": self.read,
            "target": self.target,
            "written": self.written,
            "lost": lost,
        }


def convert(
    config: DataConfig,
    destination: Path,
    target: Target | None,
    *,
    overwrite: bool = False,
    threshold: float | None = None,
    watch: Callable[[Sequence[dict[str, Any]]], Iterable[dict[str, Any]]] = lambda rows: rows,
) -> Conversion:
    """Write the rows of a data entry to `destination` as `target`; None = in the shape they have, in our columns.

    Its operations are applied before, and what they make of a row is written.

    `threshold`: scores from which on an answer counts as desirable, for unpaired rows out of scored ones. `watch` sees
    the rows pass by as they are written.

    Raises: DataError when a threshold is given for another shape, the file type is not one of `SUFFIXES`, the file
    exists and may not be replaced, or no row of the target shape can be made; EnvironmentProblem when it cannot be
    written. A file that was there is as it was then, and nothing half-written is left behind.
    """
    suffix = _suffix(destination)
    if threshold is not None and target != "unpaired":
        raise DataError(
            f"a threshold makes labels, so that rows must become unpaired ones, not {target or 'what they are'}"
        )
    if destination.exists() and not overwrite:
        raise DataError(f"{destination}: exists already; name another file, or replace it with --overwrite")
    table = read_rows(config)
    shape = choose_format(config.format, table.columns, config.path)
    account = Conversion(config.path, shape, target or shape, table.layout, len(table.rows))
    if target is not None and shape not in SOURCES[target]:
        raise DataError(
            f"{config.path}: {shape} rows cannot become {target} rows, they do not say which answers are good. "
            f"Expected {', '.join(SOURCES[target])} rows."
        )
    rows: list[dict[str, Any]]
    if not config.operations and threshold is None and (target is None or (target == shape and shape != "preference")):
        rows = [table.rows[i] for i, _ in _examples(table, shape, account)]
    else:
        answered = list(_answered(table, config, account))
        account.target = target or _shape_made(answered, shape, config.path)
        rows = list(_MAKE[account.target](answered, account, threshold))
    if not rows:
        raise DataError("\n".join([f"{config.path}: no {account.target} row can be made", *account.lines()[1:]]))
    account.written = len(rows)
    _write(watch(rows), rows, destination, suffix)
    return account


def _examples(table: Table, shape: str, account: Conversion) -> Iterator[tuple[int, Example]]:
    """The usable rows, with their place in the table."""
    for i, row in enumerate(table.rows):
        try:
            if i in table.faults:
                raise table.faults[i]
            yield i, to_example(row, shape)
        except BadRow as bad:
            account.lose("unusable", _why(table.where(i), bad))


def _why(where: str, bad: BadRow) -> str:
    return f"{where}: {bad.reason}{f', {bad.note}' if bad.note else ''}"


def _answered(table: Table, config: DataConfig, account: Conversion) -> Iterator[Answered]:
    """The usable rows after the operations, each with its answers and the columns that travel along."""
    shape, operations = account.shape, [build_operation(operation) for operation in config.operations]
    for i, example in _examples(table, shape, account):
        row, where = table.rows[i], table.where(i)
        used = {*USED[shape], *(["scores"] if isinstance(row.get("scores"), dict) else [])}
        for name in row:
            if name in CONSUMED and name not in used and row[name] is not None:
                account.lose("other texts", f"{where}: {name}")
        if shape == "stepwise":
            account.lose("step labels", where)
        column = id_column(row)
        name = str(row[column]) if column else f"{Path(config.path).name}:{table.numbers[i]}"
        fields = {key: value for key, value in row.items() if key not in CONSUMED and key != column}
        try:
            items = operate(Item(name, example, fields), operations)
        except BadRow as bad:
            account.lose("unusable", _why(where, bad))
            continue
        for item in items:
            ids = {column or "id": item.id} if item.id != name else {column: row[column]} if column else {}
            kept = {key: value for key, value in item.fields.items() if key not in used}
            made = item.example
            answered = Answered(
                where, table.numbers[i], made.prompt, made.completions, made.rewards, made.scores, {**ids, **kept}
            )
            _best_first(answered)
            yield answered


def _shape_made(rows: Sequence[Answered], shape: str, path: str) -> str:
    """The shape to write when none is asked for: pairs where operations made pairs, else the one they had."""
    if rows and all(row.rewards == [1.0, 0.0] for row in rows):
        return "preference"
    if shape in _MAKE:
        return shape
    raise DataError(f"{path}: say in which shape {shape} rows are written: --to {', '.join(SOURCES)}")


def _best_first(row: Answered) -> None:
    """Order the answers by reward, equal ones by score, then as they came; as they are where nobody judged."""
    if any(map(math.isnan, row.rewards)):
        return
    order = sorted(range(len(row.answers)), key=lambda i: (-row.rewards[i], -row.scores[i].get("score", 0.0)))
    row.answers = [row.answers[i] for i in order]
    row.rewards = [row.rewards[i] for i in order]
    row.scores = [row.scores[i] for i in order]


def _together(rows: Sequence[Answered], account: Conversion) -> Iterator[Answered]:
    """Rows of several answers: single answers of one source row, else of one prompt, are put together."""
    groups: dict[str, list[Answered]] = {}
    for place, row in enumerate(rows):
        if len(row.answers) > 1:
            key: Any = {"row": place}
        elif math.isnan(row.rewards[0]):
            account.lose("unjudged", row.where)
            continue
        else:
            key = [row.fields[SOURCE]] if SOURCE in row.fields else row.prompt
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(row)
    for group in groups.values():
        row = group[0] if len(group) == 1 else _joined(group, account)
        if len(row.answers) > 1:
            yield row
        else:
            account.lose("no partner", row.where)


def _joined(group: Sequence[Answered], account: Conversion) -> Answered:
    """Rows of one answer as one row, with the columns that they agree on."""
    first, fields = group[0], {}
    name_of_id = id_column(first.fields)
    for name in dict.fromkeys(name for row in group for name in row.fields):
        values = [row.fields.get(name) for row in group]
        if name == name_of_id and SOURCE in first.fields:
            fields[name] = first.fields[SOURCE]
        elif all(value == values[0] for value in values):
            fields[name] = values[0]
        else:
            account.lose("differing column", f"{first.where}: {name}")
    fields.pop(SOURCE, None)
    joined = Answered(
        first.where,
        first.number,
        first.prompt,
        [answer for row in group for answer in row.answers],
        [reward for row in group for reward in row.rewards],
        [scores for row in group for scores in row.scores],
        fields,
    )
    _best_first(joined)
    return joined


def _preference(rows: Sequence[Answered], account: Conversion, threshold: float | None) -> Iterator[dict[str, Any]]:
    del threshold
    for row in _together(rows, account):
        if row.rewards[0] == row.rewards[-1] or row.answers[0] == row.answers[-1]:
            account.lose("no preference", row.where)
            continue
        if len(row.answers) > 2:
            account.lose("answers between", f"{row.where}: {len(row.answers) - 2}")
        best, worst = row.scores[0], row.scores[-1]
        scores = {
            name: judged["score"]
            for name, judged in (("score_chosen", best), ("score_rejected", worst))
            if "score" in judged
        }
        pair = {"prompt": row.prompt, "chosen": row.answers[0], "rejected": row.answers[-1]}
        yield {**_name(row), **pair, **scores, **_objectives([best, worst]), **_rest(row)}


def _ranked(rows: Sequence[Answered], account: Conversion, threshold: float | None) -> Iterator[dict[str, Any]]:
    del threshold
    for row in _together(rows, account):
        scores: dict[str, Any] = _objectives(row.scores)
        judged = [found["score"] for found in row.scores if "score" in found]
        if len(judged) == len(row.answers) and not scores and _agree(row.rewards, judged):
            scores = {"scores": judged}
        else:
            if judged:
                account.lose("scores", row.where)
            if not scores and len(set(row.rewards)) < len(row.rewards):
                scores = {"scores": row.rewards}  # order alone would call equal answers better and worse
        yield {**_name(row), "prompt": row.prompt, "completions": row.answers, **scores, **_rest(row)}


def _agree(rewards: Sequence[float], scores: Sequence[float]) -> bool:
    """Whether scores order answers as rewards do; both begin with the best one."""
    return all(
        scores[i] > scores[i + 1] or (rewards[i] == rewards[i + 1] and scores[i] == scores[i + 1])
        for i in range(len(scores) - 1)
    )


def _unpaired(rows: Sequence[Answered], account: Conversion, threshold: float | None) -> Iterator[dict[str, Any]]:
    for row in rows:
        several = len(row.answers) > 1
        if threshold is not None and all("score" in scores for scores in row.scores):
            labels = [scores["score"] >= threshold for scores in row.scores]
        elif account.shape == "unpaired":
            labels = [row.rewards[0] > 0]
        elif several and row.rewards[0] == row.rewards[-1]:
            account.lose("no preference", row.where)
            continue
        elif len(row.answers) == 2:
            labels = [True, False]
        elif math.isnan(row.rewards[0]):
            account.lose("unjudged", row.where)
            continue
        else:
            account.lose("no threshold", row.where)
            continue
        source = row.fields.get(id_column(row.fields) or "", row.number) if several else row.fields.get(SOURCE)
        for number, (answer, label, scores) in enumerate(zip(row.answers, labels, row.scores, strict=True), 1):
            sibling = str(number) if len(row.answers) != 2 else ("chosen", "rejected")[number - 1]
            yield {
                **_name(row, sibling if several else ""),
                **({} if source is None else {SOURCE: source}),
                "prompt": row.prompt,
                "completion": answer,
                "label": label,
                **_score(scores),
                **_objectives([scores]),
                **_rest(row),
            }


def _prompt_completion(
    rows: Sequence[Answered], account: Conversion, threshold: float | None
) -> Iterator[dict[str, Any]]:
    del threshold
    for row in rows:
        if account.shape == "unpaired" and row.rewards == [0.0]:
            account.lose("undesirable", row.where)
            continue
        if len(row.answers) > 1:
            account.lose("worse answers", f"{row.where}: {len(row.answers) - 1}")
        answered = {"prompt": row.prompt, "completion": row.answers[0]}
        yield {**_name(row), **answered, **_score(row.scores[0]), **_objectives(row.scores[:1]), **_rest(row)}


def _prompt(rows: Sequence[Answered], account: Conversion, threshold: float | None) -> Iterator[dict[str, Any]]:
    del account, threshold
    for row in rows:
        yield {**_name(row), "prompt": row.prompt, **_rest(row)}


_MAKE: dict[str, Callable[[Sequence[Answered], Conversion, float | None], Iterator[dict[str, Any]]]] = {
    "preference": _preference,
    "ranked": _ranked,
    "unpaired": _unpaired,
    "prompt_completion": _prompt_completion,
    "prompt": _prompt,
}
"""Shape → what writes rows in it; `prompt` only what operations make of prompts."""


def _name(row: Answered, sibling: str = "") -> dict[str, Any]:
    """The id of the row, with the name of one of its answers behind it."""
    column = id_column(row.fields)
    if column is None:
        return {}
    return {column: f"{row.fields[column]}/{sibling}" if sibling else row.fields[column]}


def _rest(row: Answered) -> dict[str, Any]:
    column = id_column(row.fields)
    return {name: value for name, value in row.fields.items() if name not in (column, SOURCE)}


def _score(scores: Mapping[str, float]) -> dict[str, float]:
    return {"score": scores["score"]} if "score" in scores else {}


def _objectives(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The `scores` column of answers judged by objectives, null where one was not judged; none without objectives."""
    names = dict.fromkeys(name for found in scores for name in found if name != "score")
    return {"scores": {name: [found.get(name) for found in scores] for name in names}} if names else {}


def _suffix(destination: Path) -> str:
    suffix = next((suffix for suffix in SUFFIXES if destination.name.endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"{destination}: unknown file type to write. Expected {', '.join(SUFFIXES)}")
    if not destination.parent.is_dir():
        raise DataError(f"{destination}: there is no folder {destination.parent} to write into")
    return suffix


def _write(watched: Iterable[dict[str, Any]], rows: Sequence[dict[str, Any]], destination: Path, suffix: str) -> None:
    with _replacing(destination) as part:
        if suffix == ".parquet":
            _write_parquet(watched, rows, part)
            return
        with part.open("wb") as raw:
            if suffix.endswith(".gz"):
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                    _write_json(watched, cast(IO[bytes], packed), as_list=suffix == ".json.gz")
            else:
                _write_json(watched, raw, as_list=suffix == ".json")


def _write_json(rows: Iterable[dict[str, Any]], file: IO[bytes], *, as_list: bool) -> None:
    """One row a line; as one list, with a comma between."""
    file.write(b"[\n" if as_list else b"")
    for number, row in enumerate(rows):
        file.write(b",\n" if as_list and number else b"")
        file.write(json.dumps(row, ensure_ascii=False).encode() + (b"" if as_list else b"\n"))
    file.write(b"\n]\n" if as_list else b"")


def _write_parquet(watched: Iterable[dict[str, Any]], rows: Sequence[dict[str, Any]], part: Path) -> None:
    import datasets

    columns = dict.fromkeys(name for row in rows for name in row)
    whole = [{name: row.get(name) for name in columns} for row in watched]
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_list(whole).to_parquet(str(part))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"the rows cannot be written as parquet, which wants one type a column: {str(error).splitlines()[0]}. "
            "Write .jsonl instead."
        ) from None
    finally:
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _replacing(destination: Path) -> Iterator[Path]:
    """A file beside `destination` that takes its place once it is whole, and goes away when that fails."""
    part = destination.with_name(f".{destination.name}.part")
    try:
        yield part
        os.replace(part, destination)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {destination}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
