"""Trees into configs: the schema types every plain scalar, and every mistake is noted with its place and a remedy."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from alignkit.core.config import Config
from alignkit.core.documents import NULLS, Block, Entry, Items, Mistakes, Node, Place, Scalar, is_null, join

ConfigT = TypeVar("ConfigT", bound=Config)

_FLOAT = re.compile(r"[-+]?(\.\d+|\d[\d_]*(\.\d*)?)([eE][-+]?\d+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WHOLE = re.compile(r"[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_BAD: Any = object()


class ConfigReader:
    """Reads nodes as configs, into one collection of mistakes.

    `choose` names the config type of a block whose declared type is only a base, with the defaults that its name stands
    for; None = a mistake it has noted. `advise` may know better than the nearest sibling what an unknown key meant.
    """

    def __init__(
        self,
        mistakes: Mistakes,
        choose: Callable[[type[Config], Block, str], tuple[type[Config], Mapping[str, Any]] | None],
        advise: Callable[[str, str], str | None],
    ) -> None:
        self.mistakes = mistakes
        self._choose = choose
        self._advise = advise

    def read(self, node: Node, config_type: type[ConfigT], path: str = "") -> ConfigT | None:
        """The config that `node` describes, or None with its mistakes noted."""
        value = self._value(node, config_type, path)
        if isinstance(value, config_type):
            return value
        if value is not _BAD:
            self.mistakes.add(node.place, path, wrong_type(node, config_type, ()))
        return None

    def read_field(self, root: Block, config_type: type[Config], name: str) -> Any:
        """One field of a block ahead of the others; its default when it is absent or wrong (which `read` will tell)."""
        info = config_type.model_fields[name]
        default = info.get_default(call_default_factory=True)
        if name not in root.entries:
            return default
        value = self._value(root.entries[name].node, info.annotation, name)
        try:
            checked = TypeAdapter[Any](info.rebuild_annotation()).validate_python(value, strict=True)
        except ValidationError:
            return default
        return checked

    def _value(self, node: Node, annotation: Any, path: str) -> Any:
        config_type = _config_in(annotation)
        if isinstance(node, Scalar) and node.plain:
            if config_type and node.value == "" and not _allows_none(annotation):
                node = Block(node.place, {})
            else:
                return type_scalar(node.value, annotation)
        if isinstance(node, Scalar):
            return node.value
        if isinstance(node, Items):
            container = tuple if any(get_origin(member) is tuple for member in _members(annotation)) else list
            inner = _argument(annotation, container, 0)
            values = [self._value(item, inner, join(path, i)) for i, item in enumerate(node.nodes)]
            return _BAD if any(value is _BAD for value in values) else container(values)
        if config_type:
            return self._config(node, config_type, path)
        inner = _argument(annotation, dict, 1)
        entries = {key: self._value(entry.node, inner, join(path, key)) for key, entry in node.entries.items()}
        return _BAD if any(value is _BAD for value in entries.values()) else entries

    def _config(self, block: Block, declared: type[Config], path: str) -> Any:
        chosen = self._choose(declared, block, path)
        if chosen is None:
            return _BAD
        config_type, preset = chosen
        fields = {info.alias or name: info for name, info in config_type.model_fields.items()}
        given: dict[str, Any] = {}
        unknown = False
        for key, entry in block.entries.items():
            if key in fields:
                given[key] = self._value(entry.node, fields[key].annotation, join(path, key))
            else:
                unknown = True
                self.mistakes.add(entry.place, join(path, key), self._unknown(path, key, fields))
        bad = {key for key, value in given.items() if value is _BAD}
        values = {**preset, **{key: value for key, value in given.items() if value is not _BAD}}
        try:
            config = config_type.model_validate(values, strict=True)
        except ValidationError as error:
            self._explain(error, block, fields, path, bad)
            return _BAD
        return _BAD if bad or unknown else config

    def _unknown(self, path: str, key: str, fields: Iterable[str]) -> str:
        advice = self._advise(path, key) or did_you_mean(key, fields)
        return f"unknown key; {advice or 'known are ' + ', '.join(fields)}"

    def _explain(
        self, error: ValidationError, block: Block, fields: Mapping[str, FieldInfo], path: str, bad: set[str]
    ) -> None:
        """Notes pydantic's findings in our words, one per place; those that follow from an earlier one are left out."""
        seen: set[tuple[Place, str]] = set()
        for item in error.errors(include_url=False):
            location = item["loc"]
            if (not location and bad) or (location and location[0] in bad):
                continue
            key = str(location[0]) if location else ""
            entry = block.entries.get(key, Entry(block.place, block))
            where, node, info = join(path, key) if key else path, entry.node, fields.get(key)
            for part in location[1:]:
                below = _child(node, part)
                if below is not None:
                    where, node = join(where, part), below
            if (node.place, where) in seen:
                continue
            seen.add((node.place, where))
            if item["type"] == "missing" and not isinstance(location[-1], int):  # else a list is too short
                about = f" ({info.description})" if info and info.description else ""
                text = f"missing key; it is required{about}"
            elif item["type"] in ("value_error", "assertion_error") or info is None:
                text = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            else:
                inner = _inner_annotation(info.annotation, where.removeprefix(join(path, key)))
                text = wrong_type(node, inner, info.metadata, info.description)
            self.mistakes.add(node.place, where, text)


def type_scalar(text: str, annotation: Any) -> Any:
    """A plain scalar as the type the schema wants; the text itself when it fits none, for the validation to refuse.

    A field that may be null reads `null`, `none`, `~` and nothing as None; `Any` follows YAML 1.2 and reads 1e-6.
    """
    members = _members(annotation)
    null = is_null(Scalar(Place(""), text, plain=True))
    if null and (type(None) in members or (text in NULLS and (Any in members or text == ""))):
        return None
    for member in members:
        if get_origin(member) is Literal:
            for choice in get_args(member):
                if text == str(choice):
                    return choice
    if bool in members and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if Any in members and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if (int in members or Any in members) and _WHOLE.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if {int, float, Any} & members and (_FLOAT.fullmatch(text) or _INFINITE.fullmatch(text)):
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if float in members or Any in members:
            return number
        return int(number) if number.is_integer() else number
    return text


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`did you mean 'learning_rate'?`, naming all that are equally near; empty when nothing is near."""
    near = nearest(word, names)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def nearest(word: str, names: Iterable[str]) -> list[str]:
    """The names reached by the fewest edits, at most a third of the word, or that the word begins; equal ones all."""
    distances = {name: edit_distance(word.lower(), name.lower()) for name in names}
    close = {name: cost for name, cost in distances.items() if cost <= max(1, len(word) // 3)}
    if not close:
        return [name for name in distances if len(word) > 2 and name.lower().startswith(word.lower())]
    best = min((cost, abs(len(name) - len(word))) for name, cost in close.items())
    return [name for name, cost in close.items() if (cost, abs(len(name) - len(word))) == best]


def edit_distance(left: str, right: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours between two words."""
    rows = [list(range(len(right) + 1))]
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def wrong_type(node: Node, annotation: Any, metadata: Iterable[Any], description: str | None = None) -> str:
    """`got 'fast', expected a number > 0 (step size)`."""
    about = f" ({description})" if description else ""
    return f"got {_got(node)}, expected {describe_type(annotation, metadata)}{about}"


def _got(node: Node) -> str:
    if isinstance(node, Block):
        return f"a mapping with {', '.join(node.entries)}" if node.entries else "an empty mapping"
    if isinstance(node, Items):
        return f"a list of {len(node.nodes)}"
    if node.value is None or (node.plain and node.value in NULLS):
        return "nothing (null)"
    if node.plain:
        return repr(node.value)
    return f"the text {node.value!r}" if isinstance(node.value, str) else repr(node.value)


_PLAIN_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Any: "anything",
    type(None): "null",
}


def describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in words, with its bounds: `a whole number ≥ 1 or null`."""
    kind = get_origin(annotation)
    if kind is Annotated:
        return describe_type(get_args(annotation)[0], metadata)
    if kind in (Union, types.UnionType):
        parts = [describe_type(a, () if a is type(None) else metadata) for a in get_args(annotation)]
        return " or ".join(parts)
    if kind is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    bounds = _bounds(metadata)
    if kind is list:
        return f"a list{bounds}, each entry {describe_type(get_args(annotation)[0])}"
    if kind is tuple:
        return f"a list of {len(get_args(annotation))}, each entry {describe_type(get_args(annotation)[0])}"
    if kind is dict:
        return f"a mapping of names to {describe_type(get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        keys = [info.alias or name for name, info in annotation.model_fields.items()]
        return f"a mapping with the keys {', '.join(keys)}" if keys else "an empty mapping {}"
    return _PLAIN_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation))) + bounds


def _bounds(metadata: Iterable[Any]) -> str:
    parts: list[str] = []
    for item in metadata:
        match item:
            case annotated_types.Gt(gt=low):
                parts.append(f"> {low}")
            case annotated_types.Ge(ge=low):
                parts.append(f"≥ {low}")
            case annotated_types.Lt(lt=high):
                parts.append(f"< {high}")
            case annotated_types.Le(le=high):
                parts.append(f"≤ {high}")
            case annotated_types.MinLen(min_length=count):
                parts.append(f"of at least {count}")
            case annotated_types.MaxLen(max_length=count):
                parts.append(f"of at most {count}")
    return " " + " and ".join(parts) if parts else ""


def _members(annotation: Any) -> set[Any]:
    """The alternatives of a union; a single type is its own only alternative."""
    kind = get_origin(annotation)
    if kind is Annotated:
        return _members(get_args(annotation)[0])
    if kind in (Union, types.UnionType):
        return {member for argument in get_args(annotation) for member in _members(argument)}
    return {annotation}


def _allows_none(annotation: Any) -> bool:
    return type(None) in _members(annotation)


def _config_in(annotation: Any) -> type[Config] | None:
    found = [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, Config)]
    return found[0] if found else None


def _argument(annotation: Any, container: type, index: int) -> Any:
    """What a list or mapping of this annotation holds; Any when it does not say."""
    for member in _members(annotation):
        if get_origin(member) is container:
            return get_args(member)[index]
    return Any


def _inner_annotation(annotation: Any, below: str) -> Any:
    """The annotation of an entry `.0` or `.name` below a field; the field's own when there is none below."""
    for part in below.strip(".").split(".") if below else ():
        annotation = _argument(annotation, list, 0) if part.isdecimal() else _argument(annotation, dict, 1)
    return annotation


def _child(node: Node, part: int | str) -> Node | None:
    if isinstance(node, Block):
        entry = node.entries.get(str(part))
        return entry.node if entry else None
    if isinstance(node, Items) and isinstance(part, int) and part < len(node.nodes):
        return node.nodes[part]
    return None
