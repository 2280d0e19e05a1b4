"""YAML as a tree that remembers where everything was written. Plain scalars stay text: only a schema can type them.

YAML 1.1 reads `1e-6` as text and `on` as true. So nothing is resolved here; `core.reading` does it, field by field.
Command-line overrides become part of the same tree, and every mistake found in it goes into one report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from alignkit.core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a document, counted from 1; line 0 stands for a document without lines, such as an override."""

    document: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.document}:{self.line}:{self.column}" if self.line else self.document


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value. `plain` = unquoted text whose type the schema decides; otherwise `value` is what it is."""

    place: Place
    value: Any
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Items:
    """A YAML sequence."""

    place: Place
    nodes: list[Node]


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of a block: where the key was written, and its value."""

    place: Place
    node: Node


@dataclass(frozen=True, slots=True)
class Block:
    """A YAML mapping; keys are text, whatever they look like."""

    place: Place
    entries: dict[str, Entry]


Node = Scalar | Items | Block


@dataclass(frozen=True, slots=True)
class Mistake:
    """One line of the report. `path` is the dotted key, empty for a mistake of the whole document."""

    place: Place
    path: str
    text: str

    def __str__(self) -> str:
        return "  ".join(part for part in (str(self.place), self.path, self.text) if part)


@dataclass(slots=True)
class Mistakes:
    """Collects what is wrong, so that all of it is told at once. `documents` is the order of the report."""

    found: list[Mistake] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)

    def open(self, document: str) -> None:
        """Give a document its turn in the report."""
        if document not in self.documents:
            self.documents.append(document)

    def add(self, place: Place, path: str, text: str) -> None:
        """Note a mistake; the same one twice counts once."""
        self.open(place.document)
        mistake = Mistake(place, path, text)
        if mistake not in self.found:
            self.found.append(mistake)

    def stop(self) -> NoReturn:
        """Raises RecipeError with every mistake, in the order of the documents."""
        order = {document: number for number, document in enumerate(self.documents)}
        lines = sorted(self.found, key=lambda m: (order[m.place.document], m.place.line, m.place.column))
        title = "1 mistake in the recipe:" if len(lines) == 1 else f"{len(lines)} mistakes in the recipe:"
        raise RecipeError("\n".join([title, *(f"  {line}" for line in lines)]))

    def stop_if_any(self) -> None:
        """Raises RecipeError if there is anything to tell."""
        if self.found:
            self.stop()


class _Loader(yaml.SafeLoader):
    """Composes without guessing types: every untagged scalar stays a string."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def parse(text: str, document: str, mistakes: Mistakes) -> Node:
    """The tree of one YAML document. Raises RecipeError, with all `mistakes` so far, when it is not YAML."""
    mistakes.open(document)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(document, mark.line + 1, mark.column + 1) if mark else Place(document)
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        mistakes.add(place, "", f"this is not YAML: {reason}")
        mistakes.stop()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Place(document, before.count("\n") + 1, len(before) - before.rfind("\n"))
        mistakes.add(place, "", f"this is not YAML: {error.reason} (character #x{ord(text[error.position]):04x})")
        mistakes.stop()
    if root is None:
        return Block(Place(document, 1, 1), {})
    return _convert(root, document, "", mistakes, frozenset())


def _convert(node: yaml.Node, document: str, path: str, mistakes: Mistakes, above: frozenset[int]) -> Node:
    place = Place(document, node.start_mark.line + 1, node.start_mark.column + 1)
    if id(node) in above:
        mistakes.add(place, path, "an alias that contains itself")
        mistakes.stop()
    if not node.tag.startswith("tag:yaml.org,2002:"):
        mistakes.add(
            place, path, f"the tag {node.tag!r} means nothing here; the schema decides the type, remove the tag"
        )
    above |= {id(node)}
    if isinstance(node, yaml.ScalarNode):
        return Scalar(place, node.value, plain=node.style is None)
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return Items(place, [_convert(item, document, join(path, i), mistakes, above) for i, item in items])
    entries: dict[str, Entry] = {}
    for key, value in node.value:
        key_place = Place(document, key.start_mark.line + 1, key.start_mark.column + 1)
        if not isinstance(key, yaml.ScalarNode):
            mistakes.add(key_place, path, "a key must be plain text, not a list or a mapping")
        elif key.value in entries:
            first = entries[key.value].place
            mistakes.add(key_place, join(path, key.value), f"the key is given twice; the first is in line {first.line}")
        else:
            entries[key.value] = Entry(key_place, _convert(value, document, join(path, key.value), mistakes, above))
    return Block(place, entries)


def join(path: str, key: str | int) -> str:
    """`a.b` and `c` → `a.b.c`."""
    return f"{path}.{key}" if path else str(key)


def from_python(value: Any, place: Place) -> Node:
    """Dicts and lists as a tree; anything else is a value that already has its type."""
    if isinstance(value, Mapping):
        return Block(place, {str(key): Entry(place, from_python(item, place)) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return Items(place, [from_python(item, place) for item in value])
    return Scalar(place, value)


def retyped(node: Node, value: Any) -> Node:
    """The same tree with the types that its scalars have in `value`, what was made of it; its places are kept."""
    if isinstance(node, Block) and isinstance(value, Mapping):
        return Block(
            node.place,
            {key: Entry(entry.place, retyped(entry.node, value[key])) for key, entry in node.entries.items()},
        )
    if isinstance(node, Items) and isinstance(value, list | tuple) and len(value) == len(node.nodes):
        return Items(node.place, [retyped(item, inner) for item, inner in zip(node.nodes, value, strict=True)])
    return from_python(value, node.place)


def merge(base: Node, top: Node) -> Node:
    """Mappings merge key by key, everything else is replaced by `top`."""
    if not (isinstance(base, Block) and isinstance(top, Block)):
        return top
    entries = dict(base.entries)
    for key, entry in top.entries.items():
        below = entries.get(key)
        entries[key] = Entry(entry.place, merge(below.node, entry.node)) if below else entry
    return Block(top.place, entries)


def apply_override(root: Node, text: str, mistakes: Mistakes) -> Node:
    """The tree with `a.b.0.c=value` set; an index one past the end appends, a null block on the way is created."""
    place = Place(f"override {text!r}")
    mistakes.open(place.document)
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        mistakes.add(place, "", "an override is written key=value or block.key=value, e.g. train.learning_rate=2e-6")
        return root
    return _set(root, keys, 0, _override_value(value.strip(), place, mistakes), mistakes)


def _override_value(value: str, place: Place, mistakes: Mistakes) -> Node:
    """Brackets, braces and quotes are YAML; any other text is taken as it stands, so `a: b` or `*x` need no quotes."""
    if not value.startswith(("[", "{", '"', "'")):
        return Scalar(place, value, plain=True)
    return _moved(parse(value, place.document, mistakes), place)


def _moved(node: Node, place: Place) -> Node:
    """The same tree at one place: columns inside an override's value would only puzzle."""
    if isinstance(node, Scalar):
        return Scalar(place, node.value, node.plain)
    if isinstance(node, Items):
        return Items(place, [_moved(item, place) for item in node.nodes])
    return Block(place, {key: Entry(place, _moved(entry.node, place)) for key, entry in node.entries.items()})


def _set(node: Node | None, keys: Sequence[str], depth: int, value: Node, mistakes: Mistakes) -> Node:
    if depth == len(keys):
        return value
    key, place, here = keys[depth], value.place, ".".join(keys[:depth])
    if node is None or (isinstance(node, Scalar) and is_null(node)):
        node = Items(place, []) if key.isdecimal() else Block(place, {})
    if isinstance(node, Block):
        below = node.entries.get(key)
        child = _set(below.node if below else None, keys, depth + 1, value, mistakes)
        last = depth + 1 == len(keys)
        return Block(node.place, {**node.entries, key: Entry(place if last or not below else below.place, child)})
    if isinstance(node, Items):
        if not key.isdecimal() or int(key) > len(node.nodes):
            count = len(node.nodes)
            known = f"has the entries 0 to {count - 1}" if count else "is empty"
            mistakes.add(
                place, ".".join(keys), f"`{here}` is a list and {known}; {here}.{count}=… appends, got {key!r}"
            )
            return node
        index = int(key)
        child = _set(node.nodes[index] if index < len(node.nodes) else None, keys, depth + 1, value, mistakes)
        return Items(node.place, [*node.nodes[:index], child, *node.nodes[index + 1 :]])
    mistakes.add(place, ".".join(keys), f"`{here}` is a single value ({node.value!r}) and has no key {key!r}")
    return node


NULLS = frozenset({"", "~", "null", "Null", "NULL"})


def is_null(scalar: Scalar) -> bool:
    """Whether it says null in any of the ways YAML and the command line know."""
    return scalar.value is None or (scalar.plain and scalar.value in NULLS | {"none", "None", "NONE"})
