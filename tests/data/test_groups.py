"""From file to groups: contents, truncation, the account of dropped rows, the budget; and the printed form."""

import io
import json

import pytest
from rich.console import Console

from alignkit.core import Completion, DataError, Group
from alignkit.data.config import DataConfig
from alignkit.data.groups import fit, load_groups
from alignkit.data.render import Rendered
from alignkit.data.report import DataReport
from alignkit.data.shapes import BadRow
from alignkit.data.show import print_groups

PAIR = {"prompt": "one day", "chosen": " the fish", "rejected": " the crab"}


@pytest.fixture
def load(tmp_path, make_renderer):
    def load(rows, *, max_length=100, template=None, room=0, given=False, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config, taken = DataConfig(path=str(path), **options), {"room": room, "given": given}
        return load_groups(config, make_renderer(template), max_length=max_length, **taken)

    return load


def test_a_pair_becomes_a_group(load, make_renderer):
    [group], report = load([PAIR | {"id": "x7", "score_chosen": 2.0, "score_rejected": 1.0, "source": "me"}])
    renderer = make_renderer()
    assert (group.id, group.messages) == ("x7", [{"role": "user", "content": "one day"}])
    assert group.fields == {"score_chosen": 2.0, "score_rejected": 1.0, "source": "me"}
    assert [completion.text for completion in group.completions] == [" the fish", " the crab"]
    assert [completion.reward for completion in group.completions] == [1.0, 0.0]
    assert [completion.scores["score"].value for completion in group.completions] == [2.0, 1.0]
    assert renderer.decode(group.prompt + group.completions[0].tokens) == "<s>one day the fish</s>"
    assert (report.rows, report.kept, report.dropped, report.changed) == (1, 1, {}, {})


def test_where_there_is_room_for_answers_those_of_the_data_come_if_asked_for(load):
    [alone], _ = load([PAIR], room=8)
    [group], _ = load([PAIR], room=8, given=True)
    assert alone.completions == []
    assert [completion.text for completion in group.completions] == [" the fish", " the crab"]


def test_rows_without_an_id_are_named_by_source_and_line(load):
    groups, _ = load([PAIR, PAIR | {"_id": 5}, PAIR | {"index": 0}])
    assert [group.id for group in groups] == ["rows.jsonl:1", "5", "0"]


def test_a_conversation_keeps_its_messages_and_the_answers_text(load):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    [group], _ = load([{"messages": turns}], template="{% for m in messages %}{{ m.content }} {% endfor %}")
    assert group.messages == turns[:1]
    assert group.completions[0].text == "yes"


def test_the_report_counts_every_row(load):
    rows = [
        PAIR,
        PAIR | {"chosen": ""},
        PAIR | {"rejected": PAIR["chosen"], "id": "twin"},
        PAIR | {"chosen": None},
        PAIR | {"chosen": 3},
        PAIR | {"chosen": " the fish" * 60},
    ]
    groups, report = load(rows)
    assert len(groups) == report.kept == 1
    assert {reason: tally.count for reason, tally in report.dropped.items()} == {
        "empty completion": 1,
        "equal completions": 1,
        "missing value": 1,
        "malformed": 1,
        "overlong": 1,
    }
    assert report.dropped["equal completions"].examples == ["line 3 (id twin)"]
    assert report.dropped["malformed"].examples == [
        "line 5: `chosen` is int, expected text or a list of {role, content}"
    ]
    assert report.bad_fraction == 5 / 6
    assert json.loads(json.dumps(report.to_json()))["dropped"]["overlong"]["count"] == 1


def test_the_budget_names_rows_and_remedy(load):
    rows = [PAIR, PAIR, PAIR, PAIR | {"chosen": ""}]
    assert len(load(rows, max_bad_fraction=0.25)[0]) == 3
    with pytest.raises(DataError) as error:
        load(rows, max_bad_fraction=0.2)
    for part in ("25.0 %", "max_bad_fraction: 0.2", "empty completion", "line 4", "4 rows as preference, 3 kept"):
        assert part in str(error.value)


def test_lost_stop_tokens_count_against_the_budget(load):
    rows = [PAIR, PAIR | {"chosen": " the fish" * 60}]
    groups, report = load(rows, overlong="cut")
    assert len(groups) == 2
    assert report.changed["completion cut"].count == 1
    with pytest.raises(DataError, match="lose their stop token"):
        load(rows, overlong="cut", max_bad_fraction=0)


def test_no_usable_row(load):
    with pytest.raises(DataError, match="no usable row is left of 2"):
        load([PAIR | {"chosen": ""}] * 2)


def test_missing_column(load):
    with pytest.raises(DataError, match=r"missing: rejected.*fields: \{rejected: THEIR_COLUMN\}"):
        load([{"prompt": "p", "chosen": "c"}])


def test_answers_that_render_alike_are_equal(load):
    turn = {"role": "assistant", "content": "yes"}
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [turn], "rejected": [turn | {"content": "yes "}]}
    template = "{% for m in messages %}{{ m.content | trim }} {% endfor %}"
    with pytest.raises(DataError, match="equal completions"):
        load([row], template=template)


@pytest.mark.parametrize(
    ("prompt", "lengths", "max_length", "expected"),
    [
        ([1, 5, 6, 7, 8], [3, 2], 8, ([1, 5, 6, 7, 8], [3, 2], [])),
        ([1, 5, 6, 7, 8], [3, 2], 6, ([1, 7, 8], [3, 2], ["prompt cut"])),
        ([1, 5, 6, 7, 8], [3, 2], 5, ([1, 8], [3, 2], ["prompt cut"])),
        ([4, 5, 6, 7, 8], [3, 2], 5, ([7, 8], [3, 2], ["prompt cut"])),
        ([4, 5, 6, 7, 8], [3, 2], 4, ([8], [3, 2], ["prompt cut"])),
        ([1, 5, 6, 7, 8], [3, 2], 4, ([1, 8], [2, 2], ["prompt cut", "completion cut"])),
        ([1], [9], 4, ([1], [3], ["completion cut"])),
        ([1, 5], [9], 2, ([1], [1], ["prompt cut", "completion cut"])),
        ([1, 5, 6, 7], [], 3, ([1, 7], [], ["prompt cut"])),
    ],
)
def test_truncation_takes_the_prompt_first(prompt, lengths, max_length, expected):
    completions = [[10 * (i + 1)] * n for i, n in enumerate(lengths)]
    rendered = Rendered(list(prompt), completions, [None] * len(lengths))
    changes = fit(rendered, 1, max_length, "cut")
    assert (rendered.prompt, [len(tokens) for tokens in rendered.completions], changes) == expected


@pytest.mark.parametrize(
    ("lengths", "room", "expected"),
    [([3, 2], 2, [1, 6, 7, 8]), ([3, 2], 5, [1, 8]), ([], 5, [1, 8]), ([], 6, [1])],
)
def test_room_is_left_behind_the_prompt_whatever_was_answered(lengths, room, expected):
    rendered = Rendered([1, 5, 6, 7, 8], [[10 * (i + 1)] * n for i, n in enumerate(lengths)], [None] * len(lengths))
    assert fit(rendered, 1, 7, "drop", room) == ["prompt cut"]
    assert rendered.prompt == expected
    assert [len(tokens) for tokens in rendered.completions] == lengths


def test_overlong_rows_are_dropped_unless_cut_is_asked_for():
    with pytest.raises(BadRow, match="overlong"):
        fit(Rendered([1, 5], [[9] * 9], [None]), 1, 8, "drop")


def test_cutting_may_leave_nothing_to_compare_or_to_learn():
    with pytest.raises(BadRow, match="equal completions"):
        fit(Rendered([1, 5], [[9, 9, 9], [9, 9, 8]], [None, None]), 1, 4, "cut")
    with pytest.raises(BadRow, match="empty completion"):
        fit(Rendered([1, 5], [[9, 9, 9]], [[False, False, True]]), 1, 4, "cut")


def test_flags_are_cut_with_their_tokens():
    rendered = Rendered([1, 5], [[9, 9, 9]], [[True, False, True]])
    fit(rendered, 1, 4, "cut")
    assert rendered.trained == [[True, False]]


def test_quantiles_of_lengths():
    report = DataReport("rows", "text", 5)
    for n in (4, 1, 3, 2, 5):
        report.measure(prompt=n)
    assert report.quantiles()["prompt"] == {"min": 1, "25%": 2, "median": 3, "75%": 4, "95%": 5, "max": 5}
    assert "median 3" in report.lines()[-1]


def printed(groups, renderer, **options):
    out = io.StringIO()
    print_groups(groups, renderer.decode, renderer.stop_ids, Console(file=out, width=200, **options))
    return out.getvalue()


def test_printing_without_colour_names_every_kind(load, make_renderer):
    groups, _ = load([PAIR])
    text = printed(groups, make_renderer())
    tokens = [len(completion.tokens) for completion in groups[0].completions]
    assert "[prompt] <s>one day" in text
    assert f"chosen · {tokens[0]} tokens\n[trained]  the fish [stop] </s>⏹" in text
    assert f"rejected · {tokens[1]} tokens\n[trained]  the crab [stop] </s>⏹" in text


def test_masked_tokens_and_markup_are_printed_as_they_are(make_renderer):
    renderer = make_renderer()
    ids = renderer.tokenizer(["[red] fish"], add_special_tokens=False)["input_ids"][0]
    completion = Completion("", ids, trained=[False] * (len(ids) - 1) + [True], reward=0.5)
    text = printed([Group("g", [], [0], [completion])], renderer)
    assert "completion, reward 0.5" in text
    assert "[masked] [red]" in text


def test_printing_in_colour_and_with_no_color(load, make_renderer, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    groups, _ = load([PAIR])
    colour = printed(groups, make_renderer(), force_terminal=True, color_system="standard")
    assert "\x1b[32m the fish" in colour
    assert "\x1b[1;31m</s>⏹" in colour
    assert "[trained]" not in colour
    assert "[trained]" in printed(groups, make_renderer(), force_terminal=True, color_system="standard", no_color=True)


def test_objectives_are_the_scores_of_completions(load):
    row = {
        "prompt": "one day",
        "completions": [" the fish", " the crab"],
        "scores": {"truth": [1, 0], "fun": [None, 1]},
    }
    [group], _ = load([row | {"objective": "fun"}])
    scores = [{name: score.value for name, score in one.scores.items()} for one in group.completions]
    assert scores == [{"truth": 1.0}, {"truth": 0.0, "fun": 1.0}]
    assert [one.reward for one in group.completions] == [1.0, 0.5]
    assert group.fields["objective"] == "fun"


def test_rows_of_a_foreign_layout_are_read_and_counted(load):
    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}] * 2
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    groups, report = load([*rows, {"conversations": [{"from": "sea"}]}], template=template)
    assert (len(groups), report.format, report.layout) == (2, "messages", "sharegpt")
    assert "3 rows as messages from sharegpt, 2 kept" in report.lines()[0]
    assert report.dropped["malformed"].examples[0].startswith("line 3: `conversations` has a turn from 'sea'")
    assert report.to_json()["layout"] == "sharegpt"
