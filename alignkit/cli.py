"""The command line. Nothing heavy is imported before a command needs it: help and a bad recipe answer at once."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import alignkit
from alignkit.core.errors import AlignkitError, Interrupted, RecipeError
from alignkit.dist.launcher import adopt_launcher, launched_rank

if TYPE_CHECKING:
    from alignkit.core.config import Config
    from alignkit.data.config import DataConfig
    from alignkit.recipe import Recipe
    from alignkit.run import RunResult

SETTINGS = {"help_option_names": ["-h", "--help"]}


def _group(text: str, **options: Any) -> typer.Typer:
    return typer.Typer(
        help=text,
        context_settings=SETTINGS,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        add_completion=False,
        **options,
    )


app = _group("Preference optimization: every method one recipe away.", no_args_is_help=True)
algorithms = _group("The methods a recipe can name.", invoke_without_command=True)
recipes = _group("Shipped recipes, and the schema of yours.", invoke_without_command=True)
data = _group("Look at data as the model will see it, judge it, and bring it into another shape.", no_args_is_help=True)
rewards = _group("What a recipe can score answers by, and whether it can be cheated.", invoke_without_command=True)
rollout = _group("Who writes the completions of a run.", no_args_is_help=True)
app.add_typer(algorithms, name="algorithms")
app.add_typer(recipes, name="recipes")
app.add_typer(rewards, name="rewards")
app.add_typer(data, name="data")
app.add_typer(rollout, name="rollout")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=v", help="Settings to change: train.learning_rate=2e-6")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: the output_dir of a recipe.")]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Processes to start on this machine; none = one for each CUDA device, 1 = only this one."),
]
HeadWeights = Annotated[
    str | None,
    typer.Option(
        metavar="a=1,b=0", help="What each output layer counts, of a model with several; none = all the same."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Format = Annotated[str, typer.Option("--format", help="Shape or layout of the rows; auto looks at columns and rows.")]
Fields = Annotated[
    list[str] | None, typer.Option("--fields", metavar="OURS=THEIRS", help="Column names, as `fields` of a data entry.")
]


class _Verbosity:
    """-v and -q, as `main` needs them after the command is done."""

    verbose = False
    quiet = False


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"alignkit {alignkit.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print results and errors only.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Preference optimization: every method one recipe away."""
    del local_rank  # `deepspeed` says it here and in the environment
    _Verbosity.verbose, _Verbosity.quiet = verbose, quiet


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in output_dir if there is one.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Throw away the run in output_dir if there is one.")] = False,
    processes: Processes = None,
) -> None:
    """Run a recipe, on all devices of this machine."""
    adopt_launcher()
    if resume and overwrite:
        raise RecipeError("--resume continues the run in output_dir and --overwrite throws it away; choose one")
    loaded = _load(recipe, overrides)
    flags = ["--resume"] * resume + ["--overwrite"] * overwrite
    _start_processes(loaded, processes, ["train", recipe, *(overrides or ()), *flags], resume=resume)
    from alignkit import run

    _print_result(run.train(loaded, resume=resume, overwrite=overwrite, quiet=_Verbosity.quiet))


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="80GB", help="Memory of a GPU: exit with 2, and say what helps, if too small.")
    ] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Processes of the run; none = the recipe's.")] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, help="The model's config.json, where the model is not here.")
    ] = None,
) -> None:
    """Say what a recipe will do and take, or all that is wrong."""
    from alignkit.memory.given import parse_memory

    available = parse_memory(gpu_memory) if gpu_memory is not None else None
    loaded = _load(recipe, overrides)
    from alignkit import plan

    lines = [*plan.check(loaded, world_size), *plan.check_tokens(loaded)]
    told, error = plan.check_memory(loaded, world_size, available=available, config=config)
    if not _Verbosity.quiet:
        typer.echo("\n".join([*lines, *told, *([] if error else ["ok"])]))
    if error is not None:
        raise RecipeError(error)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has for a run, what it lacks, and what helps."""
    from alignkit.doctor import examine

    found = examine()
    typer.echo(json.dumps(found.to_json(), ensure_ascii=False, indent=1) if as_json else "\n".join(found.lines()))


@app.command("resume")
def resume_run(run: Run, processes: Processes = None) -> None:
    """Continue a run from its newest valid checkpoint, on as many processes as before."""
    adopt_launcher()
    _must_exist(run)
    from alignkit.run import recipe_of, train

    loaded = recipe_of(run)
    _start_processes(loaded, processes, ["resume", str(run)], resume=True)
    _print_result(train(loaded, resume=True, quiet=_Verbosity.quiet))


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]) -> None:
    """Write the report of a run, or compare several."""
    for run in runs:
        _must_exist(run)
    from alignkit.track.report import write_report

    typer.echo(write_report(runs))


@app.command()
def sample(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times; none = held-out ones.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Completions a prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 = the most likely token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a completion.")] = None,
    head_weights: HeadWeights = None,
    as_json: AsJson = False,
) -> None:
    """Draw completions from a run's model."""
    weights = _read_weights(head_weights)
    _must_exist(run)
    from alignkit.run import sample as draw

    drawn = draw(run, prompt or (), num, temperature, max_tokens, weights)
    if as_json:
        typer.echo(json.dumps(drawn, ensure_ascii=False, indent=1))
        return
    for number, found in enumerate(drawn):
        if number == 0 or found["prompt"] != drawn[number - 1]["prompt"]:
            typer.echo(typer.style(f"\n> {found['prompt']}", bold=_coloured()))
        typer.echo(f"  {found['completion']}")


@app.command()
def export(
    run: Run,
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    head_weights: HeadWeights = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; none = the recipe's.")] = None,
) -> None:
    """Write a run's model for plain transformers: adapters merged, heads mixed."""
    weights = _read_weights(head_weights)
    _must_exist(run)
    from alignkit.run import export as write

    typer.echo(write(run, destination, head_weights=weights, dtype=dtype))


@algorithms.callback()
def list_algorithms(context: typer.Context, as_json: AsJson = False) -> None:
    """The methods a recipe can name."""
    if context.invoked_subcommand is not None:
        return
    from alignkit.core.registry import register

    entries = {name: register.algorithm.get(name) for name in register.algorithm.names()}
    plain = {entry.target: name for name, entry in entries.items() if not entry.preset}
    found = {
        name: f"{plain[entry.target]} with {', '.join(f'{key} {value}' for key, value in entry.preset.items())}"
        if entry.preset and entry.target in plain
        else _first_line(entry.target)
        for name, entry in entries.items()
    }
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    _print_table([[name, line] for name, line in found.items()])


@algorithms.command("show")
def show_algorithm(name: str, as_json: AsJson = False) -> None:
    """What a method is, its config with defaults and bounds, and what it needs."""
    import inspect

    from alignkit.recipe import config_type, find_algorithm

    entry = find_algorithm(name)
    needs = {
        key: sorted(value) if isinstance(value, frozenset) else value for key, value in vars(entry.target.needs).items()
    }
    rows = _key_rows(config_type(entry), entry.preset, name)
    module = inspect.getmodule(entry.target)
    about = inspect.getdoc(module) or inspect.getdoc(entry.target) or ""
    if as_json:
        shown = {"name": name, "about": about, "config": rows, "needs": needs, "preset": dict(entry.preset)}
        typer.echo(json.dumps(shown, ensure_ascii=False, indent=1, default=str))
        return
    typer.echo(f"{name}\n\n{about}\n\nalgorithm:")
    _print_keys(rows)
    typer.echo("\nneeds:")
    _print_table([[f"  {key}", _yaml(value)] for key, value in needs.items()])


@rewards.callback()
def list_rewards(context: typer.Context, as_json: AsJson = False) -> None:
    """What a recipe can score answers by."""
    if context.invoked_subcommand is None:
        _print_rewards(as_json)


@rewards.command("list")
def list_rewards_too(as_json: AsJson = False) -> None:
    """List the rewards a recipe can name."""
    _print_rewards(as_json)


@rewards.command("show")
def show_reward(name: str, as_json: AsJson = False) -> None:
    """What a reward is, and its `args` with defaults and bounds."""
    import inspect

    from alignkit.core.registry import register

    entry = register.reward.get(name)
    takes_args = isinstance(entry.target, type) and hasattr(entry.target, "config_type")
    rows = _key_rows(entry.target.config_type, entry.preset, name) if takes_args else []
    about = inspect.getdoc(entry.target) or ""
    if as_json:
        typer.echo(json.dumps({"name": name, "about": about, "args": rows}, ensure_ascii=False, indent=1, default=str))
        return
    typer.echo(f"{name}\n\n{about}\n\nargs:{'' if rows else ' none'}")
    _print_keys(rows)


@rewards.command("probe")
def probe_rewards(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each data entry.")] = 64,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a cheap text wins on average.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score cheap texts beside the data's real answers, before training finds them."""
    loaded = _load(recipe, overrides)
    from alignkit.probe import probe_recipe

    found = probe_recipe(loaded, rows)
    typer.echo(json.dumps(found.to_json(), ensure_ascii=False, indent=1) if as_json else "\n".join(found.lines()))
    if strict and found.kinds("ahead"):
        raise typer.Exit(1)


@recipes.callback()
def list_recipes(context: typer.Context) -> None:
    """The recipes that come with alignkit."""
    if context.invoked_subcommand is None:
        _print_recipes()


@recipes.command("list")
def list_recipes_too() -> None:
    """List the shipped recipes."""
    _print_recipes()


@recipes.command("show")
def show_recipe(name: RecipeArgument) -> None:
    """Print a recipe as it is written."""
    from alignkit.recipe import find_recipe

    typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("copy")
def copy_recipe(
    name: RecipeArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A file or folder.")] = Path(),
) -> None:
    """Copy a shipped recipe to start your own from. Never overwrites."""
    from alignkit.recipe import find_recipe, shipped_recipes

    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise RecipeError(f"{target} exists already; name another file: alignkit recipes copy {name} DEST")
    if not target.parent.is_dir():
        raise RecipeError(f"there is no folder {target.parent} to copy into")
    text = source.read_text(encoding="utf-8")
    for base, path in shipped_recipes().items():  # elsewhere, a base is no longer beside the recipe
        text = text.replace(f"extends: {os.path.relpath(path, source.parent)}\n", f"extends: {base}\n")
    target.write_text(text, encoding="utf-8")
    typer.echo(target)


@recipes.command("schema")
def print_schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from alignkit.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), ensure_ascii=False, indent=1))


@data.command("show")
def show_data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each data entry.")] = 3,
) -> None:
    """Print rows with prompt, trained and masked tokens told apart."""
    loaded = _load(recipe, overrides)
    from rich.console import Console

    from alignkit.data.groups import load_groups
    from alignkit.data.show import print_groups
    from alignkit.models.load import load_renderer

    renderer = load_renderer(loaded.model)
    console = Console(highlight=False, soft_wrap=True)
    for entry in loaded.data:
        everything = entry.model_copy(update={"max_bad_fraction": 1.0})  # to see what is wrong is why one looks
        groups, report = load_groups(everything, renderer, max_length=loaded.train.max_length)
        console.print("\n".join(report.lines()), markup=False)
        print_groups(groups[:rows], renderer.decode, renderer.stop_ids, console)


@data.command("lint")
def lint_data(
    source: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a data file, folder or hub id.")],
    overrides: Overrides = None,
    eval_file: Annotated[
        list[Path] | None, typer.Option("--eval", metavar="FILE", help="Evaluation set of a data file.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Count the tokens of a data file by this model's tokenizer.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and completion, with MODEL.")] = None,
    fields: Fields = None,
    format_: Format = "auto",
    strict: Annotated[bool, typer.Option(help="Exit with 1 when there is a warning.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look for duplicates, contradictions, truncation, biases and leaks."""
    from alignkit.data.lint import lint
    from alignkit.models.config import ModelConfig

    model: ModelConfig | None = None
    if _is_recipe(source):
        if eval_file or tokenizer or max_length or fields or format_ != "auto":
            raise RecipeError("a recipe says by itself what its evaluation set, tokenizer and columns are")
        loaded = _load(source, overrides)
        entries, held_out = loaded.data, loaded.eval.data
        model, max_length = loaded.model, loaded.train.max_length
    else:
        if overrides:
            raise RecipeError(f"{source} is not a recipe, so that {overrides[0]!r} has nothing to change")
        if max_length is not None and tokenizer is None:
            raise RecipeError("--max-length counts tokens: say whose with --tokenizer MODEL")
        entries = [_entry(source, format_, fields)]
        held_out = [_entry(str(path), format_, fields) for path in eval_file or ()]
        if tokenizer is not None:
            model = ModelConfig(name_or_path=tokenizer)
    renderer = None
    if model is not None:
        from alignkit.models.load import load_renderer

        renderer = load_renderer(model)
    reports = [lint(entry, held_out, renderer, max_length) for entry in entries]
    if as_json:
        typer.echo(json.dumps([report.to_json() for report in reports], ensure_ascii=False, indent=1))
    else:
        typer.echo("\n".join(line for report in reports for line in report.lines()))
    if strict and any(report.warnings for report in reports):
        raise typer.Exit(1)


@data.command("convert")
def convert_data(
    source: Annotated[str, typer.Argument(metavar="IN", help="A data file, folder or hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="A .jsonl, .json or .parquet file, also .gz.")],
    to: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="preference, unpaired, ranked or prompt_completion.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Score from which on an answer is labelled true, for unpaired rows.")
    ] = None,
    operation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Operation to apply before; with keys: '{name: NAME, key: value}'."),
    ] = None,
    fields: Fields = None,
    format_: Format = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write rows in another shape, and say what is lost."""
    from alignkit.core.reading import did_you_mean
    from alignkit.data.convert import SOURCES, convert

    if to is not None and to not in SOURCES:
        hint = did_you_mean(to, SOURCES) or f"expected {', '.join(SOURCES)}"
        raise RecipeError(f"--to {to}: rows cannot be written in that shape; {hint}")
    entry = _entry(source, format_, fields, operation)
    target = next((shape for shape in SOURCES if shape == to), None)
    watch = _progress if sys.stderr.isatty() and not _Verbosity.quiet and not as_json else list
    account = convert(entry, destination, target, overwrite=overwrite, threshold=threshold, watch=watch)
    if as_json:
        typer.echo(json.dumps(account.to_json(), ensure_ascii=False, indent=1))
    elif not _Verbosity.quiet:
        typer.echo("\n".join([*account.lines(), f"written  {destination}"]))


@rollout.command("serve")
def serve_rollouts(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    port: Annotated[int | None, typer.Option(min=1, help="Instead of the one in rollout.url.")] = None,
    python: Annotated[str, typer.Option(metavar="PATH", help="A Python that has vLLM.")] = "python",
    flags: Annotated[str, typer.Option(metavar="TEXT", help="More flags for vLLM, as one text.")] = "",
) -> None:
    """Run a vLLM server for the recipe's model until Ctrl-C."""
    import shlex

    try:
        more = shlex.split(flags)
    except ValueError as error:
        raise RecipeError(f"--flags {flags}: {error}") from None
    loaded = _load(recipe, overrides)
    from alignkit.rollout.serve import serve

    serve(
        loaded.model,
        loaded.rollout,
        loaded.train.max_length,
        python=python,
        port=port,
        flags=more,
        ready=lambda url: typer.echo(f"rollout.url={url}"),
    )


@app.command()
def quickstart(
    output_dir: Annotated[Path, typer.Option(help="Where models, data and report go.")] = Path("runs/quickstart"),
) -> None:
    """Build a tiny model and align it: two minutes, no download."""
    from alignkit.quickstart import main as run_quickstart

    run_quickstart(output_dir)


def _load(recipe: str, overrides: list[str] | None) -> Recipe:
    from alignkit.recipe import load_recipe

    return load_recipe(recipe, overrides or (), files=True)


def _start_processes(recipe: Recipe, asked: int | None, arguments: Sequence[str], *, resume: bool) -> None:
    """Run the command in processes of their own and leave, where this one is not to be the run."""
    from alignkit.launch import processes_to_start, run_processes

    count = processes_to_start(recipe, asked, resume=resume)
    if count > 1:
        flags = ["--verbose"] * _Verbosity.verbose + ["--quiet"] * _Verbosity.quiet
        raise typer.Exit(run_processes([*flags, *arguments], count))


def _read_weights(text: str | None) -> dict[str, float] | list[float] | None:
    """`a=1,b=0`, or `1,0` in the order of the heads."""
    if text is None:
        return None
    pairs = [part.rpartition("=") for part in text.split(",")]
    try:
        numbers = [float(number) for _, _, number in pairs]
    except ValueError:
        numbers = []
    named = [name.strip() for name, sign, _ in pairs if sign]
    if not numbers or len(named) not in (0, len(pairs)) or len(set(named)) < len(named):
        raise RecipeError(f"--head-weights {text}: expected a number for each head, as a=1,b=0.5 or 1,0.5")
    return dict(zip(named, numbers, strict=True)) if named else numbers


def _is_recipe(source: str) -> bool:
    from alignkit.recipe import shipped_recipes

    return source.endswith((".yaml", ".yml")) or (source in shipped_recipes() and not Path(source).exists())


def _entry(
    path: str, format_: str, fields: Sequence[str] | None, operations: Sequence[str] | None = None
) -> DataConfig:
    """The data entry that options describe, held to the same rules as one of a recipe."""
    from typing import get_args

    import yaml
    from pydantic import ValidationError

    from alignkit.core.reading import did_you_mean
    from alignkit.data.config import DataConfig, Format

    if format_ not in get_args(Format):
        hint = did_you_mean(format_, get_args(Format)) or f"expected {', '.join(get_args(Format))}"
        raise RecipeError(f"--format {format_}: no such shape or layout; {hint}")
    mapped = [field.partition("=") for field in fields or ()]
    wrong = next((ours for ours, equals, theirs in mapped if not (ours and equals and theirs)), None)
    if wrong is not None:
        raise RecipeError(f"--fields {wrong}: expected OURS=THEIRS, our column and the name it has in the file")
    try:
        named = [item if isinstance(item, dict) else {"name": item} for item in map(yaml.safe_load, operations or ())]
        return DataConfig.model_validate(
            {
                "path": path,
                "format": format_,
                "fields": {ours: theirs for ours, _, theirs in mapped},
                "operations": named,
            }
        )
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
        raise RecipeError(f"the options do not describe data: {found}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"--operation is not YAML: {error}") from None


def _progress(rows: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The rows, with a bar on stderr that follows them."""
    from rich.console import Console
    from rich.progress import track

    return track(rows, "writing", console=Console(stderr=True), transient=True)


def _must_exist(run: Path) -> None:
    """Refuse a misspelt folder before anything heavy is imported."""
    if run.is_dir():
        return
    from alignkit.core.reading import did_you_mean

    beside = [path.name for path in run.parent.iterdir() if path.is_dir()] if run.parent.is_dir() else []
    hint = did_you_mean(run.name, beside)
    raise RecipeError(f"there is no run folder {run}; {hint or 'expected the output_dir of a run'}")


def _print_result(result: RunResult) -> None:
    if launched_rank() == 0 and not _Verbosity.quiet:
        typer.echo(f"model   {result.folder}")
        if result.best is not None:
            typer.echo(f"best    {result.best}")
        if result.report is not None:
            typer.echo(f"report  {result.report}")


def _print_recipes() -> None:
    from alignkit.recipe import shipped_recipes

    rows = []
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        rows.append([name, first.removeprefix("#").strip() if first.startswith("#") else ""])
    _print_table(rows)


def _print_rewards(as_json: bool) -> None:
    from alignkit.core.registry import register

    found = {name: _first_line(register.reward.get(name).target) for name in register.reward.names()}
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        _print_table([[name, line] for name, line in found.items()])


def _key_rows(config: type[Config], preset: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The keys of a component's config, with the defaults that its name stands for."""
    from alignkit.core.reading import describe_type

    rows: list[dict[str, Any]] = []
    for key, info in config.model_fields.items():
        required = info.is_required() and key != "name" and key not in preset
        usual = name if key == "name" else None if required else info.get_default(call_default_factory=True)
        default = preset.get(key, usual)
        expected = describe_type(info.annotation, info.metadata)
        row = {"key": key, "default": default, "type": expected, "description": info.description or ""}
        rows.append({**row, "required": required})
    return rows


def _print_keys(rows: Sequence[Mapping[str, Any]]) -> None:
    defaults = ["required" if row["required"] else _yaml(row["default"]) for row in rows]
    _print_table(
        [[f"  {row['key']}", told, row["type"], row["description"]] for row, told in zip(rows, defaults, strict=True)]
    )


def _print_table(rows: list[list[str]]) -> None:
    """Left-aligned columns, wide enough for each; the last one is never padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        typer.echo(
            "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        )


def _first_line(target: Any) -> str:
    return (target.__doc__ or "").strip().partition("\n")[0]


def _yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def main() -> None:
    """The console entry. Exit codes: 0 ok, 1 run failed, 2 bad recipe or usage, 3 environment, 130 interrupted."""
    try:
        app()
    except AlignkitError as error:
        if _Verbosity.verbose:
            traceback.print_exc()
        elif launched_rank() == 0 or error.exit_code not in (RecipeError.exit_code, Interrupted.exit_code):
            typer.echo(f"error: {error}", err=True)  # every process would say the same of a recipe, and of a signal
        sys.exit(error.exit_code)
