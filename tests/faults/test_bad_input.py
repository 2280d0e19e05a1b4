"""What a user can get wrong: the exit code, and the words that say what, where and what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults import plants
from tests.faults.bench import Runs, Whole, checkpoints
from tests.faults.process import alignkit

pytestmark = pytest.mark.xdist_group("faults-input")

PAIR = {"prompt": "say", "chosen": "YES", "rejected": "no"}


def refused(runs: Runs, *settings: str, name: str = "refused") -> str:
    """What a run says that ends with exit code 2 and leaves no trace of having begun."""
    code, said = runs.train(name, *settings)
    assert code == 2, said
    assert "Traceback" not in said
    assert not (runs[name] / "recipe.resolved.yaml").exists()
    return said[said.index("error: ") :]


def dropped(runs: Runs, name: str) -> dict[str, Any]:
    """The account of the training data that a run left in its folder."""
    return json.loads((runs[name] / "data_report.json").read_text())[0]


def assert_says(said: str, *words: str) -> None:
    missing = [word for word in words if word not in said]
    assert not missing, f"{missing} not in:\n{said}"


def test_every_mistake_of_a_recipe_in_one_report(runs: Runs) -> None:
    written = yaml.safe_load(runs.recipe.read_text())
    written["train"] = {"lerning_rate": 1e-3, "batch_size": "many"}
    written["algorithm"]["name"] = "dpoo"
    written["data"][0]["path"] = str(runs["rows.jsonnl"])
    path = runs["mistaken.yaml"]
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    lines = path.read_text().splitlines()
    code, said = alignkit("train", path, said=runs["mistaken.log"])
    assert code == 2
    for key, words in {
        "lerning_rate": ["train.lerning_rate", "unknown key", "did you mean 'learning_rate'"],
        "batch_size": ["train.batch_size", "many"],
        "name: dpoo": ["algorithm.name", "unknown algorithm 'dpoo'", "did you mean 'dpo'"],
    }.items():
        number = next(i for i, line in enumerate(lines, 1) if key in line)
        place = next(line for line in said.splitlines() if f"{path}:{number}:" in line)
        assert_says(place, *words)


def test_missing_data_file(runs: Runs) -> None:
    wrong = runs["rows.jsonnl"]
    assert_says(refused(runs, f"data.0.path={wrong}"), "data.0.path", "missing file", "did you mean 'rows.jsonl'")


def test_missing_model(runs: Runs) -> None:
    assert_says(
        refused(runs, f"model.name_or_path={runs['modell']}"),
        "model.name_or_path",
        "missing file",
        "did you mean 'model'",
    )
    said = refused(runs, "model.name_or_path=nobody/nothing")
    assert_says(said, "model.name_or_path: cannot load", "'nobody/nothing'", "Expected a folder with config.json")


def test_missing_column(runs: Runs) -> None:
    path = runs.write_rows("half.jsonl", [{"prompt": "p", "chosen": "A", "rejcted": "b"}])
    said = refused(runs, f"data.0.path={path}")
    assert_says(said, str(path), "missing: rejected (did you mean 'rejcted'?)", "fields: {rejected: rejcted}")


def test_rows_of_another_kind(runs: Runs) -> None:
    path = runs.write_rows("answers.jsonl", [{"prompt": "p", "completion": "A"}])
    assert_says(refused(runs, f"data.0.path={path}"), "data.0", str(path), "dpo needs 2 completions a prompt")


def test_broken_line(runs: Runs) -> None:
    path = runs.write_rows("torn.jsonl", [PAIR, PAIR])
    path.write_text(path.read_text() + '{"prompt": "p", "cho')
    assert_says(
        refused(runs, f"data.0.path={path}"), f"{path}: line 3 is not valid JSON", "Expected one JSON object a line"
    )


def test_unusable_rows_are_dropped_counted_and_shown(runs: Runs) -> None:
    rows = [
        *runs.rows,
        {"id": "silent", "prompt": "p", "chosen": " ", "rejected": "b"},
        {"id": "twins", "prompt": "p", "chosen": "Same", "rejected": "Same"},
        {"id": "hole", "prompt": "p", "chosen": "A", "rejected": None},
        {"id": "giant", "prompt": "p", "chosen": "A" * 90, "rejected": "b"},
        {"id": "talkative", "prompt": "q" * 90 + "END", "chosen": "Yes", "rejected": "no"},
    ]
    path = runs.write_rows("mixed.jsonl", rows)
    code, said = runs.train("mixed", f"data.0.path={path}", "train.max_steps=1")
    assert code == 0, said
    report = dropped(runs, "mixed")
    assert (report["rows"], report["kept"]) == (12, 8)
    assert {name: (tally["count"], tally["examples"]) for name, tally in report["dropped"].items()} == {
        "empty completion": (1, ["line 8 (id silent)"]),
        "equal completions": (1, ["line 9 (id twins)"]),
        "missing value": (1, ["line 10 (id hole): no `rejected`"]),
        "overlong": (1, ["line 11 (id giant): 1 prompt and 91 completion tokens, room for 64"]),
    }
    assert report["changed"]["prompt cut"] == {"count": 1, "examples": ["line 12 (id talkative)"]}
    assert_says(
        said, "12 rows as preference, 8 kept", "empty completion", "equal completions", "overlong", "prompt cut"
    )


def test_an_overlong_prompt_keeps_its_end(runs: Runs) -> None:
    from alignkit.data.config import DataConfig
    from alignkit.data.groups import load_groups
    from alignkit.models.config import ModelConfig
    from alignkit.models.load import load_renderer

    path = runs.write_rows("long.jsonl", [{"prompt": "q" * 90 + "END", "chosen": "Yes", "rejected": "no"}])
    renderer = load_renderer(ModelConfig(name_or_path=str(runs.model)))
    (group,), _ = load_groups(DataConfig(path=str(path)), renderer, max_length=16)
    whole = [group.prompt + completion.tokens for completion in group.completions]
    assert [len(tokens) for tokens in whole] == [16, 15]
    assert renderer.decode(group.prompt).endswith("qqqEND")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "", "rejected": "b"}, "empty completion"),
        ({"chosen": "Same", "rejected": "Same"}, "equal completions"),
        ({"chosen": "A" * 90, "rejected": "b"}, "overlong"),
    ],
)
def test_nothing_but_unusable_rows_is_refused(runs: Runs, row: dict[str, str], reason: str) -> None:
    path = runs.write_rows("unusable.jsonl", [{"prompt": f"p{i}", **row} for i in range(4)])
    said = refused(runs, f"data.0.path={path}")
    assert_says(said, f"{path}: no usable row is left of 4", f"4 (100.0 %)  {reason}", "line 1", "line 3", "; …")


def test_too_many_unusable_rows_are_refused(runs: Runs) -> None:
    path = runs.write_rows("poor.jsonl", [PAIR, {**PAIR, "chosen": "no"}])
    said = refused(runs, f"data.0.path={path}", "data.0.max_bad_fraction=0.2")
    assert_says(said, "50.0 % of the rows are unusable", "max_bad_fraction: 0.2", "equal completions")


def test_length_beyond_the_context_of_the_model(runs: Runs) -> None:
    said = refused(runs, "train.max_length=129")
    assert_says(said, "train.max_length: 129 tokens, but the model was built for 128", "at most 128")


def test_output_dir_that_holds_a_run(runs: Runs, whole: Whole) -> None:
    folder = whole("full")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, said = runs.train(folder.name)
    assert code == 2
    assert_says(said, f"output_dir: {folder} holds a run already", f"alignkit resume {folder}", "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_output_dir_that_holds_checkpoints_of_something_else(runs: Runs) -> None:
    (runs["foreign"] / "checkpoint-500").mkdir(parents=True)
    assert_says(refused(runs, name="foreign"), str(runs["foreign"]), "holds checkpoints", "Choose another")
    assert (runs["foreign"] / "checkpoint-500").is_dir()


def test_resume_of_a_folder_that_is_no_run(runs: Runs) -> None:
    runs["empty"].mkdir()
    code, said = runs.resume("empty")
    assert code == 2
    assert_says(said, f"error: {runs['empty']} is not a run folder", "recipe.resolved.yaml")
    code, said = runs.resume("nowhere")
    assert code == 2
    assert_says(said, "there is no run folder", str(runs["nowhere"]))


def test_resume_with_another_recipe_shows_the_difference(runs: Runs, whole: Whole) -> None:
    folder = shutil.copytree(whole("full"), runs["changed"])
    code, said = runs.train("changed", "train.learning_rate=0.1", "algorithm.beta=0.3", "--resume")
    assert code == 2
    assert_says(
        said, "not the one this run began with", "algorithm.beta: 0.1 → 0.3", "train.learning_rate: 0.005 → 0.1"
    )
    assert "save_steps" not in said
    assert checkpoints(folder) == checkpoints(whole("full"))


def test_resume_with_changed_data_is_refused(runs: Runs) -> None:
    path = runs.write_rows("growing.jsonl", runs.rows)
    runs.train("growing", f"data.0.path={path}", plant=(plants.kill_in_step, 6))
    runs.write_rows("growing.jsonl", [*runs.rows, PAIR])
    code, said = runs.resume("growing")
    assert code == 2, said
    assert_says(said, str(path), "these are not the rows this run began with", "another output_dir")
    assert Path(runs["growing"] / "checkpoint-4").is_dir()
