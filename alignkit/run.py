"""Run a recipe: its folder, its lock, the loop, the export; resume it; sample from it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors import SafetensorError

import alignkit
from alignkit.assemble import Assembled, assemble, build_algorithm, build_sampler, write_model
from alignkit.core.contracts import Algorithm
from alignkit.core.errors import AlignkitError, DataError, EnvironmentProblem, RecipeError, RunFailed
from alignkit.core.types import Group, Message
from alignkit.data.groups import load_groups
from alignkit.data.operations import build_operation
from alignkit.data.shapes import BadRow, Example
from alignkit.dist.engine import DistEngine
from alignkit.dist.launcher import adopt_launcher, is_lost_peer, launched_rank
from alignkit.loop.checkpoint import disk_problem, find_fault, is_disk_problem
from alignkit.loop.spool import SPOOLED
from alignkit.models.heads import detached, head_names, mixed
from alignkit.models.load import DTYPES, load_renderer, load_writer
from alignkit.models.policy import CausalPolicy
from alignkit.recipe import Recipe, departures, dump_recipe, load_recipe
from alignkit.rollout.guides import GuideConfig
from alignkit.rollout.guides.head_weighted import HeadWeightedConfig, Weights, in_order, weights_mistake
from alignkit.track.card import CardFacts, write_card
from alignkit.track.report import write_report
from alignkit.track.text import number

RECIPE_FILE = "recipe.resolved.yaml"
RUN_FILES = (
    *("recipe.resolved.yaml", "departures.yaml", "run.lock", "data_report.json", "metrics.jsonl", "samples.jsonl"),
    *("checkpoint-*", ".writing-*", "debug", "rollout", "runs", "wandb", "report.html", "README.md"),
    *("best", "best.json", SPOOLED, "rounds.jsonl"),
    *("*.safetensors", "member-*", "critic", "*.safetensors.index.json", "*config.json", "chat_template.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)
"""What a run writes into its folder; whatever else lies there is not ours to remove."""
BOOKKEEPING = ("step", "epoch", "step_time", "perf/tokens_per_second")
LOCKED_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "trl")


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind. `metrics` are the last values of everything it logged.

    `best` is the folder with the weights that did best by `eval.best_metric`; None where the recipe names none.
    """

    folder: Path
    steps: int
    metrics: dict[str, float]
    report: Path | None
    best: Path | None = None


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, quiet: bool = False, report: bool = True
) -> RunResult:
    """Run a recipe to its end.

    Args:
        resume: continue the run in `output_dir` if there is one.
        overwrite: throw away the run in `output_dir` if there is one.
        quiet: no progress on the console.
        report: write report.html at the end.

    Raises:
        RecipeError: `output_dir` holds another run; the recipe does not fit the model or the data.
        DataError: the data is missing or unusable.
        RunFailed, Interrupted, EnvironmentProblem: see `alignkit.core.errors`.
    """
    adopt_launcher()
    folder = Path(recipe.output_dir)
    console = Console(quiet=quiet or launched_rank() > 0, highlight=False, soft_wrap=True)
    resume = _claim_folder(folder, recipe, resume, overwrite)
    dist = DistEngine(DTYPES[recipe.model.dtype], patience=2 * recipe.rollout.deadline, config=recipe.dist)
    try:
        return _train(recipe, folder, dist, console, resume, report)
    except (OSError, SafetensorError) as error:
        if not is_disk_problem(error):
            raise
        raise disk_problem(folder, error) from error
    except RuntimeError as error:
        if dist.world.size == 1 or not is_lost_peer(error):
            raise
        raise RunFailed(
            f"another process of this run is gone, or cannot be reached: {str(error).partition('. ')[0]}. Its own "
            f"words say why; continue from the newest checkpoint with `alignkit resume {folder}`."
        ) from error
    finally:
        dist.release()


def resume(run_dir: str | Path, *, quiet: bool = False, report: bool = True) -> RunResult:
    """Continue a run from its newest valid checkpoint, or from the start if it has none yet."""
    return train(recipe_of(run_dir), resume=True, quiet=quiet, report=report)


def recipe_of(run_dir: str | Path) -> Recipe:
    """The recipe of a run folder, which may have been moved. Raises RecipeError where it is none."""
    folder = Path(run_dir)
    return _recipe_of(folder).model_copy(update={"output_dir": str(folder)})


def _train(recipe: Recipe, folder: Path, dist: DistEngine, console: Console, resuming: bool, report: bool) -> RunResult:
    run = assemble(recipe, dist, console)
    trainer = run.trainer
    _restore(run, folder, console, resuming)
    if dist.is_main:
        _write_facts(recipe, folder, run, dist.world.size)
    run.precompute(console)
    console.print(_headline(recipe, run), markup=False)
    trainer.track.start(
        {
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "algorithm": recipe.algorithm.name,
            "total_steps": trainer.progress.total_steps,
            "start_step": trainer.progress.step,
            "run_id": _run_id(folder),
            "output_dir": str(folder),
            "resumed": trainer.progress.step > 0,
        }
    )
    try:
        trainer.run()
    except (AlignkitError, OSError, SafetensorError):
        # A reward or an engine that gives up leaves the weights as good as they were.
        if trainer.rollouts.unfinished and dist.world.size == 1 and trainer.progress.step > 0:
            trainer.save()
        raise
    except Exception:  # a fault in anybody's code must not cost the steps since the last checkpoint
        if dist.world.size == 1 and trainer.progress.step > 0:  # of several, the others may wait elsewhere
            trainer.save()
        raise
    finally:
        run.close()
    return _finish(recipe, folder, run, console, report)


def sample(
    run_dir: str | Path,
    prompts: Sequence[str] = (),
    num: int = 1,
    temperature: float | None = None,
    max_tokens: int | None = None,
    head_weights: Weights | None = None,
) -> list[dict[str, Any]]:
    """Draw `num` completions for each prompt from a run's model: the finished one, else its newest checkpoint.

    Without prompts, those of the held-out data are used; `head_weights` mix the heads of a model that has several.
    Returns one mapping `{prompt, completion, tokens}` a sample.
    """
    folder = Path(run_dir)
    recipe = _recipe_of(folder)
    if not build_algorithm(recipe).heads().is_language:
        raise RecipeError(f"{folder} holds a model that scores text and writes none, so there is nothing to sample")
    update = {"temperature": temperature, "max_completion_length": max_tokens}
    sampling = recipe.eval.sampling.model_copy(update={k: v for k, v in update.items() if v is not None})
    if head_weights is not None:
        sampling = sampling.model_copy(update={"guides": _weighted(sampling.guides, head_weights)})
    weights = _weights_of(folder)
    model = recipe.model.model_copy(
        update={"name_or_path": str(weights), "chat_template": None, "gradient_checkpointing": False}
    )
    renderer = load_renderer(model)
    if prompts:
        chat = bool(renderer.tokenizer.chat_template)
        texts = [[Message(role="user", content=p)] if chat else p for p in prompts]
        groups = []
        for i, rendered in enumerate(renderer.render([Example(text) for text in texts])):
            if isinstance(rendered, BadRow):
                raise DataError(f"prompt {i + 1} ({prompts[i]!r}) cannot be used: {rendered.reason} {rendered.note}")
            messages = [Message(role="user", content=prompts[i])]
            groups.append(Group(id=str(i), messages=messages, prompt=rendered.prompt))
    else:
        entries = recipe.eval.data or recipe.data
        found = [g for e in entries for g in load_groups(e, renderer, max_length=recipe.train.max_length)[0]]
        groups = [replace(group, completions=[]) for group in found[: max(1, recipe.eval.num_samples or 8)]]
    dist = DistEngine(DTYPES[model.dtype])
    policy = CausalPolicy(load_writer(model, weights).to(dist.device), dist)
    with torch.no_grad(), dist.autocast():
        filled = build_sampler(policy, renderer, sampling, recipe.seed).fill(groups, num)
    return [
        {"prompt": group.messages[-1].get("content", ""), "completion": c.text, "tokens": c.tokens}
        for group in filled
        for c in group.completions
    ]


def export(
    run_dir: str | Path, destination: str | Path, *, head_weights: Weights | None = None, dtype: str | None = None
) -> Path:
    """Write a run's model as one that plain transformers loads: adapters merged, several heads mixed into one.

    Args:
        run_dir: a run folder; its finished model is taken, else its newest checkpoint.
        destination: a folder that does not exist yet, or is empty.
        head_weights: what each head counts; None = all the same.
        dtype: float32 or bfloat16; None = the recipe's.

    Raises:
        RecipeError: there is nothing to export, or `destination` holds something.
    """
    folder, target = Path(run_dir), Path(destination)
    recipe = _recipe_of(folder)
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not build_algorithm(recipe).heads().is_language:
        raise RecipeError(f"{folder} holds a model that scores; plain transformers loads the run folder as it is")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target} exists already; name a new folder")
    weights = _weights_of(folder)
    names = head_names(weights)
    if head_weights is not None and not names:
        raise RecipeError(f"{folder} holds a model with one output layer, so there are no heads to weigh")
    config = recipe.model.model_copy(
        update={
            "name_or_path": str(weights),
            "chat_template": None,
            "gradient_checkpointing": False,
            "lora": None,
            "quantization": None,
        }
    )
    model, renderer = load_writer(config, weights), load_renderer(config)
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with mixed(model, in_order(head_weights, names) if names else None), detached(model):
            model.to(DTYPES[dtype or recipe.model.dtype]).save_pretrained(temporary)
        renderer.tokenizer.save_pretrained(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        if not is_disk_problem(error):
            raise
        raise disk_problem(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _recipe_of(folder: Path) -> Recipe:
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"{folder} is not a run folder: it has no {RECIPE_FILE}. Give the output_dir of a run.")
    return load_recipe(folder / RECIPE_FILE)


def _weighted(guides: Sequence[GuideConfig], weights: Weights) -> list[GuideConfig]:
    """These guides with other head weights."""
    if mistake := weights_mistake(weights):
        raise RecipeError(f"head weights {mistake}")
    given = dict(weights) if isinstance(weights, Mapping) else list(weights)
    others = [guide for guide in guides if not isinstance(guide, HeadWeightedConfig)]
    return [*others, HeadWeightedConfig(name="head_weighted", head_weights=given)]


def _claim_folder(folder: Path, recipe: Recipe, resuming: bool, overwrite: bool) -> bool:
    """Decide whether this run is new or goes on. Only the first rank looks; ranks start at nearly the same time."""
    resolved = folder / RECIPE_FILE
    if launched_rank() > 0:
        return resuming
    if resolved.is_file() and not resuming and not overwrite:
        raise RecipeError(
            f"output_dir: {folder} holds a run already. `alignkit resume {folder}` continues it, `--overwrite` throws "
            "it away, or choose another: output_dir=…"
        )
    if resolved.is_file() and resuming:
        _refuse_changes(load_recipe(resolved), recipe)
        return True
    if not resolved.is_file() and any(folder.glob("checkpoint-*")):
        raise RecipeError(
            f"output_dir: {folder} holds checkpoints but no {RECIPE_FILE}: they are not of alignkit, and would be "
            "rotated away. Choose another: output_dir=…"
        )
    if resolved.is_file() and overwrite:
        for path in (path for pattern in RUN_FILES for path in folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"output_dir: cannot create {folder}: {error.strerror}") from error
    return resuming


def _refuse_changes(before: Recipe, now: Recipe) -> None:
    old, new = (_dotted(r.model_dump(mode="json", by_alias=True)) for r in (before, now))
    # How processes share a run is no part of what it is.
    changed = [
        k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and k != "output_dir" and not k.startswith("dist.")
    ]
    if changed:
        lines = [f"  {k}: {old.get(k)!r} → {new.get(k)!r}" for k in changed]
        raise RecipeError(
            "the recipe is not the one this run began with, so its continuation would be another run:\n"
            + "\n".join(lines)
            + "\nPut these keys back, or start anew in another output_dir."
        )


def _dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, value in tree.items() for k, v in _dotted(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}


def _restore(run: Assembled, folder: Path, console: Console, resuming: bool) -> None:
    trainer = run.trainer
    path = trainer.checkpoints.newest_valid(lambda text: console.print(text, markup=False)) if resuming else None
    if path is None:
        for file in run.files:
            file.fresh()
        trainer.checkpoints.drop_after(-1)
        return
    lock = json.loads((folder / "run.lock").read_text(encoding="utf-8"))
    _refuse_other_data(lock, run)
    if changed := _other_software(lock):
        console.print(
            f"other software than this run began with: {', '.join(changed)}; from here on its bits may differ from an "
            "unbroken run's",
            markup=False,
        )
    if (before := trainer.checkpoints.ranks(path)) != trainer.dist.world.size:
        console.print(
            f"{path} was written by {before} processes, and this run has {trainer.dist.world.size}: it goes on with "
            "the same weights, optimizer state and data order, but not to the same bits as an unbroken run; what was "
            "left of the round in hand is passed over",
            markup=False,
        )
    trainer.checkpoints.load(path, *trainer.parts())
    with trainer.dist.whole(write=True):
        trainer.policy.load(path)
    trainer.checkpoints.drop_after(trainer.progress.step)
    console.print(f"continuing from {path}", markup=False)


def _other_software(lock: Mapping[str, Any]) -> list[str]:
    """What changed since the run began, as `torch 2.13.0 → 2.14.0`."""
    before = {"alignkit": lock["alignkit"], **lock["packages"]}
    now = {"alignkit": alignkit.__version__, **_versions()}
    return [f"{name} {before.get(name)} → {found}" for name, found in now.items() if before.get(name) != found]


def _refuse_other_data(lock: Mapping[str, Any], run: Assembled) -> None:
    if lock["data_sha256"] != _data_sha256([*run.groups, *run.held_out, *run.labels]):
        raise DataError(
            f"{', '.join(report.path for report in run.reports)}: these are not the rows this run began with (run.lock "
            "has their hash), so its continuation would be another run. Put the data back, or start anew in another "
            "output_dir."
        )


def _data_sha256(groups: Sequence[Group]) -> str:
    rows = hashlib.sha256()
    for group in groups:
        rows.update(repr((group.prompt, [c.tokens for c in group.completions])).encode())
    return rows.hexdigest()


def _write_facts(recipe: Recipe, folder: Path, run: Assembled, world_size: int) -> None:
    """What was asked for and with what, before the first step."""
    _replace(folder / RECIPE_FILE, dump_recipe(recipe))
    _replace(folder / "departures.yaml", yaml.safe_dump(departures(recipe), sort_keys=False, allow_unicode=True))
    _replace(folder / "data_report.json", json.dumps([r.to_json() for r in run.reports], indent=1))
    lock = {
        "alignkit": alignkit.__version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "world_size": world_size,
        "backend": run.trainer.dist.backend.name,
        "seed": recipe.seed,
        "recipe_sha256": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest(),
        "data_sha256": _data_sha256([*run.groups, *run.held_out, *run.labels]),
        "computation": str(run.trainer.policy.path),
    }
    _replace(folder / "run.lock", json.dumps(lock, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all: a run resumed on a full disk must not lose its recipe."""
    temporary = path.with_name(f".writing-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _export_best(recipe: Recipe, folder: Path, run: Assembled) -> dict[str, Any] | None:
    """Write the best checkpoint's weights as `best/`, whole or not at all; returns what best.json says of them.

    The policy holds them afterwards: the run is over. None where the recipe names no metric, or it never was a number.

    Raises:
        RunFailed: the checkpoint is damaged or was removed.
    """
    trainer, best, config = run.trainer, run.trainer.evaluator.best, recipe.eval
    final, temporary = folder / "best", folder / ".writing-best"
    shutil.rmtree(final, ignore_errors=True)
    (folder / "best.json").unlink(missing_ok=True)
    if best.step is None:
        return None
    path = trainer.checkpoints.path(best.step)
    if fault := find_fault(path):
        raise RunFailed(
            f"{path} was the best by {config.best_metric}, but is not whole any more ({fault}), so there is no best/. "
            f"The weights of the last step are in {folder}."
        )
    trainer.policy.load(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_model(trainer.policy, run.renderer, temporary, DTYPES[recipe.model.dtype])
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    facts = {
        "metric": config.best_metric,
        "mode": "min" if config.smaller_is_better else "max",
        "value": best.value,
        "step": best.step,
        "last_step": trainer.progress.step,
        "stopped_early": trainer.progress.stopped,
    }
    _replace(folder / "best.json", json.dumps(facts, indent=1) + "\n")
    return facts


def _ending(recipe: Recipe, folder: Path, run: Assembled, best: dict[str, Any] | None) -> list[str]:
    """What the run says of its end, where the recipe asks for the best weights."""
    config, step = recipe.eval, run.trainer.progress.step
    lines = []
    if run.trainer.watch.ended:
        lines.append(f"ended after step {step} by a rule of drift; what it saw is in {folder / 'rounds.jsonl'}")
    elif run.trainer.progress.stopped:
        gain = f"a gain of more than {config.min_delta:g}" if config.min_delta else "a gain"
        many = "1 evaluation" if config.patience == 1 else f"{config.patience} evaluations"
        lines.append(f"stopped early after step {step}: {many} without {gain} in {config.best_metric}")
    if best is not None:
        found = f"best {best['metric']} {number(best['value'])} at step {best['step']}"
        if best["step"] == step:
            lines.append(f"{found}, the last: {folder / 'best'} and {folder} hold the same weights")
        else:
            start = ", before training," if best["step"] == 0 else ""
            lines.append(
                f"{found}{start} is in {folder / 'best'}; the weights of the last step, {step}, are in {folder}"
            )
    elif config.best_metric is not None:
        lines.append(f"{config.best_metric} never was a number, so there is no best; see what was said of evaluations")
    return lines


def _export(run: Assembled, folder: Path, dtype: torch.dtype) -> None:
    """The finished model beside the run's files, whole or not at all: whoever finds a config finds the weights."""
    temporary = folder / ".writing-model"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_model(run.trainer.policy, run.renderer, temporary, dtype)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name.endswith("config.json")):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in LOCKED_PACKAGES}


def _run_id(folder: Path) -> str:
    """Eight characters that stay the same when the run is resumed."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]


def _headline(recipe: Recipe, run: Assembled) -> str:
    trainer = run.trainer
    return (
        f"{recipe.algorithm.name}: {len(run.groups)} groups, {trainer.progress.total_steps} steps of "
        f"{recipe.train.batch_size} units on {_processes(trainer.dist)}; training {trainer.policy.num_trained:,} of "
        f"{trainer.policy.num_weights:,} weights in {recipe.model.dtype}; run folder {trainer.folder}\n"
        f"computed with {trainer.policy.path}"
    )


def _processes(dist: DistEngine) -> str:
    size = dist.world.size
    return "1 process" if size == 1 else f"{size} processes ({dist.backend.name})"


def _finish(recipe: Recipe, folder: Path, run: Assembled, console: Console, with_report: bool) -> RunResult:
    trainer = run.trainer
    metrics: dict[str, float] = {}
    report: Path | None = None
    best: dict[str, Any] | None = None
    with trainer.dist.whole():
        if trainer.dist.is_main:
            # In the dtype the recipe computes in; checkpoints keep the float32 that training goes on from.
            _export(run, folder, DTYPES[recipe.model.dtype])
            best = _export_best(recipe, folder, run)
    if trainer.dist.is_main:
        shutil.rmtree(folder / SPOOLED, ignore_errors=True)  # of use only to a run that ends within a round
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            metrics |= json.loads(line)
        write_card(
            folder,
            CardFacts(
                base_model=recipe.model.name_or_path,
                datasets=[entry.path for entry in recipe.data],
                algorithm=recipe.algorithm.name,
                paper=_paper(trainer.algorithm),
                peft=trainer.policy.is_peft,
                conversational=bool(run.renderer.tokenizer.chat_template),
                versions=_versions(),
                metrics={k: v for k, v in metrics.items() if k not in BOOKKEEPING},
                best=best,
                heads=trainer.policy.heads,
                notes=[
                    note
                    for entry in recipe.data
                    for operation in entry.operations
                    if (note := build_operation(operation).note())
                ],
            ),
        )
        report = write_report([folder]) if with_report else None
        for line in _ending(recipe, folder, run, best):
            console.print(line, markup=False)
    metrics, report, best = trainer.dist.world.gather((metrics, report, best))[0]
    return RunResult(folder, trainer.progress.step, metrics, report, folder / "best" if best is not None else None)


def _paper(algorithm: Algorithm[Any]) -> str | None:
    """The first line of the method's file, which names its source."""
    text = sys.modules[type(algorithm).__module__].__doc__ or ""
    return text.strip().partition("\n")[0] or None


def _weights_of(folder: Path) -> Path:
    """The finished model, else the newest checkpoint. Raises RecipeError when there is neither."""
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    steps = sorted((int(p.name.removeprefix("checkpoint-")), p) for p in folder.glob("checkpoint-*"))
    if not steps:
        raise RecipeError(f"{folder} holds no model yet: the run has not reached its first checkpoint")
    return steps[-1][1]
