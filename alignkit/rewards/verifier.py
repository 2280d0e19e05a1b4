"""The process in which math-verify runs: a line of two answers in, `true` or `false` out. Started by `maths.py`."""

from __future__ import annotations

import importlib
import json
import sys

MEMORY = 2 << 30
"""Bytes of address space: towers of powers end with an error instead of with the machine's memory."""


def main() -> None:
    """Answer until standard input ends."""
    import resource  # not at the top: a platform without it can still list the rewards there are

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    math_verify = importlib.import_module("math_verify")
    reading = [math_verify.LatexExtractionConfig()]  # the other one hands text to sympy's parser, which runs it
    print("ready", flush=True)
    for line in sys.stdin:
        sides = [
            math_verify.parse(f"${text}$", extraction_config=reading, parsing_timeout=None) for text in json.loads(line)
        ]
        # asked both ways round, because it treats the right answer and the given one differently
        same = all(sides) and any(
            math_verify.verify(gold, given, timeout_seconds=None) for gold, given in (sides, sides[::-1])
        )
        print("true" if same else "false", flush=True)


if __name__ == "__main__":
    main()
