"""Reading rows: every file type, folders, slices, mapped columns, and what each mistake is answered with."""

import gzip
import json

import pytest

from alignkit.core import DataError
from alignkit.data.config import DataConfig
from alignkit.data.sources import read_rows

ROWS = [{"prompt": f"p{i}", "answer": str(i)} for i in range(10)]


def write(path, rows=ROWS):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def read(path, **options):
    return read_rows(DataConfig(path=str(path), **options))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_json_lines(tmp_path, name):
    table = read(write(tmp_path / name))
    assert table.rows == ROWS
    assert table.numbers == list(range(1, 11))
    assert table.columns == ["prompt", "answer"]


def test_numbers_are_those_of_the_file_with_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert (read(path).numbers, read(path).word) == ([2, 4], "line")


def test_a_json_list(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert read(path).rows == ROWS


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_columnar_files(tmp_path, kind):
    from datasets import Dataset

    data, path = Dataset.from_list(ROWS), tmp_path / f"rows.{kind}"
    if kind == "arrow":
        data.save_to_disk(str(tmp_path / "saved"))
        [part] = (tmp_path / "saved").glob("*.arrow")
        part.rename(path)
    else:
        getattr(data, f"to_{kind}")(str(path))
    rows = read(path).rows
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    assert len(read(path, split="train[:3]").rows) == 3


def test_a_saved_dataset(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2])).save_to_disk(str(tmp_path))
    assert read(tmp_path).rows == ROWS
    table = read(tmp_path, split="test[1:]")
    assert (table.rows, table.numbers) == (ROWS[1:2], [2])
    with pytest.raises(DataError, match="no split 'valid'; splits there: train, test"):
        read(tmp_path, split="valid")


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:3])
    assert len(read(tmp_path, split="test").rows) == 3
    assert read(tmp_path, split="train[5:6]").rows == ROWS[5:6]


def test_a_folder_without_data(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"no data files in this folder .* it holds notes.md"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:30%]", ROWS[:3]),
        ("train[-2:]", ROWS[-2:]),
        ("train[2:4]", ROWS[2:4]),
        ("train[80%:]", ROWS[8:]),
        ("all", ROWS),
    ],
)
def test_slices(tmp_path, split, expected):
    assert read(write(tmp_path / "rows.jsonl"), split=split).rows == expected


def test_limit_is_taken_of_the_slice(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert read(path, limit=3).rows == ROWS[:3]
    assert read(path, limit=2, split="train[5:]").rows == ROWS[5:7]


@pytest.mark.parametrize("split", ["train[1]", "train+test", "train[a:b]"])
def test_a_split_nobody_understands(tmp_path, split):
    with pytest.raises(DataError, match="is not understood"):
        read(write(tmp_path / "rows.jsonl"), split=split)


def test_a_single_file_has_one_split(tmp_path):
    with pytest.raises(DataError, match="has no split 'test'"):
        read(write(tmp_path / "rows.jsonl"), split="test")


def test_fields_rename_and_set_constants(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    table = read(path, fields={"solution": "answer", "truth": "answer", "task": "=math"}, limit=1)
    assert table.rows == [{"prompt": "p0", "solution": "0", "truth": "0", "task": "math"}]
    with pytest.raises(DataError) as error:
        read(path, fields={"solution": "anwser"})
    for part in (str(path), "solution: anwser", "line 1 to 10", "prompt, answer", "Did you mean 'answer'?", "=anwser"):
        assert part in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "pairs.jsonl.gz")
    with pytest.raises(DataError, match=r"no such file or folder. Did you mean .*pairs.jsonl.gz\?"):
        read(tmp_path / "pair.jsonl.gz")
    with pytest.raises(DataError, match=r"no such file or folder. Did you mean .*pairs.jsonl.gz\?"):
        read(tmp_path / "pairs.jsonl.gzz")
    with pytest.raises(DataError, match=r"Did you mean .*pairs.jsonl.gz\?"):
        read(tmp_path.parent / (tmp_path.name + "x") / "pairs.jsonl.gz")
    with pytest.raises(DataError, match="holds nothing of a like name"):
        read(tmp_path / "nowhere" / "deep" / "other.csv")


def test_a_hub_id_that_cannot_be_reached(monkeypatch, tmp_path):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'someone/pairs' on the Hub\nand forty lines more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as error:
        read("someone/pairs")
    assert "neither a file or folder here, nor a hub data set that can be reached" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": }\n', "line 2 is not valid JSON"),
        (b'{"a": 1}\n[1]\n', "line 2 is list, expected a JSON object"),
        (b'[{"a": 1}, 3]', "entry 2 is int, expected a JSON object"),
        (b'{"a": "\xff"}\n', "line 1 is not valid JSON"),
        (b"", "holds no rows"),
    ],
)
def test_malformed_json(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_truncated_archive(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:40])
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


def test_a_broken_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read") as error:
        read(path)
    assert len(str(error.value)) < 400


def test_an_unknown_file_type(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_text("x")
    with pytest.raises(DataError, match=r"unknown file type. Expected .jsonl, .json, .parquet"):
        read(path)
