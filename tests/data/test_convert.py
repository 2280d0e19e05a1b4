"""Conversion of files: round trips, what is lost and said, file types, and files that stay whole."""

import gzip
import json
from pathlib import Path

import pytest

from alignkit.core import DataError
from alignkit.core.errors import EnvironmentProblem
from alignkit.data import convert as convert_module
from alignkit.data.config import DataConfig
from alignkit.data.convert import LOST, SOURCES, convert
from alignkit.data.shapes import choose_format
from alignkit.data.sources import read_rows

FIXTURES = Path(__file__).parent / "fixtures"
PAIR = {"id": "x", "prompt": "p", "chosen": "a", "rejected": "b"}
USER, ANSWERS = {"role": "user", "content": "q"}, [[{"role": "assistant", "content": text}] for text in "ab"]
TALK = {"prompt": [USER], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def turn(tmp_path):
    """turn(rows, target, …, threshold=) → the rows after a conversion to each target in turn, and the last account."""

    def turn(rows, *targets, threshold=None):
        path = write(tmp_path / "rows.jsonl", rows)
        for number, target in enumerate(targets):
            out = tmp_path / f"{number}.jsonl"
            bound = threshold if target == "unpaired" else None
            account = convert(DataConfig(path=str(path)), out, target, threshold=bound, overwrite=True)
            path = out
        found = read_rows(DataConfig(path=str(path)))
        assert target is None or choose_format("auto", found.columns, "out") == target
        return found.rows, account

    return turn


@pytest.mark.parametrize(
    "rows",
    [
        [PAIR, PAIR | {"id": "y", "source": "me"}],
        [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "c"}],
        [PAIR | {"score_chosen": 7.0, "score_rejected": 2.0, "margin": 5.0}],
        [PAIR | {"scores": {"truth": [0.0, 1.0], "fun": [2.0, None]}, "objective": "fun"}],
        [PAIR | {"id": 5}, TALK | {"id": 6}],
    ],
)
def test_pairs_survive_a_round_trip(turn, rows):
    for targets in (["unpaired", "preference"], ["ranked", "preference"], ["preference"]):
        if targets[0] == "ranked" and "scores" in rows[0]:
            continue  # of a list, objectives say the order
        back, account = turn(rows, *targets)
        assert back == rows
        assert account.lines()[-1] == "  nothing is lost"


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "x", "prompt": "p", "completions": ["a", "b", "c"], "scores": [3.0, 2.0, 0.5], "source": "me"}],
        [{"prompt": "p", "completions": ["a", "b", "c"], "scores": [3.0, 2.0, 2.0]}] * 2,
    ],
)
def test_scored_lists_survive_labels(turn, rows):
    labelled, account = turn(rows, "unpaired", threshold=2.0)
    assert [row["label"] for row in labelled[:3]] == [True, True, rows[0]["scores"][2] >= 2]
    assert account.lost == {}
    assert turn(rows, "unpaired", "ranked", threshold=2.0)[0] == rows


def test_lists_of_two_survive_as_pairs(turn):
    rows = [
        {"id": "x", "prompt": "p", "completions": ["a", "b"]},
        {"id": "y", "prompt": "p", "completions": ["b", "a"]},
    ]
    assert turn(rows, "preference", "ranked")[0] == rows
    scored = [row | {"scores": [2.0, 1.0]} for row in rows]
    assert turn(scored, "preference", "ranked")[0] == scored


def test_a_pair_as_labelled_answers(turn):
    rows, _ = turn([PAIR | {"score_chosen": 7.0, "topic": "sea"}], "unpaired")
    first = {"id": "x/chosen", "source_row": "x", "prompt": "p", "completion": "a", "label": True, "score": 7.0}
    assert rows[0] == first | {"topic": "sea"}
    assert rows[1] == {
        "id": "x/rejected",
        "source_row": "x",
        "prompt": "p",
        "completion": "b",
        "label": False,
        "topic": "sea",
    }


def test_labels_of_one_prompt_become_pairs_and_lists(turn):
    labels = [("a", False), ("b", True), ("c", True), ("d", False)]
    rows = [{"prompt": "p", "completion": text, "label": label} for text, label in labels]
    alone = [{"prompt": "q", "completion": "a", "label": True}]
    pairs, account = turn(rows + alone, "preference")
    assert pairs == [{"prompt": "p", "chosen": "b", "rejected": "d"}]
    assert {reason: tally.examples for reason, tally in account.lost.items()} == {
        "answers between": ["line 1: 2"],
        "no partner": ["line 5"],
    }
    ranked, _ = turn(rows, "ranked")
    assert ranked == [{"prompt": "p", "completions": ["b", "c", "a", "d"], "scores": [1.0, 1.0, 0.0, 0.0]}]


def test_scored_single_answers_become_labels(turn):
    rows = [{"id": i, "prompt": "p", "completion": text, "score": i} for i, text in enumerate("ab")]
    labelled, account = turn([*rows, {"id": 2, "prompt": "p", "completion": "c"}], "unpaired", threshold=1)
    assert labelled == [row | {"label": bool(row["id"])} for row in rows]
    assert account.lost["unjudged"].examples == ["line 3 (id 2)"]
    relabelled, _ = turn(labelled, "unpaired", threshold=0)
    assert [row["label"] for row in relabelled] == [True, True]
    with pytest.raises(DataError, match="no threshold: scores become labels with --threshold"):
        turn(rows, "unpaired")


def test_scored_single_answers_become_pairs(tmp_path):
    out = tmp_path / "out.jsonl"
    account = convert(DataConfig(path=str(FIXTURES / "helpsteer.jsonl")), out, "preference")
    [pair] = read_rows(DataConfig(path=str(out))).rows
    assert (pair["chosen"], pair["score_chosen"], pair["rejected"]) == ("Cod.", 4.0, "Crab.")
    assert (pair["coherence"], account.lost["no partner"].count) == (4, 1)
    assert account.lost["differing column"].examples == ["line 1: helpfulness", "line 1: correctness"]


@pytest.mark.parametrize(
    ("row", "target", "reason"),
    [
        (PAIR | {"chosen": None}, "unpaired", "unusable"),
        (PAIR | {"messages": [USER]}, "unpaired", "other texts"),
        (PAIR | {"score_chosen": 1.0, "score_rejected": 2.0}, "ranked", "scores"),
        (PAIR, "prompt_completion", "worse answers"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}, "preference", "no preference"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}, "unpaired", "no preference"),
        ({"prompt": "p", "completions": ["a", "b", "c"]}, "preference", "answers between"),
        ({"prompt": "p", "completions": ["a", "b", "c"]}, "unpaired", "no threshold"),
        ({"prompt": "p", "completion": "a", "label": False}, "prompt_completion", "undesirable"),
        ({"prompt": "p", "completion": "a", "label": False}, "preference", "no partner"),
        ({"prompt": "p", "completion": "a"}, "ranked", "unjudged"),
        ({"prompt": "p", "completions": ["a", "b"], "labels": [1, 0]}, "prompt_completion", "step labels"),
    ],
)
def test_losses_are_counted_and_explained(turn, row, target, reason):
    rows = {
        "preference": [row, {"id": "good", "prompt": "z", "chosen": "a", "rejected": "b"}],
        "ranked": [row, {"prompt": "z", "completions": ["a", "b"]}],
        "unpaired": [
            row,
            {"prompt": "z", "completion": "a", "label": True},
            {"prompt": "z", "completion": "b", "label": False},
        ],
        "prompt_completion": [
            row,
            {"prompt": "z", "completion": "a", "score": 2},
            {"prompt": "z", "completion": "b", "score": 1},
        ],
        "stepwise": [row],
    }[choose_format("auto", row, "row")]
    made, account = turn(rows, target)
    assert made
    assert account.lost[reason].examples[0].startswith("line 1")
    assert any(f"{reason}: {LOST[reason]}" in line for line in account.lines())


def test_operations_make_the_rows_that_are_written(tmp_path):
    goal = {"name": "reward_augment", "placement": "user_prefix", "text": "goal {goal}", "separator": " "}
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "p", "topic": "sea"}])
    config = DataConfig(path=str(prompts), operations=[goal | {"goal": 9}])
    account = convert(config, tmp_path / "out.jsonl", None)
    assert (account.target, account.written) == ("prompt", 1)
    assert read_rows(DataConfig(path=str(tmp_path / "out.jsonl"))).rows == [
        {"prompt": "goal 9 p", "topic": "sea", "goal": 9.0}
    ]
    ranked = [{"id": "x", "prompt": "p", "completions": ["a", "b", "c"], "scores": [9, 5, 2]}]
    config = DataConfig(path=str(write(tmp_path / "ranked.jsonl", ranked)), operations=[goal])
    account = convert(config, tmp_path / "out.jsonl", None, overwrite=True)
    rows = read_rows(DataConfig(path=str(tmp_path / "out.jsonl"))).rows
    assert (account.target, len(rows)) == ("preference", 6)
    assert (rows[1]["id"], rows[1]["chosen"], rows[1]["rejected"]) == ("x/1-2/neg", "b", "a")
    talk = write(tmp_path / "talk.jsonl", [{"messages": [USER, ANSWERS[0][0]]}])
    config = DataConfig(path=str(talk), operations=[goal | {"goal": 9}])
    with pytest.raises(DataError, match="say in which shape messages rows are written: --to preference"):
        convert(config, tmp_path / "out.jsonl", None, overwrite=True)


def test_every_loss_is_explained_once_and_every_target_can_be_made_of_itself():
    assert all(target in SOURCES[target] for target in SOURCES)
    source = Path(convert_module.__file__).read_text()
    assert {reason for reason in LOST if f'lose("{reason}"' in source} == set(LOST)


def test_foreign_layouts_become_our_columns(tmp_path):
    out = tmp_path / "out.jsonl"
    convert(DataConfig(path=str(FIXTURES / "sharegpt_pairs.jsonl")), out, "preference")
    table = read_rows(DataConfig(path=str(out)))
    assert (table.layout, list(table.rows[0])) == (None, ["prompt", "chosen", "rejected"])
    account = convert(DataConfig(path=str(FIXTURES / "sharegpt.jsonl")), out, None, overwrite=True)
    assert (account.target, account.written, account.lost["unusable"].count) == ("messages", 3, 1)
    assert account.lines()[0].endswith("4 rows as messages from sharegpt → 3 rows as messages")
    assert json.loads(json.dumps(account.to_json()))["lost"]["unusable"]["count"] == 1


def test_steps_become_one_answer(tmp_path):
    out = tmp_path / "out.jsonl"
    convert(DataConfig(path=str(FIXTURES / "stepwise.jsonl")), out, "prompt_completion")
    assert read_rows(DataConfig(path=str(out))).rows[0]["completion"] == "2 + 3 = 5\n\n5 + 4 = 10\n\nA: 10"


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.json", "out.json.gz", "out.parquet"])
def test_file_types(tmp_path, name):
    rows = [PAIR | {"id": f"x{i}", "chosen": "é" * i} for i in range(1, 4)]
    source = DataConfig(path=str(write(tmp_path / "rows.jsonl", rows)))
    convert(source, tmp_path / name, "preference")
    assert read_rows(DataConfig(path=str(tmp_path / name))).rows == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"rows.jsonl", name})
    if name.endswith(".gz"):
        assert gzip.decompress((tmp_path / name).read_bytes())


def test_the_same_rows_give_the_same_bytes(tmp_path):
    source = DataConfig(path=str(write(tmp_path / "rows.jsonl", [PAIR])))
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        convert(source, tmp_path / name, "ranked")
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()


def test_nothing_is_overwritten_unless_asked_and_nothing_half_written(tmp_path):
    source = DataConfig(path=str(write(tmp_path / "rows.jsonl", [PAIR, PAIR])))
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        convert(source, out, "ranked")

    def fail(rows):
        yield rows[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem, match=r"cannot write .*out\.jsonl: No space left"):
        convert(source, out, "ranked", overwrite=True, watch=fail)
    assert (out.read_text(), len(list(tmp_path.iterdir()))) == ("precious", 2)
    convert(source, out, "ranked", overwrite=True)
    assert "completions" in out.read_text()


def test_what_cannot_be_made(tmp_path, turn):
    source = DataConfig(path=str(write(tmp_path / "p.jsonl", [{"prompt": "p"}])))
    with pytest.raises(DataError, match=r"prompt rows cannot become ranked rows.*Expected preference, ranked"):
        convert(source, tmp_path / "out.jsonl", "ranked")
    with pytest.raises(DataError, match=r"no preference row can be made\n  lost +2  unjudged"):
        turn([{"prompt": "p", "completion": "a"}] * 2, "preference")
    with pytest.raises(DataError, match=r"unknown file type to write. Expected \.jsonl, "):
        convert(source, tmp_path / "out.txt", None)
    with pytest.raises(DataError, match="there is no folder"):
        convert(source, tmp_path / "nowhere" / "out.jsonl", None)
    with pytest.raises(DataError, match="a threshold makes labels"):
        convert(source, tmp_path / "out.jsonl", "ranked", threshold=1.0)
    mixed = DataConfig(path=str(write(tmp_path / "mixed.jsonl", [PAIR, TALK])))
    with pytest.raises(DataError, match=r"parquet, which wants one type a column.*Write \.jsonl"):
        convert(mixed, tmp_path / "out.parquet", "preference")
    assert not (tmp_path / "out.parquet").exists()
