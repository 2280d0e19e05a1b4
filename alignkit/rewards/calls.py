"""Asking a reward source: its deadline, further attempts, a checked answer, and what becomes of rows without one."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from alignkit.core.contracts import Models, RewardSource
from alignkit.core.errors import DataError, EnvironmentProblem, RecipeError, RunFailed
from alignkit.core.lazy import torch
from alignkit.core.types import RewardBatch, RewardOutput

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.rewards.config import RewardConfig

T = TypeVar("T")

MAX_PAUSE = 30.0
"""Seconds between two attempts, at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a source said of B rows; `reasons` [B] say why a row got no answer of its own, empty where it did."""

    output: RewardOutput
    reasons: list[str]


class _CallFailed(Exception):
    """The last attempt failed. `cause` is what it raised."""

    def __init__(self, cause: Exception, timed_out: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.timed_out = timed_out


def ask(config: RewardConfig, name: str, source: RewardSource, rows: RewardBatch, models: Models | None) -> Answer:
    """The source's scores of all rows, under the reward's `timeout`, `retries` and `on_error`.

    A call that failed for all rows is made again for one group at a time, so that one bad text costs one group; not
    after a timeout, where that would multiply the wait.

    Raises:
        RunFailed: with on_error fail, the last attempt raised, was late, or gave an unusable answer.
    """
    size = len(rows.completions)
    try:
        return Answer(_attempts(config, name, source, rows, models, config.retries), [""] * size)
    except _CallFailed as problem:
        if config.on_error == "fail":
            if isinstance(problem.cause, RunFailed):
                raise problem.cause from None
            raise _final(config, name, problem, rows) from problem.cause
        first = problem
    reasons = [""] * size
    parts: list[tuple[list[int], RewardOutput]] = []
    members = members_of_groups(rows)
    for index in members:
        failed = first
        if not first.timed_out and len(members) > 1:
            try:
                parts.append((index, _attempts(config, name, source, select_rows(rows, index), models, 0)))
                continue
            except _CallFailed as problem:
                failed = problem
        parts.append((index, _stand_in(config, len(index))))
        for row in index:
            reasons[row] = _reason(failed.cause)
    return Answer(scatter(parts, size), reasons)


def in_thread(work: Callable[[], T], seconds: float | None) -> T:
    """The result of `work` in a thread of its own. Raises TimeoutError after so many seconds, leaving it to itself."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # a daemon: a call that hangs must not keep the process from ending, as a pool's threads would
    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def members_of_groups(rows: RewardBatch) -> list[list[int]]:
    """The rows of each group, in the order in which groups first appear."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(rows.group.tolist()):
        members.setdefault(group, []).append(row)
    return list(members.values())


def select_rows(rows: RewardBatch, index: Sequence[int]) -> RewardBatch:
    """Some of the rows, in this order."""
    where = torch.tensor(list(index), dtype=torch.long)
    return RewardBatch(
        prompts=[rows.prompts[i] for i in index],
        completions=[rows.completions[i] for i in index],
        completion_ids=None if rows.completion_ids is None else rows.completion_ids[where],
        completion_mask=None if rows.completion_mask is None else rows.completion_mask[where],
        group=rows.group[where],
        columns={name: [values[i] for i in index] for name, values in rows.columns.items()},
        step=rows.step,
        ended=rows.ended[where],
        **{
            name: [values[i] for i in index] if (values := getattr(rows, name)) else []
            for name in ("plain", "prompt_ids", "ids", "given")
        },
    )


def scatter(parts: Sequence[tuple[Sequence[int], RewardOutput]], size: int) -> RewardOutput:
    """Answers about some rows each as one answer about all B; rows that nobody answered are not valid."""
    score, valid = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
    components: dict[str, Tensor] = {}
    per_token: Tensor | None = None
    info: list[dict[str, Any]] = [{} for _ in range(size)]
    for index, output in parts:
        where = torch.tensor(list(index), dtype=torch.long)
        score[where] = output.score.detach().float().cpu()
        valid[where] = output.valid.detach().bool().cpu()
        for name, values in output.components.items():
            components.setdefault(name, torch.zeros(size))[where] = values.detach().float().cpu()
        if output.per_token is not None:
            dense = output.per_token.detach().float().cpu()
            per_token = torch.zeros(size, dense.shape[1]) if per_token is None else per_token
            per_token[where] = dense
        for row, said in zip(index, output.info, strict=False):
            info[row] = said
    return RewardOutput(score, valid, per_token, components, info)


def check_output(name: str, output: RewardOutput, rows: RewardBatch) -> None:
    """Refuse an answer of another shape, or one that is not finite. Raises RunFailed with reward, row and text."""
    if not isinstance(output, RewardOutput):
        raise RunFailed(f"reward {name!r} answered a {type(output).__name__}; expected a RewardOutput")
    columns = {name: output.score, **{f"{name}/{part}": values for part, values in output.components.items()}}
    size = len(rows.completions)
    if output.per_token is not None:
        columns["per_token"] = output.per_token
    for column, values in {"valid": output.valid, **columns}.items():
        if values.shape[:1] != (size,) or values.ndim != (2 if column == "per_token" else 1):
            raise RunFailed(
                f"reward {name!r} answered {column!r} of shape {tuple(values.shape)} for {size} completions; expected "
                "one entry for each"
            )
    for column, values in columns.items():
        finite = values.isfinite().reshape(size, -1).all(1) if size else values.isfinite()
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0, 0])
            number = values[row] if values.ndim == 1 else values[row][~values[row].isfinite()][0]
            raise RunFailed(
                f"reward {name!r} answered {float(number)} in {column!r} for row {row} (completion "
                f"{rows.completions[row][:60]!r}); expected a finite number, and valid=False where it has none to give"
            )


def finite_or_fail(name: str, what: str, scores: Tensor, valid: Tensor, texts: Sequence[str]) -> Tensor:
    """The scores [B], 0 where they are not valid. Raises RunFailed where a valid one is not finite."""
    for row, (score, ok) in enumerate(zip(scores.tolist(), valid.tolist(), strict=True)):
        if ok and not math.isfinite(score):
            raise RunFailed(
                f"reward {name!r}: {what} made {score} of row {row} (completion {texts[row][:60]!r}); a reward must be "
                "finite"
            )
    return scores.where(valid, 0.0)


def _attempts(
    config: RewardConfig, name: str, source: RewardSource, rows: RewardBatch, models: Models | None, retries: int
) -> RewardOutput:
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(2.0 ** (attempt - 1), MAX_PAUSE))
        try:
            if config.timeout is None:
                output = source.score(rows, models)
            else:
                output = in_thread(lambda: source.score(rows, models), config.timeout)
            check_output(name, output, rows)
        except (RecipeError, DataError, EnvironmentProblem):
            raise  # another attempt cannot repair these, and no reward makes up for them
        except Exception as error:  # whatever somebody's function raises is a failed call
            failed = _CallFailed(error, config.timeout is not None and isinstance(error, TimeoutError))
        else:
            return output
    raise failed


def _final(config: RewardConfig, name: str, problem: _CallFailed, rows: RewardBatch) -> RunFailed:
    times = f" {config.retries + 1} times, at last" if config.retries else ""
    of = f"{len(rows.completions)} completions, the first {rows.completions[0][:60]!r}"
    if problem.timed_out:
        return RunFailed(
            f"reward {name!r} did not answer{times} within {config.timeout:g} s for {of}. Raise `timeout`, or say with "
            "`on_error` what a late answer is worth"
        )
    return RunFailed(
        f"reward {name!r} failed{times} with {_reason(problem.cause)}, for {of}. Mend it, or say with `retries` and "
        "`on_error` what a failure is worth"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _stand_in(config: RewardConfig, size: int) -> RewardOutput:
    given = config.on_error == "value"
    return RewardOutput(
        torch.full((size,), config.error_value if given else 0.0), torch.full((size,), given, dtype=torch.bool)
    )
