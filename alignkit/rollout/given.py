"""The engine of offline recipes: groups arrive full, and it only checks that they are."""

from __future__ import annotations

from alignkit.core.errors import DataError
from alignkit.core.types import Group


class GivenCompletions:
    """A rollout somebody else made."""

    def fill(self, groups: list[Group], n: int) -> list[Group]:
        """The groups as they are. Raises DataError when one has fewer than `n` completions."""
        for group in groups:
            if len(group.completions) < n:
                raise DataError(
                    f"group {group.id!r} has {len(group.completions)} completions, the algorithm needs {n}, and an "
                    "offline recipe draws none"
                )
        return groups

    def sync(self, version: int) -> None:
        """Nothing is generated, so nothing is stale."""
        del version
