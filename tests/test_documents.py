"""The documents are true: recipes load, commands parse, links and paths exist, and the worked example trains."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer
import yaml
from pydantic_core import PydanticUndefined

from alignkit import cli, load_recipe, train
from alignkit.core import Config, RecipeError, register
from alignkit.core.reading import type_scalar
from alignkit.data.foreign import LAYOUTS
from alignkit.data.lint import CHECKS
from alignkit.data.report import CHANGED, DROPPED
from alignkit.data.shapes import SHAPES
from alignkit.recipe import Recipe
from alignkit.testing import assert_conforms, build_tiny_model, read_metrics, toy_rows

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BASE = {
    "output_dir": "runs/x",
    "model": {"name_or_path": "owner/model"},
    "data": [{"path": "owner/pairs"}],
    "algorithm": {"name": "dpo"},
}
"""What a shown fragment of a recipe is merged into."""


def blocks(language: str, pages: list[Path] = PAGES) -> list[tuple[str, str]]:
    """(page:number, text) of every fenced block of a language."""
    found = []
    for page in pages:
        texts = [text for name, text in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]
        found += [(f"{page.relative_to(ROOT)}:{number}", text) for number, text in enumerate(texts)]
    return found


def modules() -> dict[str, str]:
    """Path → text of the shown modules, those that begin with their path as a comment."""
    shown = [text.partition("\n") for _, text in blocks("python")]
    return {first.removeprefix("# "): rest for first, _, rest in shown if re.fullmatch(r"# [\w/]+\.py", first)}


@pytest.fixture(autouse=True)
def _reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder in which somebody wrote down the modules that the documents show; registry and path are put back."""
    monkeypatch.chdir(tmp_path)
    for path, text in modules().items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    register.algorithm.names()
    monkeypatch.setattr(register.algorithm, "_entries", {**register.algorithm._entries})
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.mark.parametrize(("where", "text"), blocks("yaml"), ids=[where for where, _ in blocks("yaml")])
def test_shown_recipes_load(where: str, text: str) -> None:
    shown = yaml.safe_load(text)
    if "extends" not in shown and not shown.keys() >= BASE.keys():
        Path("base.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
        text = f"extends: base.yaml\n{text}"
    Path("shown.yaml").write_text(text, encoding="utf-8")
    load_recipe("shown.yaml")


def test_shown_mistakes_are_what_is_said() -> None:
    lines = [
        "output_dir: runs/mine",
        "model: {name_or_path: owner/model}",
        "data: [{path: pairs.jsonl}]",
        "algorithm: {name: dpo, bta: 0.1}",
        "train: {learning_rate: fast}",
    ]
    Path("mine.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine.yaml")
    (shown,) = [text for _, text in blocks("text", [ROOT / "docs" / "recipes.md"]) if text.startswith("error")]
    assert shown == f"error: {caught.value}\n"


def shown_commands() -> list[str]:
    """Every `alignkit …` line of a shell block, comments and launchers left out."""
    lines = [line for _, text in blocks("sh") for line in text.splitlines()]
    found = [re.search(r"(?:^|-m |bin/)(alignkit .*)", line.partition("#")[0]) for line in lines]
    return sorted({match[1].strip() for match in found if match})


def leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command these words name, and the words behind it. Raises KeyError for a verb that does not exist."""
    command, rest = typer.main.get_command(cli.app), words
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        if command.name in ("algorithms", "recipes") and rest[0] not in command.commands:
            break  # these two answer by themselves
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("line", shown_commands())
def test_shown_commands_parse(line: str) -> None:
    command, rest = leaf(shlex.split(line)[1:])
    assert command.make_context(command.name, rest).params is not None


def test_commands_in_running_text_exist() -> None:
    text = "\n".join(BLOCK.sub("", page.read_text(encoding="utf-8")) for page in PAGES)
    named = sorted(set(re.findall(r"`alignkit ([^`]+)`", text)))
    assert len(named) > 10
    for words in named:
        if not words.startswith("-"):
            leaf(words.split())


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in typer.main.get_command(cli.app).commands:  # type: ignore[attr-defined]
        assert f"| `alignkit {verb}" in readme


def test_every_method_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Methods\n")[2].partition("\n## ")[0]
    kind = register.algorithm
    ours = {name for name in kind.names() if kind.get(name).target.__module__.startswith("alignkit.algorithms.")}
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == ours


def test_the_page_of_recipes_is_made_from_what_there_is() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "recipes_page.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "recipes/README.md is up to date\n"), done.stderr


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
    example = re.compile(r"focal|/NAME")
    for path in re.findall(r"`((?:alignkit|tests|docs|recipes|scripts)/[\w/.-]*)`", text):
        assert (ROOT / path).exists() or example.search(path), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def configs(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [inner for argument in get_args(annotation) for inner in configs(argument)]


def keys_of(
    config: type[Config], path: str = "", seen: tuple[type[Config], ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, annotation, default) of a schema; a block that is always there has no line of its own."""
    for name, info in config.model_fields.items():
        key = f"{path}.{info.alias or name}".lstrip(".")
        inner = configs(info.annotation)
        if not inner or info.annotation is not inner[0]:
            yield key, info.annotation, info.get_default(call_default_factory=True)
        for block in inner:
            if block not in seen:
                index = {list: ".N", dict: ".NAME"}.get(get_origin(info.annotation), "")
                yield from keys_of(block, key + index, (*seen, block))


def test_every_key_stands_in_the_table_with_its_default() -> None:
    section = (
        (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("## Every key")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.+?) \|$", section, re.MULTILINE)
    shown = {key: default.strip("`") for key, default, _ in rows}
    assert len(shown) == len(rows)
    assert shown.pop("extends") == "null"
    # blocks that occur more than once are shown once
    once = {"eval.data.N": "data.N", "drift.labels.N": "data.N", "eval.rewards.N": "rewards.N"}
    expected = {
        key: (annotation, default)
        for key, annotation, default in keys_of(Recipe)
        if not any(key.startswith(f"{twice}.") for twice in once)
    }
    assert shown.keys() == expected.keys()
    for key, (annotation, default) in expected.items():
        if default is PydanticUndefined:
            assert shown[key] == "required", key
        elif shown[key] in ("[]", "{}"):
            assert yaml.safe_load(shown[key]) == default, key
        else:
            assert type_scalar(shown[key], annotation) == default, key


def test_every_shape_and_every_reason_is_explained() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    first_cells = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    assert first_cells == {*SHAPES, *LAYOUTS, *DROPPED, *CHANGED, *CHECKS}


def test_quoted_messages_are_said_by_the_code() -> None:
    said = [
        node.value
        for file in (ROOT / "alignkit").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE) + re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        assert any(message in text for text in said), message


EXAMPLE = "my_package/focal.py"


def test_the_worked_example_is_one_short_file() -> None:
    assert len(modules()[EXAMPLE].splitlines()) < 100


def test_the_worked_example_keeps_the_contract(tmp_path: Path) -> None:
    calls = [text for _, text in blocks("python", [ROOT / "CONTRIBUTING.md"]) if "assert_conforms(" in text]
    assert 'assert_conforms("my_package.focal:Focal", config={"gamma": 1})' in calls[0]
    assert_conforms("my_package.focal:Focal", config={"gamma": 1}, folder=tmp_path / "bench", world_size=1)


def test_the_worked_example_trains_by_its_name(tmp_path: Path) -> None:
    (shown,) = [text for _, text in blocks("yaml", [ROOT / "CONTRIBUTING.md"])]
    Path("shown.yaml").write_text(shown, encoding="utf-8")
    model = build_tiny_model(tmp_path / "model")
    overrides = [
        f"model.name_or_path={model}",
        "data.0.path=rows.jsonl",
        f"output_dir={tmp_path / 'run'}",
        "train.max_length=64",
        "train.max_steps=2",
        "train.num_epochs=2",
    ]
    recipe = load_recipe("shown.yaml", overrides)
    rows = toy_rows(register.algorithm.get("focal").target, 5)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = train(recipe, quiet=True)
    records = [record for record in read_metrics(result.folder) if "loss" in record]
    # γ = 1 at the reference: ½ · ln 2, and every pair has the weight ½
    assert records[0]["loss"] == pytest.approx(0.34657359, abs=1e-6)
    assert records[0]["focal/weight"] == pytest.approx(0.5, abs=1e-6)
    assert records[1]["focal/weight"] < 0.5
