"""Recipes: loading, extending, writing back, and what is said of mistakes."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.algorithms.dpo import DPO, DPOConfig
from alignkit.core import AlgorithmConfig, RecipeError, register
from alignkit.core.registry import Entry
from alignkit.files import is_local
from alignkit.recipe import (
    Recipe,
    check_paths,
    departures,
    dump_recipe,
    find_recipe,
    load_recipe,
    recipe_schema,
    shipped_recipes,
)

MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"name_or_path": "owner/model"},
    "data": [{"path": "owner/pairs"}],
    "algorithm": {"name": "dpo"},
}

FULL = """\
seed: 3
output_dir: runs/full
model:
  name_or_path: owner/model
  dtype: float32
  lora:
    r: 8
    alpha: 16
  chat_template: null
data:
  - path: owner/pairs
    split: train[:10%]
    fields: {prompt: question}
    weight: 0.5
algorithm:
  name: dpo
  beta: .2
models:
  reference:
    from: policy
    precompute: no
train:
  num_epochs: 3
  batch_size: 8
  learning_rate: 1e-6
eval:
  data: [{path: owner/held-out}]
  num_samples: 2
  sampling: {temperature: 0}
  rewards: [{name: word_valence, weight: 2, args: {lexicon: null}}]
track:
  wandb: {project: alignkit}
imports: [json]
env: {ALIGNKIT_TEST: "1"}
"""

SAMPLED = {"data": [{"path": "x"}], "num_samples": 2}


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and a registry, a path and an environment that forget what a recipe did to them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    register.algorithm.names()  # built-ins are found once; they must not be found into the copy
    monkeypatch.setattr(register.algorithm, "_entries", {**register.algorithm._entries})
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    sys.modules.pop("mine_for_test", None)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def mistakes_of(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def changed(**blocks: Any) -> dict[str, Any]:
    return {**MINIMAL, **blocks}


def test_full_recipe_loads_with_the_algorithms_own_config() -> None:
    recipe = load_recipe(write("full.yaml", FULL))
    assert recipe.algorithm == DPOConfig(name="dpo", beta=0.2)
    assert recipe.train.learning_rate == 1e-6
    assert recipe.model.lora is not None
    assert recipe.model.lora.r == 8
    assert recipe.models["reference"].precompute is False
    assert os.environ["ALIGNKIT_TEST"] == "1"


@pytest.mark.parametrize("source", ["file", "mapping"])
def test_written_recipe_reloads_equal(source: str) -> None:
    recipe = load_recipe(write("full.yaml", FULL)) if source == "file" else load_recipe(MINIMAL, ["env.A=1"])
    again = load_recipe(write("again.yaml", dump_recipe(recipe)))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


@pytest.mark.parametrize(
    "text", ["null", "none", "~", "", "on", "1e-6", "0x10", "12", "a: b", "# x", "é\n z ", "'", "[a"]
)
def test_awkward_text_survives_writing(text: str) -> None:
    free = [text, 1e-6, None, True]
    mapping = changed(
        env={"AWKWARD": text.replace("\0", "")},
        eval={
            **SAMPLED,
            "rewards": [{"name": "verl", "args": {"function": "my:f", "kwargs": {text: text, "list": free}}}],
        },
        model={"name_or_path": text, "revision": text},
    )
    recipe = load_recipe(mapping)
    again = load_recipe(write("again.yaml", dump_recipe(recipe)))
    assert again == recipe
    assert again.model.revision == text
    assert again.eval.rewards[0].args == {"function": "my:f", "kwargs": {text: text, "list": free}}


def test_departures_are_what_differs_from_the_defaults() -> None:
    overrides = [
        "algorithm.beta=0.1",
        "train.learning_rate=1e-6",
        "train.batch_size=8",
        "track.wandb={}",
        "model.lora.r=4",
    ]
    recipe = load_recipe(MINIMAL, overrides)
    assert departures(recipe) == {
        "output_dir": "runs/x",
        "model.name_or_path": "owner/model",
        "model.lora.r": 4,
        "data": [{"path": "owner/pairs"}],
        "algorithm.name": "dpo",
        "train.batch_size": 8,
        "track.wandb": {},
    }


def test_presets_stand_below_the_recipe_and_are_no_departure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(register.algorithm._entries, "firm", Entry("firm", DPO, {"beta": 0.5, "label_smoothing": 0.1}))
    recipe = load_recipe(changed(algorithm={"name": "firm", "label_smoothing": 0.2}))
    assert recipe.algorithm == DPOConfig(name="firm", beta=0.5, label_smoothing=0.2)
    assert [key for key in departures(recipe) if key.startswith("algorithm")] == [
        "algorithm.name",
        "algorithm.label_smoothing",
    ]
    direct = Recipe.model_validate(changed(algorithm={"name": "firm"}))
    assert direct.algorithm == DPOConfig(name="firm", beta=0.5, label_smoothing=0.1)
    one = next(c for c in recipe_schema()["properties"]["algorithm"]["oneOf"] if c["title"] == "firm")
    assert one["properties"]["beta"]["default"] == 0.5


MINE = """\
from alignkit.core import Algorithm, AlgorithmConfig, register

class MineConfig(AlgorithmConfig):
    gain: float = 2.0

@register.algorithm("mine_for_test")
class Mine(Algorithm[MineConfig]):
    "Mine."
    def build(self, groups): return []
    def loss(self, out, batch): return {}, {}

def focal(out, batch, config): return {}, {}
"""


def test_own_algorithms_by_import_and_by_path() -> None:
    write("mine_for_test.py", MINE)
    by_path = load_recipe(changed(algorithm={"name": "mine_for_test:Mine", "gain": 3}))
    by_name = load_recipe(changed(algorithm={"name": "mine_for_test"}, imports=["mine_for_test"]))
    assert by_path.algorithm.gain == 3.0  # type: ignore[attr-defined]
    assert by_name.algorithm.gain == 2.0  # type: ignore[attr-defined]
    swapped = load_recipe(changed(algorithm={"name": "dpo", "loss": "mine_for_test:focal"}))
    assert swapped.algorithm.loss == "mine_for_test:focal"
    (line,) = mistakes_of(changed(algorithm={"name": "dpo", "loss": "mine_for_test:focl"}))
    assert "has no 'focl'. Did you mean 'focal'?" in line
    (line,) = mistakes_of(changed(algorithm={"name": "mine_for_test:focal"}))
    assert "expected a subclass of alignkit.Algorithm" in line


def test_extends_merges_mappings_and_replaces_lists() -> None:
    write(
        "base/a.yaml",
        "seed: 1\noutput_dir: a\nmodel: {name_or_path: m, dtype: float32}\ndata: [{path: x}, {path: y}]\n",
    )
    write("base/b.yaml", "extends: a.yaml\nseed: 2\nmodel: {revision: r}\n")
    write("top.yaml", "extends: [base/b.yaml]\nalgorithm: {name: dpo}\ndata: [{path: z}]\nmodel: {dtype: bfloat16}\n")
    recipe = load_recipe("top.yaml", ["seed=9"])
    assert (recipe.seed, recipe.output_dir) == (9, "a")
    assert recipe.model.model_dump(include={"name_or_path", "dtype", "revision"}) == {
        "name_or_path": "m",
        "dtype": "bfloat16",
        "revision": "r",
    }
    assert [entry.path for entry in recipe.data] == ["z"]


def test_mistakes_of_a_base_are_told_at_the_base() -> None:
    write("base.yaml", "output_dir: x\ntrain:\n  lerning_rate: 1\n")
    write(
        "top.yaml",
        "extends: base.yaml\nmodel: {name_or_path: m}\ndata: [{path: x}]\nalgorithm: {name: dpo, betta: 1}\n",
    )
    assert mistakes_of("top.yaml") == [
        "top.yaml:4:24  algorithm.betta  unknown key; did you mean 'beta'?",
        "base.yaml:3:3  train.lerning_rate  unknown key; did you mean 'learning_rate'?",
    ]


def test_extends_in_a_circle_or_to_nowhere_is_refused() -> None:
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    (line,) = mistakes_of("a.yaml")
    assert line.startswith("b.yaml:1:10  extends  goes round in a circle")
    write("c.yaml", "extends: aa.yaml\n")
    (line,) = mistakes_of("c.yaml")
    assert line.startswith("c.yaml:1:10  extends  there is no file aa.yaml")
    assert "did you mean 'a.yaml'" in line
    (line,) = mistakes_of(MINIMAL, "extends=a.yaml")
    assert "works in a file only" in line


def test_extends_finds_shipped_recipes_by_name() -> None:
    name, path = next(iter(shipped_recipes().items()))
    write("top.yaml", f"extends: {name}\nseed: 77\n")
    assert load_recipe("top.yaml") == load_recipe(path, ["seed=77"])


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write("again.yaml", dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lr: 1e-3", "alignkit calls it `train.learning_rate`"),
        ("epochs: 3", "alignkit calls it `train.num_epochs`"),
        ("num_train_epochs: 3", "alignkit calls it `train.num_epochs`"),
        ("per_device_train_batch_size: 3", "alignkit calls it `train.batch_size`"),
        ("model_name_or_path: m", "alignkit calls it `model.name_or_path`"),
        ("lora_r: 4", "alignkit calls it `model.lora.r`"),
        ("max_seq_length: 4", "alignkit calls it `train.max_length`"),
        ("beta: 0.1", "`beta` belongs under `algorithm`"),
        ("learning_rate: 0.1", "`learning_rate` belongs under `train`"),
        ("dtype: float32", "`dtype` belongs under `model`"),
        ("algoritm: {}", "did you mean 'algorithm'?"),
        ("extands: x", "did you mean 'extends'?"),
        ("train: {lr: 1e-3}", "did you mean 'learning_rate'?"),
        ("train: {epochs: 1}", "did you mean 'num_epochs'?"),
        ("train: {seed: 1}", "`seed` belongs at the root of the recipe"),
    ],
)
def test_unknown_keys_are_told_what_they_are_called_here(line: str, said: str) -> None:
    write("r.yaml", yaml.safe_dump(MINIMAL) + line + "\n")
    (told,) = mistakes_of("r.yaml")
    assert "unknown key; " + said in told


@pytest.mark.parametrize(
    ("blocks", "where", "said"),
    [
        ({"algorithm": {"name": "dpoo"}}, "algorithm.name", "unknown algorithm 'dpoo': did you mean 'dpo'?"),
        ({"algorithm": {"beta": 1}}, "algorithm.name", "missing key; it is required (one of aepo, "),
        ({"algorithm": "dpo"}, "algorithm", "got the text 'dpo', expected a mapping with the keys name, loss"),
        ({"algorithm": {"name": 3}}, "algorithm.name", "expected the name of an algorithm"),
        ({"algorithm": {"name": "no_such_mod:X"}}, "algorithm.name", "there is no module 'no_such_mod'"),
        ({"eval": {**SAMPLED, "rewards": [{"name": "word_valance"}]}}, "eval.rewards.0.name", "mean 'word_valence'?"),
        ({"rewards": [{"name": "length"}]}, "rewards", "dpo learns from given completions, which nothing scores"),
        ({"eval": {**SAMPLED, "rewards": [{"name": "nothing"}]}}, "eval.rewards.0.name", "unknown reward 'nothing'"),
        ({"eval": {"num_samples": 4}}, "eval", "num_samples draws from held-out prompts: give `data`"),
        ({"eval": {"rewards": [{"name": "length"}]}}, "eval", "`rewards` score samples, and num_samples is 0"),
        ({"eval": {**SAMPLED, "opponent": "chosen"}}, "eval", "nothing scores them: `rewards`"),
        ({"eval": {"best_metric": "eval_loss"}}, "eval", "best_metric is measured on held-out rows: give `data`"),
        ({"eval": {**SAMPLED, "best_metric": "loss"}}, "eval", "metric: did you mean 'eval_loss'?"),
        ({"eval": {**SAMPLED, "best_metric": "eval_win_rate"}}, "eval", "nothing scores them: give `rewards`"),
        ({"eval": {"data": [{"path": "x"}], "best_metric": "eval_samples/x"}}, "eval", "and num_samples is 0"),
        ({"eval": {**SAMPLED, "best_mode": "max"}}, "eval", "best_mode says how to use best_metric: name one too"),
        ({"eval": {**SAMPLED, "every_steps": 5, "patience": 2}}, "eval", "patience says how to use best_metric"),
        ({"eval": {**SAMPLED, "best_metric": "eval_loss", "patience": 2}}, "eval", "every_steps is 0: say how often"),
        ({"eval": {**SAMPLED, "best_metric": "eval_loss", "min_delta": 1}}, "eval", "give `patience` too"),
        ({"eval": {**SAMPLED, "patience": 0}}, "eval.patience", "got 0, expected a whole number ≥ 1"),
        ({"models": {"refrence": {}}}, "models.refrence", "dpo uses no model 'refrence'; did you mean 'reference'?"),
        ({"data": [{"path": "x", "format": "text"}]}, "data.0.format", "dpo learns from preference or ranked rows"),
        ({"data": []}, "data", "got a list of 0, expected a list of at least 1"),
        ({"imports": ["no_such_mod"]}, "imports.0", "there is no module 'no_such_mod'"),
        ({"seed": -1}, "seed", "got -1, expected a whole number ≥ 0"),
        ({"train": {"learning_rate": "1e-3"}}, "train.learning_rate", "got the text '1e-3', expected a number > 0"),
    ],
)
def test_single_mistakes(blocks: dict[str, Any], where: str, said: str) -> None:
    (line,) = mistakes_of(changed(**blocks))
    assert line.startswith(f"recipe  {where}  ")
    assert said in line


def test_a_report_holds_every_kind_of_mistake() -> None:
    text = "output_dir: x\nmodel: {dtype: half}\ndata: [{path: p}]\n"
    text += "algorithm: {name: dpoo}\nrewards: [{name: nope}]\nmodels: 3\n"
    lines = mistakes_of(write("r.yaml", text), "train.batch_size=0")
    assert [line.split("  ")[:2] for line in lines] == [
        ["r.yaml:2:8", "model.name_or_path"],
        ["r.yaml:2:16", "model.dtype"],
        ["r.yaml:4:19", "algorithm.name"],
        ["r.yaml:5:18", "rewards.0.name"],
        ["r.yaml:6:9", "models"],
        ["override 'train.batch_size=0'", "train.batch_size"],
    ]


def keys_of(text: str) -> list[tuple[int, int, str]]:
    """(line, column, key) of every key the schema knows by name; those of free mappings are the user's own."""
    free = ("fields", "env", "args")
    found = []
    for number, line in enumerate(text.splitlines()):
        for match in re.finditer(r"(\w+):(?= |$)", line):
            if not any(re.search(rf"\b{name}: {{[^}}]*$", line[: match.start()]) for name in free):
                found.append((number, match.start(1), match[1]))
    return found


@pytest.mark.parametrize(("line", "column", "key"), keys_of(FULL))
def test_every_misspelt_key_is_caught_with_its_name(line: int, column: int, key: str) -> None:
    for position in range(len(key)):
        flipped = key[:position] + ("q" if key[position] != "q" else "z") + key[position + 1 :]
        lines = FULL.splitlines(keepends=True)
        lines[line] = lines[line][:column] + flipped + lines[line][column + len(key) :]
        told = mistakes_of(write("r.yaml", "".join(lines)))
        here = [text for text in told if text.startswith(f"r.yaml:{line + 1}:{column + 1}  ") and flipped in text]
        assert len(here) == 1, told
        assert re.search(rf"did you mean .*'{key}'", here[0]), here


def test_the_keys_of_the_full_recipe_are_all_flipped() -> None:
    names = [key for _, _, key in keys_of(FULL)]
    assert len(names) == 40
    assert "question" not in names


def test_missing_files_are_named_with_the_nearest(tmp_path: Path) -> None:
    write("data/pairs.jsonl", "{}")
    write("models/m/config.json", "{}")
    text = (
        "output_dir: x\nmodel: {name_or_path: models/n, chat_template: plain.jinja}\ndata: [{path: data/pair.jsonl}]\n"
    )
    recipe = load_recipe(write("r.yaml", text + "algorithm: {name: dpo}\n"))
    with pytest.raises(RecipeError) as caught:
        check_paths(recipe)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "r.yaml:2:23  model.name_or_path  missing file: there is no 'n' in models; did you mean 'm'?",
        "r.yaml:2:48  model.chat_template  missing file: there is no 'plain.jinja' in the current directory; "
        f"paths start from {tmp_path}",
        "r.yaml:3:15  data.0.path  missing file: there is no 'pair.jsonl' in data; did you mean 'pairs.jsonl'?",
    ]
    check_paths(load_recipe("r.yaml", ["model.name_or_path=models/m", "model.chat_template=null", "data.0.path=o/hub"]))


def test_missing_files_and_other_mistakes_come_in_one_report() -> None:
    text = (
        "output_dir: x\nmodel: {name_or_path: m/o/del}\ndata: [{path: none.jsonl}]\nalgorithm: {name: dpo, betaa: 1}\n"
    )
    write("r.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", ["eval.data.0.path=gone.csv"], files=True)
    lines = [line.strip().split("  ")[:2] for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        ["r.yaml:2:23", "model.name_or_path"],
        ["r.yaml:3:15", "data.0.path"],
        ["r.yaml:4:24", "algorithm.betaa"],
        ["override 'eval.data.0.path=gone.csv'", "eval.data.0.path"],
    ]


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("pairs.jsonl.gz", True),
        ("./pairs", True),
        ("/data/x", True),
        ("owner/name", False),
        ("gpt2", False),
        ("a/b/c", True),
    ],
)
def test_paths_and_hub_ids_are_told_apart(path: str, local: bool) -> None:
    assert is_local(path) is local


def test_the_schema_offers_every_algorithm() -> None:
    schema = recipe_schema()
    titles = [choice["title"] for choice in schema["properties"]["algorithm"]["oneOf"]]
    assert {"dpo", "sft", "your own"} <= set(titles)
    assert schema["properties"]["algorithm"]["oneOf"][0]["properties"]["name"] == {"const": titles[0]}
    assert "extends" in schema["properties"]
    assert schema["additionalProperties"] is False
    references = set(re.findall(r"#/\$defs/(\w+)", str(schema)))
    assert references <= set(schema["$defs"])


def test_recipes_that_do_not_exist_are_answered_with_names() -> None:
    write("mine.yaml", "")
    with pytest.raises(RecipeError, match=r"Did you mean 'mine\.yaml'"):
        find_recipe("mnie.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        find_recipe(".")


def test_a_base_config_is_no_algorithm_block() -> None:
    with pytest.raises(RecipeError):
        Recipe.model_validate(changed(algorithm={"name": "nope"}))
    assert isinstance(Recipe.model_validate(MINIMAL).algorithm, AlgorithmConfig)


SCORED = """\
output_dir: runs/scored
model: {name_or_path: owner/model}
data: [{path: owner/prompts}]
algorithm: {name: self_rewarding}
rewards:
  - name: judge
    args: ARGS
train: {batch_size: 8}
"""


@pytest.mark.parametrize(
    ("args", "mistake"),
    [
        ("{mdoe: pairwise}", "r.yaml:7:12  rewards.0.args.mdoe  unknown key; did you mean 'mode'?"),
        ("{votes: 0}", "r.yaml:7:19  rewards.0.args.votes  got '0', expected a whole number ≥ 1 (judgements of each"),
        ("{scale: [1]}", "r.yaml:7:19  rewards.0.args.scale  got a list of 1, expected a list of 2, each entry a"),
        ("{mode: yes_no, votes: 3}", "r.yaml:7:11  rewards.0.args  votes: mode yes_no reads log-probabilities, and"),
        ("pairwise", "r.yaml:7:11  rewards.0.args  got 'pairwise', expected a mapping of names to anything"),
    ],
)
def test_mistakes_in_the_args_of_a_reward_are_told_where_they_stand(args: str, mistake: str) -> None:
    (found,) = mistakes_of(write("r.yaml", SCORED.replace("ARGS", args)))
    assert found.startswith(mistake)


def test_args_of_a_reward_have_the_types_that_it_declares() -> None:
    text = SCORED.replace("ARGS", "{mode: pairwise, verdict: text, answers: [1, on], temperature: 1e-1, votes: 3}")
    recipe = load_recipe(write("r.yaml", text), ["rewards.0.args.votes=5"])
    given = {"mode": "pairwise", "verdict": "text", "answers": ["1", "on"], "temperature": 0.1, "votes": 5}
    assert recipe.rewards[0].args == given, "nothing is added that was not written"
    assert load_recipe(write("again.yaml", dump_recipe(recipe))) == recipe


def test_a_key_that_a_reward_must_have_and_args_for_a_function() -> None:
    without = SCORED.replace("judge", "http").replace("    args: ARGS\n", "")
    (found,) = mistakes_of(write("r.yaml", without))
    assert found.startswith("r.yaml:6:5  rewards.0.args.url  missing key; it is required (")
    write("mine_for_test.py", "def short(completions):\n    return [1.0 for _ in completions]\n")
    text = SCORED.replace("judge", "mine_for_test:short").replace("ARGS", "{most: 3}")
    (found,) = mistakes_of(write("r.yaml", text))
    assert found.startswith("r.yaml:7:11  rewards.0.args  a plain function takes none; make it a class")
