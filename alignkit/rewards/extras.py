"""Packages that only some rewards need: the extra `rewards` of the package."""

from __future__ import annotations

import importlib.util

from alignkit.core.errors import EnvironmentProblem


def need(module: str, package: str, reward: str) -> None:
    """Say which extra to install when a package is missing, before anything starts. Raises EnvironmentProblem."""
    if importlib.util.find_spec(module) is None:
        raise EnvironmentProblem(
            f"reward {reward!r} needs {package}, which is not installed here; install it with "
            "`pip install 'alignkit[rewards]'`"
        )
