"""Which shape rows have, and how a row of each becomes an `Example`: a prompt with rewarded completions."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from alignkit._compat import shared_prompt
from alignkit.core.errors import DataError
from alignkit.core.types import Message

Text = str | list[Message]
"""What a prompt or completion column holds: a plain string, or chat messages."""

HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"

STEP_SEPARATOR = "\n\n"
"""What stands between the steps of a stepwise answer."""

SHAPES: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "stepwise": ("prompt", "completions", "labels"),
    "ranked": ("prompt", "completions"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""Format → columns it cannot do without; `detect_format` takes the first that a data set has.

Rows of other projects' layouts have been turned into one of these before (`foreign.LAYOUTS`).
"""

CONSUMED = frozenset({"prompt", "chosen", "rejected", "completion", "completions", "messages", "text"})
"""Columns that become tokens; every other one reaches `Group.fields`."""


class BadRow(Exception):
    """A row that cannot be used: `reason` is its line in the report, `note` the detail."""

    def __init__(self, reason: str, note: str = "") -> None:
        super().__init__(reason, note)
        self.reason, self.note = reason, note


@dataclass(slots=True)
class Example:
    """A row before rendering. Prompt and completions are all strings or all message lists.

    `rewards` and `scores` are as long as `completions`; `scores` holds what judges said of each, by name: `score`, or
    the objectives of the row. `steps` are the parts of the only completion of a stepwise row.
    """

    prompt: Text
    completions: list[Text] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    tools: list[Any] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)


def choose_format(asked: str, columns: Collection[str], path: str) -> str:
    """The format of rows with `columns`: the one asked for when it is one of ours, else the one detected.

    Raises: DataError when the columns do not fit.
    """
    name = asked if asked in SHAPES else detect_format(columns, path)
    check_columns(name, columns, path)
    return name


def detect_format(columns: Collection[str], path: str) -> str:
    """The format whose columns are all there. Raises DataError that names the nearest one and what it lacks."""
    for name, needed in SHAPES.items():
        if set(needed) <= set(columns):
            if name == "prompt":
                _check_no_broken_answers(columns, path)
            return name
    nearest = max(SHAPES, key=lambda name: (_likeness(name, columns), len(SHAPES[name])))
    if _likeness(nearest, columns) == 0:
        known = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in SHAPES.items())
        raise DataError(
            f"{path}: no known format has these columns: {', '.join(columns) or 'none'}. Known formats: {known}. "
            "Map our columns to theirs in this data entry: `fields: {OURS: THEIRS}`."
        )
    raise _column_error(nearest, columns, path, "no known format has these columns")


def _check_no_broken_answers(columns: Collection[str], path: str) -> None:
    """Refuse to read rows as bare prompts when a column is nearly one that holds answers."""
    for name in ("preference", "prompt_completion", "ranked"):
        answers = [column for column in SHAPES[name] if column != "prompt"]
        if any(difflib.get_close_matches(column, columns, 1, 0.85) for column in answers):
            problem = "rows look like half a format; if they are bare prompts, say so with `format: prompt`"
            raise _column_error(name, columns, path, problem)
    for answer in ("response", "output"):
        if answer in columns:
            raise DataError(
                f"{path}: rows look like prompts with an answer in {answer!r}. If it is one, say so in this data "
                f"entry: `fields: {{completion: {answer}}}`; if they are bare prompts, `format: prompt`."
            )


def check_columns(name: str, columns: Collection[str], path: str) -> None:
    """Raises DataError unless a data set with `columns` can be read as format `name`."""
    if _missing(name, columns):
        raise _column_error(name, columns, path, f"`format: {name}` needs columns that are not there")


def _missing(name: str, columns: Collection[str]) -> list[str]:
    return [column for column in SHAPES[name] if column not in columns]


def _likeness(name: str, columns: Collection[str]) -> float:
    """Share of the needed columns that are there, by that name or one much like it; 0 to 1."""
    return sum(bool(_like(needed, columns)) for needed in SHAPES[name]) / len(SHAPES[name])


def _like(column: str, columns: Collection[str]) -> str | None:
    """The column whose name is most like `column`, capitals aside."""
    lower = {found.lower(): found for found in columns}
    near = difflib.get_close_matches(column, list(lower), 1, 0.75)
    return lower[near[0]] if near else None


def _column_error(name: str, columns: Collection[str], path: str, problem: str) -> DataError:
    missing = _missing(name, columns)
    free = [column for column in columns if column not in SHAPES[name]]
    near = {column: found for column in missing if (found := _like(column, free))}
    hints = [f"{column} (did you mean {near[column]!r}?)" if column in near else column for column in missing]
    mapping = ", ".join(f"{column}: {near.get(column, 'THEIR_COLUMN')}" for column in missing)
    return DataError(
        f"{path}: {problem}. Columns there: {', '.join(columns) or 'none'}. "
        f"Nearest format: {name} ({', '.join(SHAPES[name])}); missing: {', '.join(hints)}. "
        f"If the columns have other names, map ours to theirs in this data entry: `fields: {{{mapping}}}`."
    )


def to_example(row: Mapping[str, Any], name: str) -> Example:
    """Convert a row of format `name`. Raises BadRow."""
    match name:
        case "preference":
            example = _preference(row)
        case "ranked":
            example = _ranked(row)
        case "stepwise":
            example = _stepwise(row)
        case "unpaired" | "prompt_completion":
            example = _single(row, name)
        case "messages":
            example = _conversation(row)
        case "text":
            example = Example("", [_string(row, "text")], [math.nan], [{}])
        case _:
            example = Example(_text(row, "prompt"))
    if isinstance(example.prompt, list) and not example.prompt:
        raise BadRow("malformed", "the prompt has no messages")
    example.completions = [_end_with_assistant(completion) for completion in example.completions]
    _check_completions(example.completions)
    example.tools, example.template_options = _tools(row), _template_options(row)
    return example


def _preference(row: Mapping[str, Any]) -> Example:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    _check_completions([chosen, rejected])
    prompt = _text(row, "prompt") if row.get("prompt") is not None else None
    if prompt is None or (isinstance(prompt, str) and _whole_conversations([chosen, rejected])):
        prompt, completions = _implicit_prompt(chosen, rejected)
    else:
        prompt, completions = _align(prompt, [chosen, rejected])
    scores = _objectives(row, 2)
    for column, found in zip(("score_chosen", "score_rejected"), scores, strict=True):
        if (score := _number(row, column)) is not None:
            found["score"] = score
    return Example(prompt, completions, [1.0, 0.0], scores)


def _ranked(row: Mapping[str, Any]) -> Example:
    answers = _answers(row)
    prompt, completions = _align(_text(row, "prompt"), [as_text(answer, "completions") for answer in answers])
    scores = row.get("scores")
    if scores is None:
        return Example(prompt, completions, [-float(rank) for rank in range(len(answers))], [{} for _ in answers])
    if isinstance(scores, dict):
        judged = _objectives(row, len(answers))
        if not all(judged):
            raise BadRow(
                "malformed", f"`scores` says nothing of completion {[bool(x) for x in judged].index(False) + 1}"
            )
        return Example(prompt, completions, [sum(found.values()) / len(found) for found in judged], judged)
    if not isinstance(scores, list) or len(scores) != len(answers) or not all(is_number(x) for x in scores):
        raise BadRow("malformed", f"`scores` is not a list of {len(answers)} numbers, one for each completion")
    values = [float(score) for score in scores]
    return Example(prompt, completions, values, [{"score": value} for value in values])


def _single(row: Mapping[str, Any], name: str) -> Example:
    """One answer: its reward is its label, else its `score`, else unknown."""
    prompt, completions = _align(_text(row, "prompt"), [_text(row, "completion")])
    [scores], score = _objectives(row, 1), _number(row, "score")
    if score is not None:
        scores["score"] = score
    reward = float(_label(row)) if name == "unpaired" else scores.get("score", math.nan)
    return Example(prompt, completions, [reward], [scores])


def _stepwise(row: Mapping[str, Any]) -> Example:
    """The steps as one answer. Its reward is unknown: labels are about steps."""
    steps = [step.strip() if isinstance(step, str) else "" for step in _answers(row)]
    if not all(steps):
        raise BadRow("malformed", f"step {steps.index('') + 1} of `completions` is not text, or empty")
    _check_labels(row)
    prompt, completions = _align(_text(row, "prompt"), [STEP_SEPARATOR.join(steps)])
    return Example(prompt, completions, [math.nan], [{}], steps=steps)


def _check_labels(row: Mapping[str, Any]) -> None:
    """Raises BadRow unless every step has a label that is true, false or a number."""
    steps, labels = _answers(row), require(row, "labels")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise BadRow("malformed", f"`labels` is not a list of {len(steps)}, one for each step of `completions`")
    if not all(isinstance(label, bool) or is_number(label) for label in labels):
        raise BadRow("malformed", "`labels` holds something else than true, false and numbers")


def _answers(row: Mapping[str, Any]) -> list[Any]:
    answers = require(row, "completions")
    if not isinstance(answers, list) or not answers:
        raise BadRow("malformed", f"`completions` is {type(answers).__name__}, expected a list of answers")
    return answers


def _objectives(row: Mapping[str, Any], count: int) -> list[dict[str, float]]:
    """`scores: {objective: [one number, or null, for each of `count` completions]}`, completion by completion."""
    found: list[dict[str, float]] = [{} for _ in range(count)]
    scores = row.get("scores")
    if not isinstance(scores, dict):
        return found
    for objective, values in scores.items():
        if values is None:
            continue  # columnar files give every row the keys of all rows
        if not isinstance(values, list) or len(values) != count:
            raise BadRow("malformed", f"`scores.{objective}` is not a list of {count}, one for each completion")
        for judged, value in zip(found, values, strict=True):
            if value is not None and not is_number(value):
                raise BadRow("malformed", f"`scores.{objective}` holds {value!r}, expected numbers or null")
            if value is not None:
                judged[objective] = float(value)
    return found


def _conversation(row: Mapping[str, Any]) -> Example:
    """Prompt: everything before the first assistant turn; completion: the rest."""
    messages = _text(row, "messages")
    if isinstance(messages, str):
        raise BadRow("malformed", "`messages` is a string, expected a list of {role, content}")
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise BadRow("empty completion", "no assistant turn")
    return Example(messages[:first], [messages[first:]], [math.nan], [{}])


def _implicit_prompt(chosen: Text, rejected: Text) -> tuple[Text, list[Text]]:
    """The common start of two transcripts, cut back to where an assistant begins to speak."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("malformed", "one of `chosen` and `rejected` is a string, the other a list of messages")
    if chosen[0] != rejected[0]:
        raise BadRow("malformed", "`chosen` and `rejected` share no prompt, and there is no `prompt` column value")
    prompt, _, _ = shared_prompt(chosen, rejected)
    length = len(prompt)
    if isinstance(prompt, str) and HUMAN_MARK in prompt and ASSISTANT_MARK in prompt:
        length = prompt.rindex(ASSISTANT_MARK) + len(ASSISTANT_MARK)
    elif isinstance(prompt, list):
        while length and prompt[length - 1]["role"] == "assistant":
            length -= 1
    return chosen[:length], [chosen[length:], rejected[length:]]


def _align(prompt: Text, completions: list[Text]) -> tuple[Text, list[Text]]:
    """Make prompt and completions all strings or all messages, the prompt not repeated in the completions."""
    if isinstance(prompt, str):
        if all(isinstance(completion, str) for completion in completions):
            return prompt, completions
        prompt = [Message(role="user", content=prompt)]
    turns: list[list[Message]] = [
        [Message(role="assistant", content=completion)] if isinstance(completion, str) else completion
        for completion in completions
    ]
    if prompt and all(turn[: len(prompt)] == prompt for turn in turns):
        turns = [turn[len(prompt) :] for turn in turns]
    return prompt, [*turns]


def _whole_conversations(completions: Sequence[Text]) -> bool:
    return all(not isinstance(turns, str) and turns[0]["role"] != "assistant" for turns in completions)


def _end_with_assistant(completion: Text) -> Text:
    """Without what follows the last assistant turn: nothing after it is trained, and no stop token belongs there."""
    if isinstance(completion, str):
        return completion
    last = max((i for i, message in enumerate(completion) if message["role"] == "assistant"), default=-1)
    return completion[: last + 1]


def _check_completions(completions: Sequence[Text]) -> None:
    """Raises BadRow for an empty completion, and for several that are all the same."""
    for completion in completions:
        empty = not completion.strip() if isinstance(completion, str) else not any(map(_says_something, completion))
        if empty:
            raise BadRow("empty completion")
    if len(completions) > 1 and all(completion == completions[0] for completion in completions):
        raise BadRow("equal completions")


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return message["role"] == "assistant" and bool((content and content.strip()) or message.get("tool_calls"))


def require(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column. Raises BadRow when there is none."""
    if row.get(column) is None:
        raise BadRow("missing value", f"no `{column}`")
    return row[column]


def _string(row: Mapping[str, Any], column: str) -> str:
    value = require(row, column)
    if not isinstance(value, str):
        raise BadRow("malformed", f"`{column}` is {type(value).__name__}, expected text")
    if not value.strip():
        raise BadRow("empty completion", f"`{column}` is empty")
    return value


def _text(row: Mapping[str, Any], column: str) -> Text:
    return as_text(require(row, column), column)


def as_text(value: Any, column: str) -> Text:
    """A plain string or chat messages, null entries left out. Raises BadRow that names `column`."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRow("malformed", f"`{column}` is {type(value).__name__}, expected text or a list of {{role, content}}")
    return [_message(message, column) for message in value]


def _message(value: dict[str, Any], column: str) -> Message:
    """The message without the null entries that columnar files add to it."""
    content = value.get("content")
    if not isinstance(value.get("role"), str):
        raise BadRow("malformed", f"a message of `{column}` has no role; its keys are {', '.join(value) or 'none'}")
    if not isinstance(content, str) and not (content is None and value.get("tool_calls")):
        raise BadRow("malformed", f"the content of a {value['role']} message of `{column}` is not text")
    return cast(Message, {key: part for key, part in value.items() if part is not None or key == "content"})


def _label(row: Mapping[str, Any]) -> bool:
    label = require(row, "label")
    if label not in (True, False):
        raise BadRow("malformed", f"`label` is {label!r}, expected true or false")
    return bool(label)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if not is_number(value):
        raise BadRow("malformed", f"`{column}` is {value!r}, expected a number")
    return float(value)


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRow("malformed", "`tools` is not valid JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRow("malformed", f"`tools` is {type(tools).__name__}, expected a list of schemas or its JSON")
    return tools


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRow("malformed", f"`chat_template_kwargs` is {type(options).__name__}, expected a mapping")
    return {key: value for key, value in options.items() if value is not None}
