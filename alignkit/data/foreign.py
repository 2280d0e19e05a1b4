"""Row layouts of other projects → the shapes of `shapes.py`, column by column; what a layout does not use is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data.shapes import ASSISTANT_MARK, HUMAN_MARK, BadRow, is_number, require

Row = Mapping[str, Any]

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Who speaks in a ShareGPT turn → our role."""

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
FEEDBACK = ("pairwise_feedback", "binary_feedback", "scalar_feedback")


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout of rows. `columns` are those it cannot do without, `expected` is a row in words, for messages.

    `fits` looks at the first row where columns alone do not tell. `translate` raises BadRow.
    """

    columns: tuple[str, ...]
    expected: str
    translate: Callable[[Row], dict[str, Any]]
    fits: Callable[[Row], bool]


def detect_layout(rows: Sequence[Row]) -> str | None:
    """The first layout that the rows have, by their columns and the first row that fills them; None = none of them."""
    columns = {column for row in rows for column in row}
    for name, layout in LAYOUTS.items():
        if not columns.issuperset(layout.columns):
            continue
        filled = (row for row in rows if all(row.get(column) is not None for column in layout.columns))
        first = next(filled, None)
        if first is not None and layout.fits(first):
            return name
    return None


def _without(row: Row, *columns: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in columns}


def _sharegpt(row: Row) -> dict[str, Any]:
    turns = _turns(require(row, "conversations"), "conversations")
    if isinstance(row.get("system"), str) and row["system"] and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": row["system"]}, *turns]
    rest = _without(row, "conversations", "system", "chosen", "rejected", "kto_tag")
    if row.get("chosen") is not None or row.get("rejected") is not None:
        answers = {side: _answer(require(row, side), side) for side in ("chosen", "rejected")}
        return {"prompt": turns, **answers, **rest}
    if label := _verdict(row):
        return {"prompt": turns[:-1], "completion": turns[-1:], **rest, **label}
    return {"messages": turns, **rest}


def _turns(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRow("malformed", f"`{column}` is {type(value).__name__}, expected a list of {{from, value}}")
    return [_turn(turn, column) for turn in value]


def _turn(turn: Any, column: str) -> dict[str, Any]:
    """One {from, value} or {role, content} as a message; a function call becomes one of `tool_calls`."""
    if not isinstance(turn, dict):
        raise BadRow("malformed", f"a turn of `{column}` is {type(turn).__name__}, expected {{from, value}}")
    speaker = turn.get("from") or turn.get("role")
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if speaker not in ROLES:
        raise BadRow("malformed", f"`{column}` has a turn from {speaker!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRow("malformed", f"the {speaker} turn of `{column}` has no text in `value`")
    if speaker != "function_call":
        return {"role": ROLES[speaker], "content": content}
    try:
        call = json.loads(content)
    except ValueError:
        raise BadRow("malformed", f"the function_call turn of `{column}` is not valid JSON") from None
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}


def _answer(value: Any, column: str) -> Any:
    """An answer given as text, as one turn or as a list of turns."""
    if isinstance(value, str):
        return value
    return _turns([value] if isinstance(value, dict) else value, column)


def _verdict(row: Row) -> dict[str, bool]:
    """The `label` of unpaired feedback; a `label` that is not true or false is a column like others."""
    tag = row.get("kto_tag")
    if tag is None:
        return {"label": row["label"]} if isinstance(row.get("label"), bool) else {}
    if tag not in (True, False):
        raise BadRow("malformed", f"`kto_tag` is {tag!r}, expected true or false")
    return {"label": bool(tag)}


def _alpaca(row: Row) -> dict[str, Any]:
    used = ("instruction", "input", "output", "system", "history", "chosen", "rejected", "kto_tag")
    rest = _without(row, *used)
    prompt: list[dict[str, Any]] = []
    if row.get("system"):
        prompt.append({"role": "system", "content": _words(row, "system")})
    for turns in row.get("history") or []:
        if not isinstance(turns, list) or len(turns) != 2:
            raise BadRow("malformed", "`history` is not a list of [instruction, answer]")
        prompt += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]
    question = _words(row, "instruction")
    if row.get("input"):
        question = f"{question}\n{_words(row, 'input')}"
    prompt.append({"role": "user", "content": question})
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return {"prompt": prompt, "chosen": _words(row, "chosen"), "rejected": _words(row, "rejected"), **rest}
    if isinstance(row.get("output"), list):
        return {"prompt": prompt, "completions": row["output"], **rest}
    return {"prompt": prompt, "completion": _words(row, "output"), **rest, **_verdict(row)}


def _words(row: Row, column: str) -> str:
    value = require(row, column)
    if not isinstance(value, str):
        raise BadRow("malformed", f"`{column}` is {type(value).__name__}, expected text")
    return value


def _alpaca_eval(row: Row) -> dict[str, Any]:
    """A judge's verdict from 1, `output_1` is better, to 2, `output_2` is; the column stays, for how sure it was."""
    verdict = require(row, "preference")
    if not is_number(verdict) or not 1 <= verdict <= 2 or verdict == 1.5:
        raise BadRow("malformed", f"`preference` is {verdict!r}, expected a number from 1 to 2 that prefers one answer")
    better, worse = ("output_1", "output_2") if verdict < 1.5 else ("output_2", "output_1")
    answers = {"chosen": _words(row, better), "rejected": _words(row, worse)}
    prompt = [{"role": "user", "content": _words(row, "instruction")}]
    return {"prompt": prompt, **answers, **_without(row, "instruction", "output_1", "output_2")}


def _ultrafeedback(row: Row) -> dict[str, Any]:
    """Several answers with the judge's overall score; ratings of single aspects become `ratings: {aspect: [...]}`."""
    answers = _entries(row, "completions", "response")
    column = "prompt" if row.get("prompt") is not None else "instruction"
    ratings: dict[str, list[float | None]] = {}
    for number, answer in enumerate(answers):
        for aspect, judged in (answer.get("annotations") or {}).items():
            rating = judged.get("Rating") if isinstance(judged, dict) else None
            ratings.setdefault(aspect, [None] * len(answers))[number] = _rating(rating)
    translated = {
        "prompt": _words(row, column) if column == "prompt" else [{"role": "user", "content": _words(row, column)}],
        "completions": [answer["response"] for answer in answers],
        "scores": [_overall(answer, number) for number, answer in enumerate(answers, 1)],
        **_without(row, "completions", "instruction", "prompt"),
    }
    return {**translated, "ratings": ratings} if ratings else translated


def _overall(answer: Mapping[str, Any], number: int) -> float:
    for key in ("overall_score", "fine-grained_score"):
        score = _rating(answer.get(key))
        if score is not None:
            return score
    raise BadRow("missing value", f"completion {number} has no number in `overall_score` or `fine-grained_score`")


def _rating(value: Any) -> float | None:
    """A number, also one written as text; None where the judge gave none."""
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value.strip()):
        return float(value)
    return float(value) if is_number(value) else None


def _entries(row: Row, column: str, key: str) -> list[dict[str, Any]]:
    """A list of mappings, each with `key`."""
    entries = require(row, column)
    if not isinstance(entries, list) or not entries:
        raise BadRow("malformed", f"`{column}` is not a list of {{{key}, …}}")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or entry.get(key) is None:
            raise BadRow("malformed", f"entry {number} of `{column}` has no `{key}`")
    return entries


def _helpsteer(row: Row) -> dict[str, Any]:
    """One answer; `helpfulness`, the judges' overall impression, is its score, and every attribute stays a column."""
    for name in HELPSTEER:
        if row.get(name) is not None and not is_number(row[name]):
            raise BadRow("malformed", f"`{name}` is {row[name]!r}, expected a number")
    require(row, "response")
    return {
        "prompt": row["prompt"],
        "completion": row["response"],
        "score": row["helpfulness"],
        **_without(row, "prompt", "response", "score"),
    }


def _verl(row: Row) -> dict[str, Any]:
    rule = require(row, "reward_model")
    if not isinstance(rule, dict):
        raise BadRow("malformed", f"`reward_model` is {type(rule).__name__}, expected {{style, ground_truth}}")
    return {"ground_truth": rule.get("ground_truth"), **row}


def _open_instruct(row: Row) -> dict[str, Any]:
    turns = _turns(require(row, "messages"), "messages")
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return {"prompt": turns[:first], **_without(row, "messages")}


def _nemo_rl(row: Row) -> dict[str, Any]:
    """Ranks become scores, so that equal ranks stay equal: rank 0 is the best."""
    answers = _entries(row, "completions", "completion")
    for number, answer in enumerate(answers, 1):
        if not is_number(answer.get("rank")):
            raise BadRow("malformed", f"completion {number} has no number in `rank`")
    return {
        "prompt": require(row, "context" if row.get("context") is not None else "prompt"),
        "completions": [answer["completion"] for answer in answers],
        "scores": [-float(answer["rank"]) for answer in answers],
        **_without(row, "context", "prompt", "completions"),
    }


def _halos(row: Row) -> dict[str, Any]:
    """Label 1 prefers `output_A`, anything else `output_B`, as their loader has it."""
    kind, prompt = require(row, "type"), require(row, "prompt")
    if kind == "pairwise_feedback":
        sides = ("A", "B") if require(row, "label") == 1 else ("B", "A")
        outputs = [require(row, f"output_{side}") for side in sides]
        rewards = {
            f"score_{name}": row[f"reward_{side}"]
            for name, side in zip(("chosen", "rejected"), sides, strict=True)
            if row.get(f"reward_{side}") is not None
        }
        rest = _without(row, "prompt", "label", "output_A", "output_B", "reward_A", "reward_B")
        return {"prompt": prompt, "chosen": outputs[0], "rejected": outputs[1], **rewards, **rest}
    answer = {
        "prompt": prompt,
        "completion": require(row, "output"),
        **({} if row.get("reward") is None else {"score": row["reward"]}),
        **_without(row, "prompt", "output", "reward", "label"),
    }
    if kind == "scalar_feedback":
        return answer
    if kind != "binary_feedback":
        raise BadRow("malformed", f"`type` is {kind!r}, expected one of {', '.join(FEEDBACK)}")
    return {**answer, "label": bool(require(row, "label"))}


def _transcripts(row: Row) -> dict[str, Any]:
    """Two transcripts as conversations; what they share is found later, as for every pair without a prompt."""
    sides = {side: _spoken(_words(row, side), side) for side in ("chosen", "rejected")}
    return {**sides, **_without(row, "chosen", "rejected")}


def _spoken(text: str, column: str) -> list[dict[str, Any]]:
    before, *parts = re.split(f"({HUMAN_MARK}|{ASSISTANT_MARK})", text)
    if before.strip() or not parts:
        raise BadRow("malformed", f"`{column}` does not begin with {HUMAN_MARK!r}")
    turns: list[dict[str, Any]] = []
    for mark, words in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if mark == HUMAN_MARK else "assistant"
        if turns and turns[-1]["role"] == role:  # some speak twice in a row, which templates refuse
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{words.strip()}"
        else:
            turns.append({"role": role, "content": words.strip()})
    return turns


def _first_of(row: Row, column: str) -> Mapping[str, Any]:
    """The first entry of a list of mappings; empty where the column holds something else."""
    value = row[column]
    return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}


LAYOUTS: dict[str, Layout] = {
    "sharegpt": Layout(
        ("conversations",),
        "`conversations: [{from, value}]`, with `chosen` and `rejected` or `kto_tag` or neither",
        _sharegpt,
        lambda row: "prompt" not in row,
    ),
    "alpaca": Layout(
        ("instruction",),
        "`instruction`, `input` or none, and `output` (text, or a list best first) or `chosen` and `rejected`",
        _alpaca,
        lambda row: "prompt" not in row and ("output" in row or {"chosen", "rejected"} <= row.keys()),
    ),
    "alpaca_eval": Layout(
        ("instruction", "output_1", "output_2", "preference"),
        "`instruction`, `output_1`, `output_2` and `preference`, from 1 to 2",
        _alpaca_eval,
        lambda row: True,
    ),
    "ultrafeedback": Layout(
        ("completions",),
        "`instruction` or `prompt`, and `completions: [{response, overall_score}]`",
        _ultrafeedback,
        lambda row: "response" in _first_of(row, "completions"),
    ),
    "nemo_rl": Layout(
        ("completions",),
        "`context` or `prompt`, and `completions: [{rank, completion}]`, rank 0 the best",
        _nemo_rl,
        lambda row: {"rank", "completion"} <= _first_of(row, "completions").keys(),
    ),
    "helpsteer": Layout(
        ("prompt", "response", "helpfulness"),
        f"`prompt`, `response` and numbers: {', '.join(HELPSTEER)}",
        _helpsteer,
        lambda row: True,
    ),
    "verl": Layout(
        ("data_source", "prompt", "reward_model"),
        "`data_source`, `prompt` and `reward_model: {style, ground_truth}`",
        _verl,
        lambda row: isinstance(row["reward_model"], dict),
    ),
    "open_instruct": Layout(
        ("messages", "ground_truth", "dataset"),
        "`messages`, `ground_truth` and `dataset`, the name of the verifier",
        _open_instruct,
        lambda row: True,
    ),
    "halos": Layout(
        ("type", "prompt"),
        "`type: pairwise_feedback` with `output_A`, `output_B` and `label`, or `type: binary_feedback` with `output` "
        "and `label`",
        _halos,
        lambda row: row["type"] in FEEDBACK,
    ),
    "transcripts": Layout(
        ("chosen", "rejected"),
        f"`chosen` and `rejected`, each text with {HUMAN_MARK!r} and {ASSISTANT_MARK!r} before every turn",
        _transcripts,
        lambda row: False,  # as text they are preference rows already, and base models take them so
    ),
}
"""Name → layout. Found by `format: auto`, in this order and before our own shapes; `transcripts` is asked for."""
