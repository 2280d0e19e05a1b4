"""`alignkit rewards`: what there is, what it takes, and whether it can be cheated."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.core import register
from alignkit.testing import build_tiny_model
from tests.test_cli import imported_by, run

LETTERS = [(a, b) for a in "abcdef" for b in "xyz"]
ONLINE = """
from alignkit.core import Algorithm, AlgorithmConfig, Needs


class Online(Algorithm[AlgorithmConfig]):
    needs = Needs(rewards=True)

    def build(self, groups):
        return []

    def loss(self, out, batch):
        return {}, {}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _own_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes for pairs that are judged by what `eval.rewards` says, beside rows that are only asked."""
    monkeypatch.chdir(tmp_path)
    recipe = {
        "output_dir": "run",
        "model": {"name_or_path": str(model)},
        "data": [{"path": "pairs.jsonl"}],
        "algorithm": {"name": "dpo"},
        "train": {"max_length": 512},
        "eval": {
            "data": [{"path": "pairs.jsonl"}],
            "num_samples": 2,
            "rewards": [{"name": "exact", "args": {"column": "gold"}}],
        },
    }
    Path("r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    pairs = [{"prompt": f"{a} before {b}?", "chosen": a + b, "rejected": b + a, "gold": a + b} for a, b in LETTERS]
    write("pairs.jsonl", pairs)
    write("asked.jsonl", [{"prompt": row["prompt"], "answer": row["gold"], "gold": row["gold"]} for row in pairs])
    write("bare.jsonl", [{"prompt": row["prompt"], "gold": row["gold"]} for row in pairs])


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("arguments", [["rewards"], ["rewards", "show", "length"]])
def test_looking_is_light(arguments: list[str]) -> None:
    code, seconds, heavy = imported_by(*arguments)
    assert (code, heavy) == (0, set())
    assert seconds < 2.0


def test_every_reward_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["list"]):
        assert run(monkeypatch, "rewards", *arguments) == 0
        listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert listed == register.reward.names()
        assert run(monkeypatch, "rewards", *arguments, "--json") == 0
        assert list(json.loads(capsys.readouterr().out)) == listed


def test_a_reward_tells_its_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "rewards", "show", "length") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("length\n\nHow long a completion is")
    assert '  form       "count"' in shown
    assert run(monkeypatch, "rewards", "show", "http", "--json") == 0
    keys = {row["key"]: row for row in json.loads(capsys.readouterr().out)["args"]}
    assert keys["url"]["required"]
    assert keys["batch_size"]["default"] == 64
    assert run(monkeypatch, "rewards", "show", "legnth") == 2
    assert "did you mean 'length'" in capsys.readouterr().err


def test_a_function_takes_no_args(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine_shown.py").write_text("def kind(completions):\n    '''Says thanks.'''\n", encoding="utf-8")
    assert run(monkeypatch, "rewards", "show", "mine_shown:kind") == 0
    assert capsys.readouterr().out == "mine_shown:kind\n\nSays thanks.\n\nargs: none\n"


def test_a_sound_reward_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "rewards", "probe", "r.yaml", "--strict") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "18 prompts, 18 of them with a real answer"
    assert "no cheap text beats the real answers" in said


LENGTH = "eval.rewards=[{name: length}]"


def test_a_reward_that_can_be_cheated_fails_where_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "rewards", "probe", "r.yaml", LENGTH) == 0
    # One word is answered; eight are repeated.
    expected = "one word repeated beats the real answers: 8 against 1 on average, ahead on 100 % and level on 0 %"
    assert expected in capsys.readouterr().out
    assert run(monkeypatch, "rewards", "probe", "r.yaml", LENGTH, "--strict", "--json", "--rows", "5") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["answered"]) == (5, 5)
    assert "one word repeated" in found["winners"]
    assert found["examples"]["real answer"] == "ax"


@pytest.mark.parametrize(("file", "answered"), [("asked.jsonl", 18), ("bare.jsonl", 0)])
def test_real_answers_may_stand_in_a_column(
    file: str, answered: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "rewards", "probe", "r.yaml", f"eval.data=[{{path: {file}}}]", "--strict") == 0
    said = capsys.readouterr().out
    assert f"18 prompts, {answered} of them with a real answer" in said
    assert ("nothing to compare with" in said) == (answered == 0)


def test_answers_labelled_undesirable_are_no_real_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{a}?", "completion": "no", "label": a == "c", "gold": b} for a, b in LETTERS]
    write("labelled.jsonl", rows)
    assert run(monkeypatch, "rewards", "probe", "r.yaml", "eval.data=[{path: labelled.jsonl}]", "--json") == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 3


def test_the_rewards_of_training_come_first_and_are_combined_as_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("online_probed.py").write_text(ONLINE, encoding="utf-8")
    overrides = [
        "algorithm={name: 'online_probed:Online'}",
        "data=[{path: asked.jsonl}]",
        "rewards=[{name: exact, args: {column: gold}}, {name: length}]",
    ]
    assert run(monkeypatch, "rewards", "probe", "r.yaml", *overrides, "--json") == 0
    assert "one word repeated" in json.loads(capsys.readouterr().out)["winners"]  # 0 + 8 words against 1 + 1
    assert run(monkeypatch, "rewards", "probe", "r.yaml", *overrides, "combine.mode=product", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["standings"]) == ["all rewards", "exact", "length"]
    assert found["winners"] == []


def test_a_recipe_without_rewards_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "rewards", "probe", "r.yaml", "eval.rewards=[]") == 2
    assert "neither `rewards` nor `eval.rewards`" in capsys.readouterr().err
