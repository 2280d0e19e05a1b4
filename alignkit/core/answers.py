"""The completions of a round as units of one row each, with what credit is given by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from alignkit.core.types import Completion, Group, Unit


def answer_units(
    groups: Sequence[Group],
    objectives: Sequence[str] = (),
    facts: Callable[[Group, Completion], Mapping[str, float]] | None = None,
) -> list[Unit]:
    """One unit a completion, in order, with the columns [N] `reward`, `group`, `ended` and `objective.<name>`.

    `reward` is nan where nothing scored the completion, and so is `objective.<name>` (the score of that reward alone).
    `group` numbers the groups of this rank from 0. `ended` is 1 unless a limit of length cut the completion off.
    `facts` are further columns.
    """
    units: list[Unit] = []
    for number, group in enumerate(groups):
        for completion in group.completions:
            scalar = {
                "reward": completion.reward,
                "group": float(number),
                "ended": float(completion.ended is not False),
                **{f"objective.{name}": _score(completion, name) for name in objectives},
                **(facts(group, completion) if facts is not None else {}),
            }
            units.append((group.row(completion, **scalar),))
    return units


def _score(completion: Completion, name: str) -> float:
    score = completion.scores[name]
    return score.value if score.valid else float("nan")
