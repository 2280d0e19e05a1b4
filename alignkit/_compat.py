"""The only module that imports trl, and only when a conversion is asked for: trl takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

Part = TypeVar("Part", bound=Sequence[Any])


def shared_prompt(chosen: Part, rejected: Part) -> tuple[Part, Part, Part]:
    """Split two transcripts (texts or message lists) into their common start and what is left of each.

    Both must be non-empty, differ, and begin alike. A space before the difference belongs to the completions; when one
    continues the other, its last character or message still counts as completion.
    """
    from trl.data_utils import extract_prompt

    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    return split["prompt"], split["chosen"], split["rejected"]
