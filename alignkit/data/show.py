"""Print groups as the model sees them: which tokens are prompt, trained or masked, and where a completion stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from alignkit.core.types import Completion, Group

STYLES = {"prompt": "dim", "trained": "green", "masked": "yellow", "stop": "bold red"}
STOP_MARK = "⏹"


def print_groups(
    groups: Sequence[Group], decode: Callable[[Sequence[int]], str], stop_ids: Collection[int], console: Console
) -> None:
    """Print every group: its prompt, then each completion under a label with reward and token count.

    `decode` must keep special tokens. Without colour the kinds are written out: `[prompt] … [trained] … [stop]`.
    """
    colour = console.color_system is not None and not console.no_color
    for group in groups:
        prompt = ["prompt"] * len(group.prompt)
        console.rule(Text(f"{group.id} · {len(group.prompt)} prompt tokens"), align="left")
        console.print(_paint(group.prompt, prompt, decode, colour))
        for number, completion in enumerate(group.completions):
            console.print(Text(f"── {_label(group, number)} · {len(completion.tokens)} tokens", style="bold"))
            console.print(_paint(completion.tokens, _kinds(completion, stop_ids), decode, colour))


def _label(group: Group, number: int) -> str:
    rewards = [completion.reward for completion in group.completions]
    if rewards == [1.0, 0.0]:
        return ("chosen", "rejected")[number]
    reward = "" if math.isnan(rewards[number]) else f", reward {rewards[number]:g}"
    return (f"completion {number + 1}" if len(rewards) > 1 else "completion") + reward


def _kinds(completion: Completion, stop_ids: Collection[int]) -> list[str]:
    """What each token is; a stop token that is not trained counts as masked, for nothing is learned of it."""
    trained = completion.trained or [True] * len(completion.tokens)
    return [
        ("stop" if token in stop_ids else "trained") if flag else "masked"
        for token, flag in zip(completion.tokens, trained, strict=True)
    ]


def _paint(tokens: Sequence[int], kinds: Sequence[str], decode: Callable[[Sequence[int]], str], colour: bool) -> Text:
    painted, start = Text(), 0
    for kind, run in groupby(kinds):
        end = start + len(list(run))
        # what the run adds to the text before it: decoding it alone would lose a leading space
        words = decode(tokens[:end])[len(decode(tokens[:start])) :] + (STOP_MARK if kind == "stop" else "")
        painted.append(words if colour else f"[{kind}] {words} ", style=STYLES[kind] if colour else "")
        start = end
    return painted
