r"""Whether an answer in mathematics is right: `math_equal`.

A ladder, of which the first step that can read both sides decides: equal text, exact fractions, floating-point
numbers, and then what math-verify says (sets, intervals, symbols), in a process of its own that is killed when it takes
too long. The early steps come first because math-verify alone calls `50\%` equal to 50 and 1/3 equal to 0.333333; and
it is given nothing but the extracted answer, since it does not know `####` and reads a bare `(1, 2)` as no pair.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import ClassVar, Literal

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import EnvironmentProblem
from alignkit.core.registry import register
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.extras import need
from alignkit.rewards.functions import column_output
from alignkit.rewards.rules import after_thinking

Extract = Literal["auto", "boxed", "hash", "tag", "last_number"]

MAX_LENGTH = 300
"""Characters of an answer that are compared; a longer one is a text, and equal to itself alone."""
FLOAT_TOLERANCE = 1e-6
"""Relative difference up to which floating-point numbers are equal."""
START_SECONDS = 120.0
"""How long the process may take to import math-verify."""

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s?\\?%)?", re.ASCII
)
_COUNTED = re.compile(rf"\$?({_NUMBER.pattern})\s+(?!(?:mod|sqrt|times|over|and|or|pi)\b)[A-Za-z]{{2,}}", re.ASCII)


class MathEqualConfig(Config):
    """Keys of `math_equal`."""

    column: str = Field("answer", description="data column of the right answer, or of a solution that ends in it")
    extract: Extract = Field("auto", description="where the answer stands; auto tries all, in the order of this list")
    tolerance: float | None = Field(
        None, gt=0, description="relative difference of equal numbers; null = fractions exactly, others to 1e-6"
    )
    partial_format: float = Field(0.0, description="credit for an answer that is there and wrong")
    symbolic: bool = Field(True, description="ask math-verify about what is no plain number")
    timeout_s: float = Field(2.0, gt=0, description="seconds math-verify may take for one answer; later = not equal")


@register.reward("math_equal")
class MathEqual:
    """1 where the answer of a completion equals that of the data, else 0."""

    config_type: ClassVar[type[Config]] = MathEqualConfig

    def __init__(self, config: MathEqualConfig) -> None:
        self.config = config
        self.requires: tuple[str, ...] = (config.column,)
        if config.symbolic:
            need("math_verify", "math-verify", "math_equal")
        self._verifier = Verifier(config.timeout_s) if config.symbolic else None

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score a completion; not valid where the data has no answer."""
        del models
        known: dict[tuple[str, str], bool] = {}
        pairs = zip(rows.completions, rows.columns[self.config.column], strict=True)
        return column_output([None if gold is None else self._one(text, str(gold), known) for text, gold in pairs])

    def _one(self, text: str, gold: str, known: dict[tuple[str, str], bool]) -> float:
        answer = extract_answer(text, self.config.extract)
        if answer is None:
            return 0.0
        pair = (answer, right_answer(gold))
        if pair not in known:  # the completions of a prompt often agree
            symbolic = self._verifier.equal if self._verifier is not None else None
            known[pair] = math_equal(*pair, tolerance=self.config.tolerance, symbolic=symbolic)
        return 1.0 if known[pair] else self.config.partial_format


def extract_answer(text: str, how: Extract = "auto") -> str | None:
    r"""The last answer a text gives; None without any.

    In this order: the last `\boxed{…}`, what follows the last `####`, the last `<answer>…</answer>`, what follows the
    last "answer is", the last number. Of a text with a closing think tag only what stands behind it counts.
    """
    text = after_thinking(text)
    for name, finder in _FINDERS:
        found = finder(text) if how in ("auto", name) else None
        if found is not None and found.strip():
            return found.strip()
    return None


def right_answer(gold: str) -> str:
    r"""The answer of a data column: what it marks with `\boxed` or `####`, or all of it."""
    marked = _boxed(gold) or _after_hash(gold)
    return gold if marked is None else marked


def math_equal(
    left: str,
    right: str,
    *,
    tolerance: float | None = None,
    symbolic: Callable[[str, str], bool] | None = None,
) -> bool:
    """Whether two answers are the same. `symbolic` is asked about what is no plain number; None = not equal then."""
    left, right = normalise(left), normalise(right)
    if not left or not right:
        return False
    if left == right:
        return True
    if max(len(left), len(right)) > MAX_LENGTH:
        return False
    exact = as_fraction(left), as_fraction(right)
    if exact[0] is not None and exact[1] is not None and tolerance is None:
        return exact[0] == exact[1]
    numbers = as_float(left), as_float(right)
    if numbers[0] is not None and numbers[1] is not None:
        return math.isclose(numbers[0], numbers[1], rel_tol=FLOAT_TOLERANCE if tolerance is None else tolerance)
    return symbolic is not None and symbolic(left, right)


def normalise(text: str) -> str:
    """An answer without what does not change its value: dollar signs, spacing, units, thousands, a leading `x =`."""
    text = text.strip().replace("−", "-").replace("\\$", "").replace("$", "").replace("\\%", "%")
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]", "", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree|°", "", text)
    bare = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}", "", text)
    text = bare if bare.strip() else re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = text.strip().removesuffix(".").strip()
    text = re.sub(r"^[A-Za-z]\s*=\s*(?=.)", "", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s*([()\[\]{},+*/=^%-])\s*", r"\1", text).removeprefix("+")
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?", text):
        text = text.replace(",", "")
    return text


def as_fraction(text: str) -> Fraction | None:
    r"""A normalised integer, decimal, fraction, percentage or mixed number, exactly; None for anything else."""
    if text.endswith("%"):
        share = as_fraction(text[:-1])
        return None if share is None else share / 100
    if text.startswith("-"):
        positive = as_fraction(text[1:]) if text[1:2] != "-" else None
        return None if positive is None else -positive
    if re.fullmatch(_DECIMAL, text, re.ASCII):
        return Fraction(text)
    ratio = re.fullmatch(rf"({_DECIMAL})/(-?{_DECIMAL})", text, re.ASCII) or re.fullmatch(
        rf"\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}}", text, re.ASCII
    )
    ratio = ratio or re.fullmatch(r"\\frac ?(\d)(\d)", text, re.ASCII)
    if ratio:
        top, bottom = Fraction(ratio[1]), Fraction(ratio[2])
        return top / bottom if bottom else None
    mixed = re.fullmatch(r"(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))", text, re.ASCII)
    if mixed:
        top, bottom = Fraction(mixed[2] or mixed[4]), Fraction(mixed[3] or mixed[5])
        return int(mixed[1]) + top / bottom if bottom else None
    return None


def as_float(text: str) -> float | None:
    r"""A normalised number, also with an exponent (`1.5e3`, `1.5 \times 10^{3}`); None for anything else."""
    exact = as_fraction(text)
    if exact is not None:
        try:
            return float(exact)
        except OverflowError:
            return None
    scientific = re.fullmatch(
        rf"(-?{_DECIMAL})(?:[eE]([-+]?\d+)| ?(?:\\times|\\cdot|\*) ?10\^\{{?(-?\d+)\}}?)", text, re.ASCII
    )
    if scientific is None:
        return None
    number = float(f"{scientific[1]}e{scientific[2] or scientific[3]}")
    return number if math.isfinite(number) else None


def _boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{…}` whose braces close."""
    start = text.rfind("\\boxed")
    while start >= 0:
        opening = re.compile(r"\\boxed\s*\{").match(text, start)
        depth = 1
        for place in range(opening.end() if opening else len(text), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0 and opening:
                return text[opening.end() : place]
        start = text.rfind("\\boxed", 0, start)
    return None


def _after_hash(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0] if mark and rest.strip() else None


def _tagged(text: str) -> str | None:
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return str(found[-1]) if found else None


def _announced(text: str) -> str | None:
    """What follows the last "answer is", to the end of its sentence; of a number and words, the number."""
    starts = [found.end() for found in re.finditer("answer is", text, re.IGNORECASE)]
    if not starts:
        return None
    found = re.match(r"\s*:?\s*(.*?)(?:\.(?:\s|$)|\n|$)", text[starts[-1] :], re.DOTALL)
    counted = _COUNTED.match(found[1]) if found else None
    return counted[1] if counted else found[1] if found else None


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return str(found[-1]) if found else None


_FINDERS: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    ("boxed", _boxed),
    ("hash", _after_hash),
    ("tag", _tagged),
    ("announced", _announced),
    ("last_number", _last_number),
)


class Verifier:
    """math-verify in a process of its own: it hangs on some inputs, and stops itself by signals, which threads lack."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def equal(self, left: str, right: str) -> bool:
        """What math-verify says of two normalised answers; False where it cannot read one or takes too long.

        Raises:
            EnvironmentProblem: its process does not start.
        """
        with self._lock:
            process = self._running()
            try:
                _send(process, json.dumps([left, right]))
                answer = _line(process, self.timeout)
            except (
                OSError,
                TimeoutError,
            ):  # killed by its memory limit, or about to be by us: the next call has a new one
                _end(process)
                return False
        return answer == "true"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        command = [sys.executable, "-m", "alignkit.rewards.verifier"]
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": paths},
        )
        weakref.finalize(self, _end, process)
        try:
            _line(process, START_SECONDS)
        except OSError as error:
            _end(process)
            raise EnvironmentProblem(
                f"reward 'math_equal': math-verify does not start ({type(error).__name__}: {error}); "
                f"try `{' '.join(command)}`"
            ) from error
        self._process = process
        return process


def _send(process: subprocess.Popen[bytes], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text.encode() + b"\n")


def _line(process: subprocess.Popen[bytes], seconds: float) -> str:
    """The next line it writes. Raises TimeoutError, or another OSError where it has ended."""
    assert process.stdout is not None
    stream, deadline, found = process.stdout.fileno(), time.monotonic() + seconds, b""
    while not found.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no answer within {seconds:g} s")
        read = os.read(stream, 4096)
        if not read:
            raise OSError("it has ended")
        found += read
    return found.decode().strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
