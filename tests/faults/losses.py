"""A loss that breaks on purpose."""

from typing import Any

from alignkit.core import Batch, Forward, Term
from alignkit.core.contracts import Metrics, Terms
from alignkit.ops import sequence_sum

CALLS_BEFORE = 4


class _Calls:
    number = 0


def infinite_later(out: Forward, batch: Batch, config: Any) -> tuple[Terms, Metrics]:
    """Raises the likelihood of every row; from the fifth micro-batch on it says infinity."""
    del config
    _Calls.number += 1
    value = -sequence_sum(out.logps, batch["mask"])
    if _Calls.number > CALLS_BEFORE:
        value = value + float("inf")
    return {"likelihood": Term(value, over="row")}, {}
