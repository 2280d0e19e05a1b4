"""The errors alignkit raises on purpose: one base, five children, each with the exit code the command line ends with.

A message says what is wrong, where, what was expected and what to do; it is written for the person who reads only it.
"""

from __future__ import annotations


class AlignkitError(Exception):
    """Base of every deliberate error. `exit_code` is what the command line returns."""

    exit_code = 1


class RecipeError(AlignkitError):
    """The recipe, an override or the command line is wrong. Nothing was started."""

    exit_code = 2


class DataError(AlignkitError):
    """A data file is missing, malformed, or holds too many unusable rows. Nothing was trained."""

    exit_code = 2


class EnvironmentProblem(AlignkitError):
    """The machine is at fault: a package that is not installed, a full disk, a wrong world size."""

    exit_code = 3


class RunFailed(AlignkitError):
    """The run stopped itself: non-finite loss, a step-0 truth that does not hold, a broken reward."""

    exit_code = 1


class Interrupted(AlignkitError):
    """Stopped by a signal after the checkpoint was written."""

    exit_code = 130
