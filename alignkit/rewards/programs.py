"""Whether a program that a model wrote passes its tests: `code_tests`. Each test is one limited process.

What the limits are worth is said in `sandbox.py`: run untrusted models in a container.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from alignkit.core.config import Config
from alignkit.core.contracts import Models
from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.core.registry import register
from alignkit.core.types import RewardBatch, RewardOutput
from alignkit.rewards.functions import column_output
from alignkit.rewards.rules import after_thinking

OUTPUT_BYTES = 64 * 1024
"""What a program may print, and how large a file it may write."""
MIB = 1 << 20
SANDBOX = Path(__file__).with_name("sandbox.py")
_BLOCK = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)```", re.DOTALL)


class CodeTestsConfig(Config):
    """Keys of `code_tests`."""

    allow_execution: bool = Field(False, description="run what the model wrote; without it nothing is scored")
    column: str = Field("tests", description="data column of a list of {input, output} or {assert}")
    entry_point: str | None = Field(
        None, description="data column of the function that tests call; null = input and output are standard streams"
    )
    scoring: Literal["fraction", "all"] = Field("fraction", description="share of tests passed, or 1 if all are")
    timeout_s: int = Field(5, ge=1, description="seconds of processor time of a test; twice that by the clock")
    memory_mib: int = Field(512, ge=64, description="MiB of memory of a test")
    workers: int = Field(4, ge=1, description="completions that are tested at the same time")


@register.reward("code_tests")
class CodeTests:
    """The share of tests that the last code block of a completion passes."""

    config_type: ClassVar[type[Config]] = CodeTestsConfig

    def __init__(self, config: CodeTestsConfig) -> None:
        if os.name != "posix":
            raise EnvironmentProblem(f"reward 'code_tests' limits processes as POSIX does, which {sys.platform} lacks")
        self.config = config
        self.requires: tuple[str, ...] = (config.column, *([config.entry_point] if config.entry_point else []))
        if not config.allow_execution:
            warnings.warn(
                "reward 'code_tests' scores nothing: running what a model wrote must be allowed by "
                "args.allow_execution: true",
                stacklevel=2,
            )

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput:
        """One score in 0 … 1 a completion; not valid without tests, and anywhere unless execution is allowed.

        Raises:
            RunFailed: the data's tests are no list of {input, output} or {assert}.
        """
        del models
        size = len(rows.completions)
        if not self.config.allow_execution:
            return column_output([None] * size)
        names = rows.columns[self.config.entry_point] if self.config.entry_point else [None] * size
        jobs = [
            (program_in(text), read_tests(tests, name, f"{self.config.column!r} of row {row}"))
            for row, (text, tests, name) in enumerate(
                zip(rows.completions, rows.columns[self.config.column], names, strict=True)
            )
        ]
        with ThreadPoolExecutor(self.config.workers) as pool:
            return column_output(list(pool.map(lambda job: self._score(*job), jobs)))

    def _score(self, program: str, tests: list[dict[str, Any]]) -> float | None:
        if not tests:
            return None
        memory = self.config.memory_mib * MIB
        results = (run_test(program, test, self.config.timeout_s, memory) for test in tests)
        return float(all(results)) if self.config.scoring == "all" else sum(results) / len(tests)


def program_in(text: str) -> str:
    """The last fenced code block behind the thinking, or all of it."""
    text = after_thinking(text)
    found = _BLOCK.findall(text)
    return str(found[-1]) if found else text


def read_tests(tests: Any, entry_point: Any, where: str) -> list[dict[str, Any]]:
    """Tests of the data as jobs of the sandbox: `assert`, or a call of `entry_point`, or standard streams.

    A list as `input` of a call is its arguments, a mapping its named ones, anything else its only one.

    Raises:
        RunFailed: they are neither.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            raise RunFailed(f"reward 'code_tests': column {where} is text that is no JSON: {tests[:60]!r}") from None
    jobs: list[dict[str, Any]] = []
    for test in tests or []:
        if isinstance(test, Mapping) and isinstance(test.get("assert"), str):
            jobs.append({"assert": test["assert"]})
        elif isinstance(test, Mapping) and "input" in test and "output" in test:
            given = test["input"]
            if entry_point is None:
                jobs.append({"stdin": str(given), "stdout": str(test["output"])})
            else:
                named = dict(given) if isinstance(given, Mapping) else {}
                positional = given if isinstance(given, list) else [] if named else [given]
                jobs.append(
                    {"entry_point": entry_point, "positional": positional, "named": named, "value": test["output"]}
                )
        else:
            raise RunFailed(
                f"reward 'code_tests': column {where} has the test {str(test)[:60]!r}; expected {{input, output}} or "
                "{assert}"
            )
    return jobs


def run_test(program: str, test: Mapping[str, Any], seconds: int, memory: int) -> bool:
    """Whether a program passes one test, in a process and a folder of its own that are gone afterwards."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="alignkit-code-") as name:
        folder = Path(name)
        hidden = {key: value for key, value in test.items() if key not in ("stdin", "stdout", "value")}
        limits = {"seconds": seconds, "memory": memory, "output": OUTPUT_BYTES}
        job = {"program": program, "word": word, **hidden, **limits}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (folder / "stdin").write_text(test.get("stdin", ""), encoding="utf-8", errors="replace")
        with (folder / "stdin").open("rb") as given, (folder / "stdout").open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(SANDBOX)],
                stdin=given,
                stdout=printed,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                status = process.wait(2 * seconds)
            except subprocess.TimeoutExpired:
                return False
            finally:
                _end(process)
        if "stdout" in test:
            output = (folder / "stdout").read_text(encoding="utf-8", errors="replace")
            return status == 0 and _lines(output) == _lines(test["stdout"])
        result = folder / "result"
        said, _, value = result.read_text(encoding="utf-8").partition("\n") if result.is_file() else ("", "", "")
        return said == word and ("value" not in test or bool(json.loads(value) == _plain(test["value"])))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process with all that it started, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _plain(value: Any) -> Any:
    """A value as it comes back through JSON: tuples are lists there."""
    return json.loads(json.dumps(value))
