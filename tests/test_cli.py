"""The command line, as a process where its promises are about processes, in-process elsewhere."""

import gzip
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest

import alignkit
from alignkit import cli
from alignkit.core.errors import EnvironmentProblem, RecipeError, RunFailed
from alignkit.dist.config import DistConfig
from alignkit.models.config import ModelConfig
from alignkit.plan import LAYOUTS, check, count_rows
from alignkit.recipe import load_recipe, shipped_recipes

HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "matplotlib")
RECIPE = "output_dir: run\nmodel: {name_or_path: o/m}\ndata: [{path: pairs.jsonl}]\nalgorithm: {name: dpo}\n"
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    Path("pairs.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(70)), encoding="utf-8")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `alignkit ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["alignkit", *arguments])
    cli._Verbosity.verbose = cli._Verbosity.quiet = False
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def imported_by(*arguments: str) -> tuple[int, float, set[str]]:
    """Exit code, processor seconds, and which heavy packages `alignkit ARGUMENTS` imported, in a process of its own.

    Processor time: what else the machine is doing does not count.
    """
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', *[m for m in {HEAVY} if m in sys.modules], file=sys.stderr))\n"
        "from alignkit.cli import main\n"
        f"sys.argv = ['alignkit', *{list(arguments)}]\n"
        "main()\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    last = done.stderr.splitlines()[-1].split()
    assert last[0] == "HEAVY", done.stderr
    return done.returncode, seconds, set(last[1:])


def fake_run(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Stands in for alignkit.run, which would import torch."""
    module = ModuleType("alignkit.run")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "alignkit.run", module)
    monkeypatch.setattr(alignkit, "run", module, raising=False)


class Result:
    """What alignkit.run.train returns, as far as the command line reads it."""

    folder = Path("run")
    report = Path("run/report.html")
    best: Path | None = None


@pytest.mark.parametrize(
    ("arguments", "code", "limit"),
    [
        (["--help"], 0, 1.0),
        (["algorithms", "show", "dpo"], 0, 2.0),
        (["recipes", "schema"], 0, 2.0),
        (["train", "r.yaml", "train.lerning_rate=1"], 2, 2.0),
        (["train", "r.yaml", "data.0.path=pears.jsonl"], 2, 2.0),
        (["check", "r.yaml"], 0, 2.0),
        (["report", "nowhere"], 2, 2.0),
        (["data", "lint", "pairs.jsonl"], 0, 2.0),
        (["data", "convert", "pairs.jsonl", "out.jsonl", "--to", "unpaired"], 0, 2.0),
        (["data", "convert", "pairs.jsonl", "pairs.jsonl"], 2, 2.0),
    ],
)
def test_light_commands_import_nothing_heavy_and_answer_at_once(arguments: list[str], code: int, limit: float) -> None:
    found, seconds, heavy = imported_by(*arguments)
    assert found == code
    assert heavy == set()
    assert seconds < limit


def test_help_version_and_usage_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "-h") == 0
    assert "train" in capsys.readouterr().out
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"alignkit {alignkit.__version__}\n"
    assert run(monkeypatch, "train") == 2
    assert run(monkeypatch, "tarin", "r.yaml") == 2
    assert run(monkeypatch, "train", "r.yaml", "--nonsense") == 2


def test_every_mistake_is_printed_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "r.yaml", "train.lerning_rate=1", "sed=3") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 2 mistakes in the recipe:\n")
    assert "did you mean 'learning_rate'" in said
    assert "did you mean 'seed'" in said
    assert "Traceback" not in said
    assert run(monkeypatch, "-v", "check", "r.yaml", "sed=3") == 2
    assert "Traceback" in capsys.readouterr().err


def test_only_the_first_process_tells_of_a_bad_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, "train", "r.yaml", "sed=3") == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("loss is nan"), 1),
        (RecipeError("no"), 2),
        (EnvironmentProblem("disk full"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise error

    fake_run(monkeypatch, train=train)
    assert run(monkeypatch, "train", "r.yaml") == code
    assert (f"error: {error}" in capsys.readouterr().err) is (code != 130)


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    fake_run(monkeypatch, train=train)
    monkeypatch.setattr(sys, "argv", ["alignkit", "train", "r.yaml"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_train_passes_recipe_and_flags_and_says_where_things_lie(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def train(recipe: Any, **options: Any) -> Result:
        calls.append((recipe.train.learning_rate, options))
        return Result()

    fake_run(monkeypatch, train=train)
    assert run(monkeypatch, "train", "r.yaml", "train.learning_rate=2e-6", "--overwrite") == 0
    assert calls == [(2e-6, {"resume": False, "overwrite": True, "quiet": False})]
    assert capsys.readouterr().out == "model   run\nreport  run/report.html\n"
    assert run(monkeypatch, "-q", "train", "r.yaml", "--resume") == 0
    assert calls[1][1] == {"resume": True, "overwrite": False, "quiet": True}
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(Result, "best", Path("run/best"))
    assert run(monkeypatch, "train", "r.yaml", "--resume") == 0
    assert capsys.readouterr().out == "model   run\nbest    run/best\nreport  run/report.html\n"
    assert run(monkeypatch, "train", "r.yaml", "--resume", "--overwrite") == 2


def test_resume_and_sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [{"prompt": "Hi", "completion": text, "tokens": [1]} for text in ("there", "you")]
    calls: list[Any] = []

    def sample(*arguments: Any) -> list[dict[str, Any]]:
        calls.append(arguments)
        return drawn

    def train(recipe: Any, *, resume: bool, quiet: bool) -> Result:
        assert resume
        assert not quiet
        return Result()

    loaded = SimpleNamespace(dist=DistConfig(), output_dir="run")
    fake_run(monkeypatch, recipe_of=lambda folder: loaded, train=train, sample=sample)
    Path("run").mkdir()
    assert run(monkeypatch, "resume", "run") == 0
    assert "report  run/report.html" in capsys.readouterr().out
    assert (
        run(monkeypatch, "sample", "run", "--prompt", "Hi", "--num", "2", "--temperature", "0", "--max-tokens", "5")
        == 0
    )
    assert calls == [(Path("run"), ["Hi"], 2, 0.0, 5, None)]
    assert capsys.readouterr().out == "\n> Hi\n  there\n  you\n"
    assert run(monkeypatch, "sample", "run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == drawn
    assert run(monkeypatch, "resume", "rnu") == 2
    assert "did you mean 'run'?" in capsys.readouterr().err


def test_algorithms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "algorithms") == 0
    assert re.search(r"^dpo +Preference pairs", capsys.readouterr().out, re.MULTILINE)
    assert run(monkeypatch, "algorithms", "--json") == 0
    assert {"dpo", "sft"} <= json.loads(capsys.readouterr().out).keys()
    assert run(monkeypatch, "algorithms", "show", "dpo") == 0
    shown = capsys.readouterr().out
    assert "arXiv 2305.18290" in shown
    assert "a number > 0" in shown
    assert "reference.logps" in shown
    assert run(monkeypatch, "algorithms", "show", "dpo", "--json") == 0
    rows = {row["key"]: row["default"] for row in json.loads(capsys.readouterr().out)["config"]}
    assert rows["beta"] == 0.1
    assert run(monkeypatch, "algorithms", "show", "dpoo") == 2
    assert "did you mean 'dpo'" in capsys.readouterr().err


def test_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["recipes"], ["recipes", "list"]):
        assert run(monkeypatch, *arguments) == 0
        listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
        assert listed == set(shipped_recipes())
    assert run(monkeypatch, "recipes", "show", "dpo/stories") == 0
    assert capsys.readouterr().out == shipped_recipes()["dpo/stories"].read_text(encoding="utf-8")
    assert run(monkeypatch, "recipes", "schema") == 0
    assert "properties" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_copied_recipe_is_the_same_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "recipes", "copy", name, "mine.yaml") == 0
    assert load_recipe("mine.yaml") == load_recipe(name)
    assert run(monkeypatch, "recipes", "copy", name, "mine.yaml") == 2
    assert run(monkeypatch, "recipes", "copy", name, "no/folder.yaml") == 2


def test_check_spells_out_the_arithmetic(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.batch_size=32", "train.max_length=512", "train.num_epochs=3", "data.0.weight=0.5"]
    assert run(monkeypatch, "check", "r.yaml", *overrides) == 0
    said = capsys.readouterr().out
    assert "pairs.jsonl: 70 rows, preference (columns prompt, chosen, rejected)" in said
    # 16384 tokens / (512 tokens × 2 rows) = 16 pairs a forward; 32 pairs = 2 forwards; 70 × 0.5 = 35 pairs = 2 steps
    assert "32 × unit of 2 rows an optimizer step; 32 on the only process" in said
    assert "hold 16 × unit of 2 rows at max_length 512; 1 to 2 forwards a step" in said
    assert "35 groups an epoch → 2 steps, the last with 3; × 3 epochs = 6 steps" in said
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "10 or 11 on each of 3 processes" in "\n".join(check(load_recipe("r.yaml", overrides)))
    assert run(monkeypatch, "-q", "check", "r.yaml") == 0
    assert capsys.readouterr().out == ""


EVALUATED = [
    *("eval.data.0.path=pairs.jsonl", "eval.every_steps=5", "eval.num_samples=8", "eval.rewards.0.name=length"),
    *("eval.best_metric=eval_loss", "eval.patience=2", "eval.min_delta=0.01", "output_dir=out"),
]


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ([], ["eval        no held-out data: nothing is evaluated"]),
        (EVALUATED[:1], ["eval        before the first step and after the last"]),
        (
            EVALUATED,
            [
                "eval        before the first step, after every 5 steps and after the last",
                "samples     8 held-out prompts an evaluation, scored by length; eval_win_rate is against the start "
                "model's samples",
                "best        lowest eval_loss: its checkpoint is kept beside the 2 newest, its weights go to out/best; "
                "those of the last step to out",
                "stop        early after 2 evaluations in a row without a gain of more than 0.01",
            ],
        ),
        (
            [*EVALUATED, "eval.opponent=chosen", "eval.best_mode=max", "eval.patience=1", "eval.min_delta=0"],
            [
                "eval        before the first step, after every 5 steps and after the last",
                "samples     8 held-out prompts an evaluation, scored by length; eval_win_rate is against the data's "
                "chosen answers",
                "best        highest eval_loss: its checkpoint is kept beside the 2 newest, its weights go to out/best;"
                " those of the last step to out",
                "stop        early after 1 evaluation in a row without a gain",
            ],
        ),
    ],
)
def test_check_says_what_is_evaluated(overrides: list[str], lines: list[str]) -> None:
    said = check(load_recipe("r.yaml", overrides))
    assert [line for line in said if line.startswith(("eval  ", "samples  ", "best  ", "stop  "))] == lines


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("auto", "a shared prompt once, as far as the model can"),
        ("padded", "padded rows and whole logits"),
        ("packed", "without padding; refused where the model cannot"),
        ("prefix_shared", "a shared prompt once; refused where the model cannot"),
    ],
)
def test_check_says_how_rows_are_laid_out(layout: str, said: str) -> None:
    (line,) = [line for line in check(load_recipe("r.yaml", [f"model.layout={layout}"])) if line.startswith("layout ")]
    assert line.startswith(f"layout      {layout}: ")
    assert said in line


def test_every_layout_has_its_words() -> None:
    assert LAYOUTS.keys() == set(get_args(ModelConfig.model_fields["layout"].annotation))


@pytest.mark.parametrize(
    ("row", "overrides", "said"),
    [
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, [], "chosen (did you mean 'choosen'?)"),
        (
            {"prompt": "p", "response": "a", "helpfulness": 3},
            [],
            "become pairs by `alignkit data convert IN OUT --to preference`",
        ),
        ({"text": "t"}, [], "dpo learns from preference or ranked rows; these are 'text' rows"),
        (PAIR, ["data.0.format=ranked"], "`format: ranked` needs columns that are not there"),
        (PAIR, ["data.0.fields.prompt=question"], "names a column that is not there"),
        (PAIR, ["data.0.split=test"], "a single file has no split 'test'"),
    ],
)
def test_check_looks_at_columns(
    row: dict[str, str],
    overrides: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert run(monkeypatch, "check", "r.yaml", *overrides) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "  r.yaml:3:15  data.0  " in told


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (
            "[{name: exact}]",
            "it reads the column 'answer', which pairs.jsonl lacks; there are prompt, chosen, rejected",
        ),
        ("[{name: exact, args: {column: prompt}}]", None),
        ("[{name: judge, args: {template: nowhere.txt}}]", "there is no template 'nowhere.txt'"),
        ("[{name: judge, args: {model: referense}}]", "which nothing says where to find; did you mean 'reference'?"),
        ("[{name: judge, args: {model: reference}}]", None),
        ("[{name: self_referee}, {name: implicit}]", None),
        ("[{name: length}, {name: judge, args: {model: jury}}]", "others stand in the recipe: `models: {jury: {from:"),
    ],
)
def test_check_makes_the_rewards(
    rewards: str, said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = ["eval.data=[{path: pairs.jsonl}]", "eval.num_samples=2", f"eval.rewards={rewards}"]
    assert run(monkeypatch, "check", "r.yaml", *sampled) == (0 if said is None else 2)
    told = capsys.readouterr().err
    assert said is None or (said in told and f"eval.rewards.{rewards.count('}, {')}  " in told)


def test_check_reads_csv_headers_and_says_what_it_does_not_read() -> None:
    with gzip.open("pairs.csv.gz", "wt", encoding="utf-8") as file:
        file.write("question,chosen,rejected\np,a,b\n")
    lines = check(load_recipe("r.yaml", ["data.0.path=pairs.csv.gz", "data.0.fields.prompt=question"]))
    assert "data.0      pairs.csv.gz: preference (columns chosen, rejected, prompt)" in lines
    Path("pairs.parquet").touch()
    lines = check(load_recipe("r.yaml", ["data.0.path=pairs.parquet", "data.1.path=owner/hub"]))
    assert "data.0      pairs.parquet: unchecked, is not looked into before the run" in lines
    assert "data.1      owner/hub: unchecked, is looked for on the hub" in lines
    with pytest.raises(RecipeError, match=r"fields: \{prompt: qestion\}` names a column .* Did you mean 'question'"):
        check(load_recipe("r.yaml", ["data.0.path=pairs.csv.gz", "data.0.fields.prompt=qestion"]))


def test_check_finds_a_folder_without_a_model_and_a_broken_file() -> None:
    Path("model").mkdir()
    with pytest.raises(RecipeError, match=r"override 'model\.name_or_path=model'.*holds no config\.json"):
        check(load_recipe("r.yaml", ["model.name_or_path=model"]))
    Path("broken.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(RecipeError, match=r"broken\.jsonl\.gz"):
        check(load_recipe("r.yaml", ["data.0.path=broken.jsonl.gz"]))


def test_check_reads_foreign_layouts() -> None:
    turn = {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}}
    row = turn | {"rejected": {"from": "gpt", "value": "b"}}
    Path("pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert "1 rows, preference (columns prompt, chosen, rejected)" in "\n".join(check(load_recipe("r.yaml")))
    Path("alpaca.csv").write_text("instruction,chosen,rejected\nq,a,b\n", encoding="utf-8")
    lines = check(load_recipe("r.yaml", ["data.0.path=alpaca.csv"]))
    assert "data.0      alpaca.csv: preference (columns prompt, chosen, rejected)" in lines
    Path("alpaca.csv").write_text("instruction,chosen,rejected\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="holds no rows"):
        check(load_recipe("r.yaml", ["data.0.path=alpaca.csv"]))


def test_data_lint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "data", "lint", "pairs.jsonl") == 0
    said = capsys.readouterr().out
    assert said.startswith("pairs.jsonl: 70 rows as preference, 2 warnings\n")
    assert "warning  duplicate rows           69 of 70 (98.6 %)" in said
    assert run(monkeypatch, "data", "lint", "pairs.jsonl", "--eval", "pairs.jsonl", "--strict", "--json") == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["findings"][-1]["check"] == "overlap with evaluation"
    Path("one.jsonl").write_text('{"question": "p", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    assert run(monkeypatch, "data", "lint", "one.jsonl", "--fields", "prompt=question", "--strict") == 0


def test_data_lint_of_a_recipe_counts_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from alignkit.testing import build_tiny_model

    model = str(build_tiny_model(Path("model")))
    overrides = [f"model.name_or_path={model}", "train.max_length=64", "eval.data=[{path: pairs.jsonl}]"]
    assert run(monkeypatch, "data", "lint", "r.yaml", *overrides, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["unit"] == "tokens"
    found = {finding["check"]: finding["count"] for finding in report["findings"]}
    assert (found["truncated prompts"], found["overlap with evaluation"]) == (0, 70)
    assert run(monkeypatch, "data", "lint", "pairs.jsonl", "--tokenizer", model, "--max-length", "2") == 0
    assert "warning  overlong answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lint", "r.yaml", "--eval", "pairs.jsonl"], "a recipe says by itself"),
        (["lint", "pairs.jsonl", "train.max_length=3"], "pairs.jsonl is not a recipe"),
        (["lint", "pairs.jsonl", "--max-length", "9"], "say whose with --tokenizer MODEL"),
        (["lint", "pairs.jsonl", "--format", "sharegtp"], "did you mean 'sharegpt'?"),
        (["lint", "pairs.jsonl", "--fields", "prompt"], "--fields prompt: expected OURS=THEIRS"),
        (["lint", "pears.jsonl"], "Did you mean pairs.jsonl?"),
        (["convert", "pairs.jsonl", "out.jsonl", "--to", "rankd"], "did you mean 'ranked'?"),
        (["convert", "pairs.jsonl", "out.txt"], "unknown file type to write"),
        (["convert", "pairs.jsonl", "out.jsonl", "--operation", "reward_augmnt"], "did you mean 'reward_augment'?"),
        (["convert", "pairs.jsonl", "out.jsonl", "--operation", "{name: reward_augment, gap: 1}"], "gap"),
        (["convert", "pairs.jsonl", "out.jsonl", "--operation", "{"], "--operation is not YAML"),
    ],
)
def test_data_commands_say_what_is_wrong(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "data", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_data_show_shows_rows_that_a_run_would_stop_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from alignkit.testing import build_tiny_model

    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, [PAIR, PAIR | {"chosen": ""}])), encoding="utf-8")
    overrides = [f"model.name_or_path={build_tiny_model(Path('model'))}", "data.0.max_bad_fraction=0"]
    assert run(monkeypatch, "data", "show", "r.yaml", *overrides) == 0
    said = capsys.readouterr().out
    assert "dropped      1 (50.0 %)  empty completion" in said
    assert "chosen · " in said


def test_data_convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "data", "convert", "pairs.jsonl", "out.jsonl", "--to", "unpaired") == 0
    said = capsys.readouterr().out
    assert said.startswith("pairs.jsonl: 70 rows as preference → 140 rows as unpaired\n  nothing is lost\n")
    assert run(monkeypatch, "data", "convert", "out.jsonl", "back.jsonl", "--to", "preference", "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == 70
    assert Path("back.jsonl").read_bytes() == Path("pairs.jsonl").read_bytes()
    assert run(monkeypatch, "data", "convert", "pairs.jsonl", "out.jsonl") == 2
    assert "exists already" in capsys.readouterr().err
    assert run(monkeypatch, "-q", "data", "convert", "pairs.jsonl", "out.jsonl", "--overwrite") == 0
    assert capsys.readouterr().out == ""


def test_data_convert_writes_what_an_operation_yields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = PAIR | {"score_chosen": 8.0, "score_rejected": 3.0}
    Path("scored.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    operation = "{name: reward_augment, placement: user_prefix, text: 'goal {goal}', separator: ' '}"
    assert run(monkeypatch, "data", "convert", "scored.jsonl", "out.jsonl", "--operation", operation) == 0
    assert "1 rows as preference → 2 rows as preference" in capsys.readouterr().out
    high, low = map(json.loads, Path("out.jsonl").read_text(encoding="utf-8").splitlines())
    assert (high["prompt"], high["chosen"], high["rejected"], high["score_chosen"]) == ("goal 8 p", "a", "b", 8.0)
    assert (low["prompt"], low["chosen"], low["rejected"], low["score_chosen"]) == ("goal 3 p", "b", "a", 3.0)


def test_rows_are_counted_up_to_the_limit() -> None:
    recipe = load_recipe("r.yaml", ["data.0.limit=50"])
    assert count_rows(recipe.data[0]) == 50
    assert count_rows(load_recipe("r.yaml", ["data.0.split=train[:10]"]).data[0]) is None


def test_the_console_script_ends_with_the_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alignkit", "check", "r.yaml", "algorithm.name=dpoo"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 2
    said = "override 'algorithm.name=dpoo'  algorithm.name  unknown algorithm 'dpoo': did you mean 'dpo'?"
    assert said in done.stderr
    assert "\x1b" not in done.stderr
