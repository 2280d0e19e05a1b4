"""What a recipe will do, said before it runs: files, columns and batch arithmetic, without torch, weights or tokens."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from alignkit.core.contracts import Needs
from alignkit.core.documents import Mistakes
from alignkit.core.errors import DataError
from alignkit.core.reading import did_you_mean
from alignkit.data.config import DataConfig
from alignkit.data.shapes import SHAPES, check_columns, detect_format
from alignkit.data.sources import read_rows
from alignkit.recipe import Recipe, check_paths, departures, find_algorithm

PEEKED_ROWS = 64
COUNTED_BYTES = 256 * 2**20
"""Files larger than this are not counted: `check` answers at once."""
LAYOUTS = {
    "auto": "rows packed without padding, a shared prompt once, as far as the model can; the run says how it went",
    "padded": "padded rows and whole logits, for every model",
    "packed": "rows packed without padding; refused where the model cannot",
    "prefix_shared": "rows packed without padding, a shared prompt once; refused where the model cannot",
}
"""`model.layout` in words."""


def check(recipe: Recipe) -> list[str]:
    """What the recipe will do, as lines to print.

    Raises: RecipeError with every file that is missing, or every data entry whose columns do not fit.
    """
    check_paths(recipe)
    needs = find_algorithm(recipe.algorithm.name).target.needs
    mistakes = Mistakes()
    mistakes.open(recipe.origin.root.place.document)
    entries = {f"data.{i}": entry for i, entry in enumerate(recipe.data)}
    entries |= {f"eval.data.{i}": entry for i, entry in enumerate(recipe.eval.data)}
    lines = [f"recipe      {recipe.algorithm.name} on {recipe.model.name_or_path}, into {recipe.output_dir}"]
    lines.append(f"departures  {', '.join(departures(recipe))}")
    _check_model(recipe, mistakes)
    for key, entry in entries.items():
        try:
            lines.append(f"{key:<11} {_describe_data(entry, needs, recipe.algorithm.name)}")
        except DataError as error:
            mistakes.add(recipe.origin.place(f"{key}.path"), key, str(error))
    mistakes.stop_if_any()
    if not recipe.eval.data:
        lines.append("eval        no held-out data: nothing is evaluated")
    return [*lines, *_batch_lines(recipe, needs)]


def _check_model(recipe: Recipe, mistakes: Mistakes) -> None:
    folder = Path(recipe.model.name_or_path)
    if not folder.exists():
        return
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        place = recipe.origin.place("model.name_or_path")
        text = (
            f"{folder} holds no config.json or adapter_config.json; expected a folder that transformers or peft wrote"
        )
        mistakes.add(place, "model.name_or_path", text)


def _describe_data(entry: DataConfig, needs: Needs, algorithm: str) -> str:
    """One line on a data entry. Raises DataError when its columns do not fit the format or the algorithm."""
    columns = _columns(entry)
    if columns is None:
        where = "is looked for on the hub" if not Path(entry.path).exists() else "is not looked into before the run"
        return f"{entry.path}: unchecked, {where}"
    shape = detect_format(columns, entry.path) if entry.format == "auto" else entry.format
    check_columns(shape, columns, entry.path)
    if (needs.preferences or needs.completions > 1) and shape not in ("preference", "ranked"):
        wanted = " or ".join(", ".join(SHAPES[name]) for name in ("preference", "ranked"))
        raise DataError(
            f"{entry.path}: {algorithm} learns from preference or ranked rows; these are {shape!r} rows with the "
            f"columns {', '.join(columns)}. Expected {wanted}."
        )
    for column in sorted(needs.fields - set(columns)):
        raise DataError(
            f"{entry.path}: {algorithm} needs the column {column!r}, there are {', '.join(columns)}. "
            f"`fields: {{{column}: THEIR_COLUMN}}` maps it."
        )
    rows = count_rows(entry)
    return f"{entry.path}: {'' if rows is None else f'{rows} rows, '}{shape} (columns {', '.join(columns)})"


def _columns(entry: DataConfig) -> list[str] | None:
    """The columns of the first rows, `fields` applied; None where looking would need more than this file can do."""
    path = Path(entry.path)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if not path.is_file() or not suffixes or path.suffix == ".zst":
        return None
    if suffixes[-1] in (".jsonl", ".json"):
        return read_rows(entry.model_copy(update={"limit": min(entry.limit or PEEKED_ROWS, PEEKED_ROWS)})).columns
    if suffixes[-1] == ".csv":
        return _mapped(_csv_header(path), entry)
    return None


def _csv_header(path: Path) -> list[str]:
    return next(csv.reader(line.decode("utf-8-sig", errors="replace") for line in _lines(path)), [])


def _mapped(columns: list[str], entry: DataConfig) -> list[str]:
    theirs = [name for name in entry.fields.values() if not name.startswith("=")]
    for name in theirs:
        if name not in columns:
            raise DataError(
                f"{entry.path}: `fields` names the column {name!r}, there are {', '.join(columns)}. "
                f"{did_you_mean(name, columns).capitalize()}".rstrip()
            )
    return [*(name for name in columns if name not in theirs), *entry.fields]


def count_rows(entry: DataConfig) -> int | None:
    """Rows of a JSON-lines file after `limit`; None where counting is not cheap or `split` takes a slice."""
    path = Path(entry.path)
    if not path.is_file() or path.suffixes[-1:] == [".zst"] or ".jsonl" not in path.suffixes or "[" in entry.split:
        return None
    if path.stat().st_size > COUNTED_BYTES:
        return None
    count = sum(1 for line in _lines(path) if line.strip())
    return min(count, entry.limit or count)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _batch_lines(recipe: Recipe, needs: Needs) -> Iterator[str]:
    """The arithmetic from groups to updates, spelled out."""
    train, ranks, rows = recipe.train, int(os.environ.get("WORLD_SIZE", "1")), needs.completions
    unit = "unit" if rows == 1 else f"unit of {rows} rows"
    share, rest = divmod(train.batch_size, ranks)
    spread = f"{share}" if not rest else f"{share} or {share + 1}"
    process = "the only process" if ranks == 1 else f"each of {ranks} processes"
    yield f"update      {train.batch_size} × {unit} an optimizer step; {spread} on {process}"
    fitting = max(1, train.micro_batch_tokens // (train.max_length * rows))
    fitting = min(fitting, train.micro_batch_size or fitting)
    most = ceil(-(-train.batch_size // ranks) / fitting)
    forwards = "1 forward" if most == 1 else f"1 to {most} forwards"
    yield f"layout      {recipe.model.layout}: {LAYOUTS[recipe.model.layout]}"
    yield (
        f"forward     {train.micro_batch_tokens} tokens as laid out hold {fitting} × {unit} at max_length "
        f"{train.max_length}; {forwards} a step"
    )
    if train.max_length * rows > train.micro_batch_tokens:
        yield f"            a {unit} is never cut: one at max_length takes up to {train.max_length * rows} tokens"
    yield f"length      {_length(recipe)}"


def _length(recipe: Recipe) -> str:
    train = recipe.train
    counts = [count_rows(entry) for entry in recipe.data]
    known = [count for count in counts if count is not None]
    if train.max_steps is not None:
        return f"{train.max_steps} steps (max_steps)"
    if len(known) < len(counts):
        return f"{train.num_epochs:g} epochs; the number of rows is known once the data is read"
    groups = sum(max(1, round(count * entry.weight)) for count, entry in zip(known, recipe.data, strict=True))
    per_epoch = ceil(groups / train.batch_size)
    steps = max(1, round(train.num_epochs * per_epoch)) * train.epochs_per_round
    last = groups % train.batch_size
    short = f", the last with {last}" if last else ""
    repeated = f" × {train.epochs_per_round} a round" if train.epochs_per_round > 1 else ""
    return (
        f"{groups} groups an epoch → {per_epoch} steps{short}; × {train.num_epochs:g} epochs{repeated} = "
        f"{steps} steps, if no row is dropped"
    )
