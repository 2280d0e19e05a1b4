"""Shapes of rows: detection, conversion to prompt and rewarded completions, and rows that cannot be used."""

import math

import pytest

from alignkit.core import DataError
from alignkit.data.shapes import BadRow, check_columns, detect_format, to_example


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["id", "text"], "text"),
        (["messages", "prompt_id"], "messages"),
        (["prompt", "solution", "answer"], "prompt"),
        (["prompt", "completion"], "prompt_completion"),
        (["prompt", "chosen", "rejected", "messages"], "preference"),
        (["chosen", "rejected"], "preference"),
        (["prompt", "completion", "label"], "unpaired"),
        (["prompt", "completions", "scores"], "ranked"),
        (["prompt", "completions", "labels"], "stepwise"),
    ],
)
def test_detection(columns, name):
    assert detect_format(columns, "rows.jsonl") == name


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (["prompt", "chosen", "rejectd"], ["preference", "did you mean 'rejectd'", "fields: {rejected: rejectd}"]),
        (["prompt", "chosen"], ["missing: rejected", "fields: {rejected: THEIR_COLUMN}", "format: prompt"]),
        (["question", "reply"], ["these columns: question, reply", "Known formats: preference (chosen, rejected);"]),
        (["Prompt", "Chosen", "Rejected"], ["fields: {chosen: Chosen, rejected: Rejected}"]),
        (["prompts"], ["Nearest format: prompt (prompt)", "did you mean 'prompts'"]),
        (
            ["prompt", "response", "source"],
            ["answer in 'response'", "fields: {completion: response}", "format: prompt"],
        ),
    ],
)
def test_detection_that_fails_says_what_is_near(columns, parts):
    with pytest.raises(DataError) as error:
        detect_format(columns, "rows.jsonl")
    for part in ["rows.jsonl", *parts]:
        assert part in str(error.value)


def test_a_named_format_needs_its_columns():
    check_columns("preference", ["chosen", "rejected"], "rows.jsonl")
    with pytest.raises(DataError, match=r"`format: unpaired` needs columns .* missing: label \(did you mean 'lable'"):
        check_columns("unpaired", ["prompt", "completion", "lable"], "rows.jsonl")


def test_preference_with_scores():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 7, "score_rejected": 2.5}
    example = to_example(row, "preference")
    assert (example.prompt, example.completions) == ("p", ["a", "b"])
    assert (example.rewards, example.scores) == ([1.0, 0.0], [{"score": 7.0}, {"score": 2.5}])


def test_implicit_prompt_of_plain_transcripts_ends_at_the_last_common_assistant_mark():
    start = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: more?\n\nAssistant:"
    example = to_example({"chosen": start + " Yes, please.", "rejected": start + " Yes, no."}, "preference")
    assert example.prompt == start
    assert example.completions == [" Yes, please.", " Yes, no."]


def test_implicit_prompt_of_other_text_is_the_common_start():
    example = to_example({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "preference")
    assert (example.prompt, example.completions) == ("The sky is", [" blue.", " green."])


def test_implicit_prompt_of_conversations():
    start = [user("q"), assistant("a"), user("r")]
    row = {"chosen": [*start, assistant("x")], "rejected": [*start, assistant("y")]}
    example = to_example(row, "preference")
    assert (example.prompt, example.completions) == (start, [[assistant("x")], [assistant("y")]])


def test_implicit_prompt_never_ends_with_the_assistant():
    row = {
        "chosen": [user("q"), assistant("a"), user("r"), assistant("x")],
        "rejected": [user("q"), assistant("a"), user("s"), assistant("y")],
    }
    example = to_example(row, "preference")
    assert example.prompt == [user("q")]
    assert example.completions[1] == [assistant("a"), user("s"), assistant("y")]


@pytest.mark.parametrize("prompt", ["q", [user("q")]])
def test_whole_conversations_beside_a_prompt(prompt):
    row = {"prompt": prompt, "chosen": [user("q"), assistant("x")], "rejected": [user("q"), assistant("y")]}
    example = to_example(row, "preference")
    assert (example.prompt, example.completions) == ([user("q")], [[assistant("x")], [assistant("y")]])


def test_strings_and_messages_may_mix():
    example = to_example({"prompt": [user("q")], "completion": "a"}, "prompt_completion")
    assert (example.prompt, example.completions) == ([user("q")], [[assistant("a")]])
    example = to_example({"prompt": "q", "completion": [assistant("a")]}, "prompt_completion")
    assert (example.prompt, example.completions) == ([user("q")], [[assistant("a")]])
    assert math.isnan(example.rewards[0])


@pytest.mark.parametrize(("label", "reward"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0)])
def test_unpaired(label, reward):
    assert to_example({"prompt": "p", "completion": "c", "label": label}, "unpaired").rewards == [reward]


def test_ranked_by_order_or_scores():
    row = {"prompt": "p", "completions": ["a", "b", "c"]}
    assert to_example(row, "ranked").rewards == [0.0, -1.0, -2.0]
    example = to_example(row | {"scores": [0.5, 2, 1]}, "ranked")
    assert (example.rewards, example.scores) == ([0.5, 2.0, 1.0], [{"score": 0.5}, {"score": 2.0}, {"score": 1.0}])


def test_stepwise_rows_are_one_answer_of_labelled_steps():
    row = {"prompt": "p", "completions": ["a ", "b"], "labels": [True, 0.5]}
    example = to_example(row, "stepwise")
    assert (example.completions, example.steps) == (["a\n\nb"], ["a", "b"])
    assert math.isnan(example.rewards[0])
    chat = to_example(row | {"prompt": [user("q")]}, "stepwise")
    assert chat.completions == [[assistant("a\n\nb")]]


def test_scores_of_single_answers_and_objectives():
    row = {"prompt": "p", "completion": "c", "score": 3, "scores": {"truth": [1], "fun": None}}
    example = to_example(row, "prompt_completion")
    assert (example.rewards, example.scores) == ([3.0], [{"truth": 1.0, "score": 3.0}])
    assert to_example(row | {"label": False}, "unpaired").rewards == [0.0]
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "scores": {"truth": [0, 1]}}
    assert to_example(row, "preference").scores == [{"truth": 0.0}, {"truth": 1.0}]
    row = {"prompt": "p", "completions": ["a", "b"], "scores": {"truth": [0, 1], "fun": [1, None]}}
    assert to_example(row, "ranked").rewards == [0.5, 1.0]


def test_messages_split_at_the_first_assistant_turn_and_end_with_the_last():
    turns = [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r"), assistant("b"), user("bye")]
    example = to_example({"messages": turns}, "messages")
    assert (example.prompt, example.completions) == (turns[:2], [turns[2:5]])


def test_text_and_prompt():
    assert to_example({"text": "once"}, "text").completions == ["once"]
    assert to_example({"prompt": "p"}, "prompt").completions == []


def test_null_entries_of_messages_are_left_out():
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "thinking": None}
    example = to_example({"prompt": [user("q") | {"name": None}], "completion": [turn]}, "prompt_completion")
    assert example.prompt == [user("q")]
    assert example.completions == [[{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]]


def test_tools_and_template_options():
    row = {"prompt": [user("q")], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"mood": "calm", "tone": None}}
    example = to_example(row, "prompt")
    assert (example.tools, example.template_options) == ([{"name": "f"}], {"mood": "calm"})


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "equal completions"),
        ("preference", {"chosen": "same", "rejected": "same"}, "equal completions"),
        ("preference", {"prompt": "p", "chosen": "", "rejected": "a"}, "empty completion"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty completion"),
        ("preference", {"prompt": [user("q")], "chosen": [assistant("")], "rejected": "a"}, "empty completion"),
        ("preference", {"prompt": [user("q")], "chosen": [], "rejected": [assistant("a")]}, "empty completion"),
        ("preference", {"prompt": "p", "chosen": "a"}, "missing value"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": None}, "missing value"),
        ("preference", {"chosen": "abc", "rejected": "xyz"}, "malformed"),
        ("preference", {"chosen": "abc", "rejected": [user("q"), assistant("a")]}, "malformed"),
        ("preference", {"prompt": "p", "chosen": 3, "rejected": "a"}, "malformed"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": "high"}, "malformed"),
        ("preference", {"prompt": [{"from": "human"}], "chosen": "a", "rejected": "b"}, "malformed"),
        ("preference", {"prompt": [user(["image"])], "chosen": "a", "rejected": "b"}, "malformed"),
        ("unpaired", {"prompt": "p", "completion": "c", "label": "good"}, "malformed"),
        ("ranked", {"prompt": "p", "completions": "abc"}, "malformed"),
        ("ranked", {"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "malformed"),
        ("ranked", {"prompt": "p", "completions": ["a", "b"], "scores": {"truth": [1]}}, "malformed"),
        ("ranked", {"prompt": "p", "completions": ["a", "b"], "scores": {"truth": [1, None]}}, "malformed"),
        ("ranked", {"prompt": "p", "completions": ["a", "b"], "scores": {"truth": [1, "high"]}}, "malformed"),
        ("stepwise", {"prompt": "p", "completions": ["a", "b"], "labels": [True]}, "malformed"),
        ("stepwise", {"prompt": "p", "completions": ["a", " "], "labels": [True, True]}, "malformed"),
        ("stepwise", {"prompt": "p", "completions": ["a"], "labels": ["good"]}, "malformed"),
        ("stepwise", {"prompt": "p", "completions": [], "labels": []}, "malformed"),
        ("prompt_completion", {"prompt": "p", "completion": "a", "score": "high"}, "malformed"),
        ("messages", {"messages": "hello"}, "malformed"),
        ("messages", {"messages": [assistant("a")]}, "malformed"),
        ("messages", {"messages": [user("q")]}, "empty completion"),
        ("text", {"text": ""}, "empty completion"),
        ("prompt", {"prompt": "p", "tools": "{"}, "malformed"),
        ("prompt", {"prompt": "p", "tools": {}}, "malformed"),
        ("prompt", {"prompt": "p", "chat_template_kwargs": "x"}, "malformed"),
    ],
)
def test_bad_rows(name, row, reason):
    with pytest.raises(BadRow) as bad:
        to_example(row, name)
    assert bad.value.reason == reason
