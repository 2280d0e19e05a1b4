"""Names → objects, imported only when asked for.

Wherever a recipe names a component it may be a built-in, an entry point (`alignkit.algorithms`, `alignkit.rewards`, …)
or `"module:attribute"`. Built-ins are whatever the files of the kind's package register: there is no list to edit.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar, overload

from alignkit.core.errors import RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A registered component: `target` is the class or function, `preset` the defaults its name stands for."""

    name: str
    target: Any
    preset: Mapping[str, Any] = field(default_factory=dict)


def load_module(name: str) -> ModuleType:
    """The module of that dotted name; the current directory is importable. Raises RecipeError if there is none."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise RecipeError(
                f"there is no module {name!r}, neither installed nor importable from {os.getcwd()}; check the spelling"
            ) from None
        raise


def load_object(path: str) -> Any:
    """The object `"module:attribute"` names; the current directory is importable. Raises RecipeError."""
    module_name, _, attribute = path.partition(":")
    found: Any = load_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{path!r}: module {module_name!r} has no {part!r}.{hint}")
        found = getattr(found, part)
    return found


class Kind:
    """The components of one kind (algorithms, rewards, …) and the decorator that registers them."""

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._entries: dict[str, Entry] = {}
        self._discovered = False

    @overload
    def __call__(self, name: str, /, **preset: Any) -> Callable[[T], T]: ...
    @overload
    def __call__(self, name: T, /) -> T: ...
    def __call__(self, name: Any, /, **preset: Any) -> Any:
        """`@register.algorithm("ipo", loss_type="ipo")`; bare, the name is the module's. A preset sets defaults."""
        if not isinstance(name, str):
            return self(name.__module__.rsplit(".", 1)[-1])(name)

        def add(target: T) -> T:
            if not target.__module__.startswith(f"{self.package}."):
                self._discover()  # built-ins come first: who takes one of their names is told so, whenever it happens
            old = self._entries.get(name)
            new = Entry(name, target, preset)
            if old is not None and _origin(old.target) != _origin(target):
                raise RecipeError(
                    f"the {self.kind} name {name!r} is taken by {_origin(old.target)}; {_origin(target)} must choose "
                    "another: no name is shadowed silently"
                )
            self._entries[name] = new
            return target

        return add

    def names(self) -> list[str]:
        """All names this environment offers: built-in, registered by imports, entry points."""
        self._discover()
        return sorted({*self._entries, *self._entry_points()})

    def get(self, name: str) -> Entry:
        """The component of that name. Raises RecipeError with the nearest valid name."""
        if ":" in name:
            target = load_object(name)
            for entry in self._entries.values():
                if entry.target is target:
                    return Entry(name, target, entry.preset)
            return Entry(name, target)
        points = self._entry_points()
        if name not in self._entries:
            self._discover()
        if name in self._entries and name in points and points[name].value != _origin(self._entries[name].target):
            raise RecipeError(
                f"the {self.kind} name {name!r} is both registered ({_origin(self._entries[name].target)}) and an "
                f"entry point ({points[name].value}); rename one, or use 'module:attribute'"
            )
        if name in self._entries:
            return self._entries[name]
        if name in points:
            target = points[name].load()
            return self._entries.get(name, Entry(name, target))
        close = difflib.get_close_matches(name, self.names(), 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RecipeError(f"unknown {self.kind} {name!r}: {hint}known are {', '.join(self.names()) or 'none'}")

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self.group)}


def _origin(target: Any) -> str:
    return f"{target.__module__}:{target.__qualname__}"


class Register:
    """`register.algorithm`, `.reward`, `.transform`, `.operation`, `.guide`: decorators by which your code joins."""

    def __init__(self) -> None:
        self.algorithm = Kind("algorithm", "alignkit.algorithms", "alignkit.algorithms")
        self.reward = Kind("reward", "alignkit.rewards", "alignkit.rewards")
        self.transform = Kind("transform", "alignkit.rewards", "alignkit.transforms")
        self.operation = Kind("operation", "alignkit.data.operations", "alignkit.operations")
        self.guide = Kind("guide", "alignkit.rollout.guides", "alignkit.guides")


register = Register()
