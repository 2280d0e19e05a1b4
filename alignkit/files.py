"""Which keys of a recipe name local files and folders, and which of those are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from alignkit.core.documents import Block, Items, Mistakes, Node, Scalar, is_null
from alignkit.core.reading import did_you_mean

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".txt")


def note_missing_files(root: Node, mistakes: Mistakes) -> None:
    """Notes every local file or folder that the tree of a recipe names and that is not there."""
    for key, scalar in _named(root):
        text = str(scalar.value)
        if (key.endswith("chat_template") or is_local(text)) and not Path(text).expanduser().exists():
            mistakes.add(scalar.place, key, _missing(Path(text)))


def _named(root: Node) -> Iterator[tuple[str, Scalar]]:
    """Dotted key and value of everything that may name a file."""
    for block in ("data", "eval.data", "drift.labels"):
        entries = _find(root, block)
        for i in range(len(entries.nodes) if isinstance(entries, Items) else 0):
            yield from _scalar(root, f"{block}.{i}.path")
    yield from _scalar(root, "model.name_or_path")
    yield from _scalar(root, "model.chat_template")
    models = _find(root, "models")
    for name in models.entries if isinstance(models, Block) else ():
        yield from (found for found in _scalar(root, f"models.{name}.from") if found[1].value != "policy")


def _scalar(root: Node, key: str) -> Iterator[tuple[str, Scalar]]:
    node = _find(root, key)
    if isinstance(node, Scalar) and not is_null(node):
        yield key, node


def _find(node: Node | None, key: str) -> Node | None:
    for part in key.split("."):
        if isinstance(node, Block):
            node = node.entries[part].node if part in node.entries else None
        elif isinstance(node, Items):
            node = node.nodes[int(part)] if part.isdecimal() and int(part) < len(node.nodes) else None
        else:
            return None
    return node


def is_local(path: str) -> bool:
    """Whether a data or model path means a file or folder here, rather than a hub id such as `owner/name`."""
    if path.startswith((".", "/", "~")) or path.endswith(_SUFFIXES) or path.count("/") > 1 or "\\" in path:
        return "://" not in path
    return Path(path).exists() or ("/" in path and Path(path).parent.is_dir())


def _missing(path: Path) -> str:
    """`missing file …`, with the nearest existing name in its folder."""
    folder = path.parent
    while not folder.exists():
        path, folder = folder, folder.parent
    hint = did_you_mean(path.name, (file.name for file in folder.iterdir())) if folder.is_dir() else ""
    where = "the current directory" if folder == Path() else str(folder)
    return f"missing file: there is no {path.name!r} in {where}; {hint or f'paths start from {os.getcwd()}'}"
