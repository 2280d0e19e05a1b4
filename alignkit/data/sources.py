"""Files, folders and hub data sets → rows. JSON is read here, line by line; everything else through `datasets`."""

from __future__ import annotations

import difflib
import gzip
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from alignkit.core.errors import DataError
from alignkit.data.config import DataConfig
from alignkit.data.foreign import LAYOUTS, ROLES, detect_layout
from alignkit.data.shapes import BadRow

ID_COLUMNS = ("id", "_id", "index")
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
PACKED = (".gz", ".zst")

CATALOGUE = "dataset_info.json"
"""LLaMA-Factory's list of data sets; `datasets` writes a file of this name too, into folders it saves."""
CATALOGUE_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    **{column: column for column in ("history", "system", "tools", "chosen", "rejected", "kto_tag")},
}
"""Name of a column in the catalogue → the column of our layouts alpaca and sharegpt."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows as read: `numbers[i]` is where row i stands (1-based), in `word`s of the file.

    `layout`: the foreign layout they had, None when they came in a shape of ours. `faults`: why a row, by its place in
    `rows`, could not be brought into our shape; of such a row only its id is left.
    """

    rows: list[dict[str, Any]]
    numbers: list[int]
    word: str = "row"
    layout: str | None = None
    faults: Mapping[int, BadRow] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Every column that any row has, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def where(self, i: int) -> str:
        """Row i for a message: its line, and its id if it has one."""
        column = id_column(self.rows[i])
        return f"{self.word} {self.numbers[i]}" + (f" ({column} {self.rows[i][column]})" if column else "")


def id_column(row: Mapping[str, Any]) -> str | None:
    """The column that names the row."""
    return next((name for name in ID_COLUMNS if row.get(name) is not None), None)


def read_rows(config: DataConfig) -> Table:
    """The rows of one data entry with `split`, `limit` and `fields` applied, foreign layouts brought into our shapes.

    Raises: DataError when the source is missing, cannot be read, is empty, lacks a column that `fields` names, or when
    no row has the layout that is asked for.
    """
    path = Path(config.path).expanduser()
    if path.name == CATALOGUE and path.is_file():
        config = _from_catalogue(path, config)
        path = Path(config.path)
    if not path.exists():
        table = _from_hub(config)
    elif path.is_dir():
        table = _from_folder(path, config)
    else:
        table = _from_file(path, config)
    if config.limit is not None:
        table = Table(table.rows[: config.limit], table.numbers[: config.limit], table.word)
    if not table.rows:
        raise DataError(f"{config.path}: split {config.split!r} holds no rows")
    return in_our_shape(table, config)


def in_our_shape(table: Table, config: DataConfig) -> Table:
    """The rows with `fields` applied, and brought into a shape of ours from the layout `format` names or detects.

    Raises: DataError when a column that `fields` names is not there, or no row has that layout.
    """
    table = _map_fields(table, config)
    name = detect_layout(table.rows) if config.format == "auto" else config.format
    if name not in LAYOUTS:
        return table
    rows: list[dict[str, Any]] = []
    faults: dict[int, BadRow] = {}
    for i, row in enumerate(table.rows):
        try:
            rows.append(LAYOUTS[name].translate(row))
        except BadRow as bad:
            faults[i] = bad
            rows.append({column: row[column] for column in ID_COLUMNS if column in row})
    if len(faults) == len(rows):
        raise DataError(
            f"{config.path}: no row can be read as {name}. {table.where(0)}: {faults[0].note}. Columns there: "
            f"{', '.join(table.columns)}. Expected {LAYOUTS[name].expected}. Columns of other names are mapped in this "
            "data entry: `fields: {OURS: THEIRS}`."
        )
    return replace(table, rows=rows, layout=name, faults=faults)


def _from_catalogue(path: Path, config: DataConfig) -> DataConfig:
    """The data entry that a data set of LLaMA-Factory's catalogue stands for; `name` says which.

    Raises: DataError for an unknown name, and for what has no counterpart here: scripts, images, other roles.
    """
    catalogue = _json_object(path, "file", _parse_json(path, "file", path.read_bytes()))
    entry = catalogue.get(config.name or "")
    if not isinstance(entry, dict):
        near = difflib.get_close_matches(config.name or "", catalogue, 1, 0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"It lists {', '.join(list(catalogue)[:12]) or 'none'}."
        asked = "none is named" if config.name is None else f"there is no {config.name!r}"
        raise DataError(f"{path}: a list of data sets; say which with `name: DATASET` ({asked}). {hint}")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    unknown = [column for column in columns if column not in CATALOGUE_COLUMNS]
    odd = [f"{key}: {value}" for key, value in tags.items() if not _known_tag(key, value)]
    source = entry.get("file_name") or entry.get("hf_hub_url")
    if unknown or odd or not source or entry.get("script_url"):
        problem = ", ".join([*unknown, *odd]) or "it names no `file_name` or `hf_hub_url`"
        raise DataError(
            f"{path}: the description of {config.name!r} asks for what is not read here ({problem}). Name its file as "
            "`path` of this data entry, and map our columns to theirs: `fields: {prompt: THEIR_COLUMN}`."
        )
    fields = {CATALOGUE_COLUMNS[key]: theirs for key, theirs in columns.items() if theirs != CATALOGUE_COLUMNS[key]}
    local = path.parent / str(entry.get("file_name"))
    return config.model_copy(
        update={
            "path": str(local) if entry.get("file_name") else source,
            "name": entry.get("subset"),
            "format": entry.get("formatting", "alpaca") if config.format == "auto" else config.format,
            "fields": {**fields, **config.fields},
        }
    )


def _known_tag(key: str, value: str) -> bool:
    """Whether the reader of ShareGPT turns understands a tag without being told."""
    return value in (("from", "role") if key == "role_tag" else ("value", "content") if key == "content_tag" else ROLES)


def _map_fields(table: Table, config: DataConfig) -> Table:
    if not config.fields:
        return table
    constants = {ours: theirs[1:] for ours, theirs in config.fields.items() if theirs.startswith("=")}
    mapped = {ours: theirs for ours, theirs in config.fields.items() if ours not in constants}
    columns = table.columns
    for ours, theirs in mapped.items():
        if theirs not in columns:
            near = difflib.get_close_matches(theirs, columns, 1, 0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{config.path}: `fields: {{{ours}: {theirs}}}` names a column that is not there, from "
                f"{table.word} {table.numbers[0]} to {table.numbers[-1]}. Columns there: {', '.join(columns)}.{hint} "
                f"A constant is written with an equals sign: `{ours}: ={theirs}`."
            )
    moved = set(mapped.values())
    rows = [
        {column: value for column, value in row.items() if column not in moved}
        | {ours: row[theirs] for ours, theirs in mapped.items() if theirs in row}
        | constants
        for row in table.rows
    ]
    return replace(table, rows=rows)


def _kind(path: Path) -> str | None:
    """The extension that says how a file is read, compression aside; None when it is not one of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in BUILDERS else None


def _from_file(path: Path, config: DataConfig) -> Table:
    kind = _kind(path)
    if kind is None:
        raise DataError(
            f"{path}: unknown file type. Expected {', '.join(BUILDERS)}, each also with {' or '.join(PACKED)} behind."
        )
    name, start, stop = _slice(config.split)
    if name not in ("train", "all"):
        raise DataError(
            f"{path}: a single file has no split {name!r}, all its rows are 'train'. Leave `split` out, or name the "
            "folder that holds a file for each split."
        )
    if kind in (".jsonl", ".json") and path.suffix != ".zst":
        whole = (start, stop) == (None, None)
        table = _from_json(path, config.limit if whole else None)
    else:
        table = _through_datasets(str(path), BUILDERS[kind], data_files=str(path), split="train")
    total = len(table.rows)
    chosen = slice(_position(start, total), _position(stop, total))
    return Table(table.rows[chosen], table.numbers[chosen], table.word)


def _slice(split: str) -> tuple[str, str | None, str | None]:
    """`train[10%:200]` → ("train", "10%", "200")."""
    match = re.fullmatch(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split.strip())
    if match is None:
        raise DataError(f"split {split!r} is not understood. Expected a name with at most one slice: train[:10%]")
    return match[1], match[2], match[3]


def _position(bound: str | None, total: int) -> int | None:
    if bound is None:
        return None
    return round(total * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)


def _from_json(path: Path, limit: int | None) -> Table:
    """JSON lines, or one JSON list of objects. Raises DataError with the number of the line that cannot be read."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            head = file.peek(1024) if isinstance(file, gzip.GzipFile) else file.read(1024)
            file.seek(0)
            if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                return _json_list(path, file.read())
            rows = list(islice(_json_lines(path, file), limit))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return Table([row for _, row in rows], [number for number, _ in rows], "line")


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, _json_object(path, f"line {number}", _parse_json(path, f"line {number}", line))


def _json_list(path: Path, content: bytes) -> Table:
    items = _parse_json(path, "list", content)
    return Table(
        [_json_object(path, f"entry {i}", item) for i, item in enumerate(items, 1)],
        [*range(1, len(items) + 1)],
        "entry",
    )


def _parse_json(path: Path, where: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(
            f"{path}: {where} is not valid JSON ({error}). It begins {content[:60].decode(errors='replace')!r}. "
            "Expected one JSON object a line, or one list of objects."
        ) from None


def _json_object(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {where} is {type(value).__name__}, expected a JSON object with a row's columns")
    return value


def _from_folder(path: Path, config: DataConfig) -> Table:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved_dataset(path, config)
    if (path / CATALOGUE).exists():
        raise DataError(
            f"{path}: holds a list of data sets, {CATALOGUE}. Name it: `path: {path / CATALOGUE}`, `name: DATASET`."
        )
    if not any(_kind(file) for file in path.rglob("*") if file.is_file()):
        inside = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise DataError(f"{path}: no data files in this folder ({', '.join(BUILDERS)}); it holds {inside}")
    return _through_datasets(str(path), str(path), name=config.name, split=config.split)


def _saved_dataset(path: Path, config: DataConfig) -> Table:
    from datasets import DatasetDict, load_from_disk

    name, start, stop = _slice(config.split)
    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        if name not in found:
            raise DataError(f"{path}: no split {name!r}; splits there: {', '.join(found)}")
        found = found[name]
    first, last, _ = slice(_position(start, len(found)), _position(stop, len(found))).indices(len(found))
    rows = found.select(range(first, max(first, last))).to_list()
    return Table(rows, [*range(first + 1, first + 1 + len(rows))])


def _through_datasets(path: str, builder: str, **options: Any) -> Table:
    """Local files by a `datasets` builder, its cache thrown away: the rows are in memory then."""
    with tempfile.TemporaryDirectory(prefix="alignkit-data-") as cache:
        return _load(path, builder, cache_dir=cache, **options)


def _from_hub(config: DataConfig) -> Table:
    path = Path(config.path).expanduser()
    if _kind(path) or config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise DataError(f"{config.path}: there is no such file or folder.{_nearest(path)}")
    return _load(config.path, config.path, name=config.name, split=config.split)


def _nearest(path: Path) -> str:
    """What the deepest existing folder of `path` holds that is nearest to what was asked for."""
    missing, folder = path, path.parent
    while not folder.is_dir():
        missing, folder = folder, folder.parent
    near = difflib.get_close_matches(missing.name, [entry.name for entry in folder.iterdir()], 1, 0.5)
    if not near:
        return f" Folder {folder.resolve()} holds nothing of a like name."
    whole = folder / near[0] / path.relative_to(missing)
    return f" Did you mean {whole if whole.exists() else folder / near[0]}?"


def _load(path: str, builder: str, **options: Any) -> Table:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(builder, **options).to_list()
    except (DatasetNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{path}: neither a file or folder here, nor a hub data set that can be reached "
            f"({_first_line(error)}).{_nearest(Path(path))}"
        ) from None
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {_first_line(error.__cause__ or error)}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    return Table(rows, [*range(1, len(rows) + 1)])


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
