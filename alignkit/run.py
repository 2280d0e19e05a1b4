"""A recipe → a run: the assembly, and what surrounds the loop (folder, lock, export, samples).

`recipe.py` stays free of torch so that a bad recipe is refused at once; this module is what it cannot know without it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

import alignkit
from alignkit.core.contracts import Algorithm, with_loss
from alignkit.core.errors import DataError, EnvironmentProblem, RecipeError
from alignkit.core.registry import load_object, register
from alignkit.core.rng import key
from alignkit.core.types import Group, Message
from alignkit.data.config import DataConfig
from alignkit.data.groups import load_groups
from alignkit.data.render import Renderer
from alignkit.data.report import DataReport
from alignkit.data.shapes import Example
from alignkit.data.stream import Stream
from alignkit.dist.engine import DistEngine, launched_rank
from alignkit.loop.checkpoint import Checkpoints, disk_problem
from alignkit.loop.evaluate import Evaluator
from alignkit.loop.optim import build_optimizer, build_scheduler
from alignkit.loop.round import Progress, Round
from alignkit.loop.trainer import Trainer
from alignkit.models.cache import LogpsCache
from alignkit.models.config import ModelConfig, RosterModelConfig
from alignkit.models.load import DTYPES, check_context, fingerprint, load_policy, load_renderer
from alignkit.models.policy import CausalPolicy
from alignkit.models.roster import AdapterReference, FrozenModel, Roster, ScoringModel
from alignkit.recipe import Recipe, departures, dump_recipe, load_recipe
from alignkit.rewards.pipeline import build_sources, score_groups
from alignkit.rollout.config import SamplingConfig
from alignkit.rollout.given import GivenCompletions
from alignkit.rollout.native import NativeEngine
from alignkit.track.card import CardFacts, write_card
from alignkit.track.report import write_report
from alignkit.track.sinks import JsonlSink, make_sinks
from alignkit.track.tracker import Tracker

RECIPE_FILE = "recipe.resolved.yaml"
LOCKED_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "trl")


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind. `metrics` are the last values of everything it logged."""

    folder: Path
    steps: int
    metrics: dict[str, float]
    report: Path | None


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> RunResult:
    """Run a recipe to its end.

    Args:
        resume: continue the run in `output_dir` if there is one.
        overwrite: throw away the run in `output_dir` if there is one.
        quiet: no progress on the console.

    Raises:
        RecipeError: `output_dir` holds another run; the recipe does not fit the model or the data.
        DataError: the data is missing or unusable.
        RunFailed, Interrupted, EnvironmentProblem: see `alignkit.core.errors`.
    """
    folder = Path(recipe.output_dir)
    console = Console(quiet=quiet or launched_rank() > 0, highlight=False, soft_wrap=True)
    resume = _claim_folder(folder, recipe, resume, overwrite)
    dist = DistEngine(DTYPES[recipe.model.dtype])
    try:
        return _train(recipe, folder, dist, console, resume)
    except OSError as error:
        if error.errno is None:
            raise
        raise disk_problem(folder, error) from error
    finally:
        dist.close()


def resume(run_dir: str | Path, *, quiet: bool = False) -> RunResult:
    """Continue a run from its newest valid checkpoint, or from the start if it has none yet."""
    folder = Path(run_dir)
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"{folder} is not a run folder: it has no {RECIPE_FILE}. Give the output_dir of a run.")
    recipe = load_recipe(folder / RECIPE_FILE).model_copy(update={"output_dir": str(folder)})
    return train(recipe, resume=True, quiet=quiet)


def _train(recipe: Recipe, folder: Path, dist: DistEngine, console: Console, resuming: bool) -> RunResult:
    torch.manual_seed(key(recipe.seed, "start"))
    algorithm = build_algorithm(recipe)
    renderer = load_renderer(recipe.model)
    sources, reports = _load_all(recipe.data, renderer, recipe, algorithm, "data")
    held_out_sources, held_out_reports = _load_all(recipe.eval.data, renderer, recipe, algorithm, "eval.data")
    for report in [*reports, *held_out_reports]:
        console.print("\n".join(report.lines()), markup=False)
    groups, held_out = _flat(sources), _flat(held_out_sources)
    score = _scorer(recipe, held_out, renderer)

    bare = load_policy(recipe.model)
    check_context(bare, recipe.train.max_length)
    policy = CausalPolicy(bare.to(dist.device), dist)
    roster = _roster(recipe, policy, algorithm)
    optimizer = build_optimizer(policy.parameters(), recipe.train)
    policy.module = dist.prepare(bare, optimizer)
    stream = Stream(
        sources,
        [entry.weight for entry in recipe.data],
        seed=recipe.seed,
        groups_per_round=recipe.train.batch_size,
        rank=dist.world.rank,
        size=dist.world.size,
    )
    progress = plan_progress(recipe, stream)
    jsonl = JsonlSink(folder / "metrics.jsonl") if dist.is_main else None
    samples = JsonlSink(folder / "samples.jsonl") if dist.is_main else None
    sinks = make_sinks(recipe.track, folder, console, quiet=console.quiet) if dist.is_main else []
    tracker = Tracker(jsonl, sinks, recipe.train.logging_steps)
    checkpoints = Checkpoints(folder, recipe.train.save_total_limit, dist.world)

    def write_model(target: Path) -> None:
        policy.save(target)
        renderer.tokenizer.save_pretrained(target)  # type: ignore[attr-defined]

    trainer = Trainer(
        config=recipe.train,
        seed=recipe.seed,
        folder=folder,
        algorithm=algorithm,
        policy=policy,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, recipe.train, progress.total_steps),
        dist=dist,
        stream=stream,
        engine=GivenCompletions(),
        rewards=lambda given: given,
        roster=roster,
        progress=progress,
        round=Round(recipe.seed, recipe.train.batch_size, recipe.train.epochs_per_round),
        track=tracker,
        checkpoints=checkpoints,
        evaluator=Evaluator(
            recipe.eval,
            held_out,
            algorithm=algorithm,
            policy=policy,
            roster=roster,
            dist=dist,
            sampler=build_sampler(policy, renderer, recipe.eval.sampling, recipe.seed),
            score=score,
            samples=samples,
        ),
        write_model=write_model,
        starts_at_reference=_starts_at_reference(recipe, algorithm),
    )
    _restore(trainer, console, resuming, [jsonl, samples])
    if dist.is_main:
        _write_facts(recipe, folder, [*reports, *held_out_reports], [*groups, *held_out], dist.world.size)
    roster.precompute(algorithm.build([*groups, *held_out]), algorithm.needs.columns, console.print)
    console.print(_headline(recipe, trainer, len(groups)), markup=False)
    tracker.start(
        {
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "algorithm": recipe.algorithm.name,
            "total_steps": progress.total_steps,
            "start_step": progress.step,
            "run_id": _run_id(folder),
            "output_dir": str(folder),
            "resumed": progress.step > 0,
        }
    )
    try:
        trainer.run()
    finally:
        tracker.close()
        if samples is not None:
            samples.close()
    return _finish(recipe, folder, trainer, reports)


def build_algorithm(recipe: Recipe) -> Algorithm[Any]:
    """The recipe's algorithm, with its `loss` swapped when the recipe names another."""
    target: type[Algorithm[Any]] = register.algorithm.get(recipe.algorithm.name).target
    if recipe.algorithm.loss is not None:
        target = with_loss(target, load_object(recipe.algorithm.loss))
    return target(recipe.algorithm)


def plan_progress(recipe: Recipe, stream: Stream) -> Progress:
    """How many rounds and optimizer steps the recipe asks for."""
    config = recipe.train
    rounds = max(1, round(config.num_epochs * stream.rounds_per_epoch))
    steps = rounds * config.epochs_per_round
    if config.max_steps is not None:
        return Progress(max(rounds, config.max_steps), config.max_steps)
    return Progress(rounds, steps)


def build_sampler(policy: CausalPolicy, renderer: Renderer, sampling: SamplingConfig, seed: int) -> NativeEngine:
    """The in-process engine on the policy's own weights."""
    return NativeEngine(
        policy.bare,
        stop_ids=renderer.stop_ids,
        pad_id=renderer.eos_id,
        decode=lambda ids: renderer.tokenizer.decode(ids, skip_special_tokens=True),
        sampling=sampling,
        seed=seed,
    )


def sample(
    run_dir: str | Path,
    prompts: Sequence[str] = (),
    num: int = 1,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Draw `num` completions for each prompt from a run's model: the finished one, else its newest checkpoint.

    Without prompts, those of the held-out data are used. Returns one mapping `{prompt, completion, tokens}` a sample.
    """
    folder = Path(run_dir)
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"{folder} is not a run folder: it has no {RECIPE_FILE}. Give the output_dir of a run.")
    recipe = load_recipe(folder / RECIPE_FILE)
    update = {"temperature": temperature, "max_completion_length": max_tokens}
    sampling = recipe.eval.sampling.model_copy(update={k: v for k, v in update.items() if v is not None})
    model = recipe.model.model_copy(
        update={"name_or_path": str(_weights_of(folder)), "chat_template": None, "gradient_checkpointing": False}
    )
    renderer = load_renderer(model)
    if prompts:
        chat = bool(renderer.tokenizer.chat_template)
        texts = [[Message(role="user", content=p)] if chat else p for p in prompts]
        rendered = renderer.render([Example(text) for text in texts])
        groups = [
            Group(id=str(i), messages=[Message(role="user", content=prompts[i])], prompt=r.prompt)
            for i, r in enumerate(rendered)
            if hasattr(r, "prompt")
        ]
    else:
        entries = recipe.eval.data or recipe.data
        found = _flat([load_groups(entry, renderer, max_length=recipe.train.max_length)[0] for entry in entries])
        groups = [replace(group, completions=[]) for group in found[: max(1, recipe.eval.num_samples or 8)]]
    dist = DistEngine(DTYPES[model.dtype])
    policy = CausalPolicy(load_policy(model).to(dist.device), dist)
    with torch.no_grad(), dist.autocast():
        filled = build_sampler(policy, renderer, sampling, recipe.seed).fill(groups, num)
    return [
        {"prompt": group.messages[-1].get("content", ""), "completion": c.text, "tokens": c.tokens}
        for group in filled
        for c in group.completions
    ]


def _claim_folder(folder: Path, recipe: Recipe, resuming: bool, overwrite: bool) -> bool:
    """Decide whether this run is new or goes on. Only the first rank looks; ranks start at nearly the same time."""
    resolved = folder / RECIPE_FILE
    if launched_rank() > 0:
        return resuming
    if resolved.is_file() and not resuming and not overwrite:
        raise RecipeError(
            f"output_dir: {folder} holds a run already. `alignkit resume {folder}` continues it, `--overwrite` throws it "
            "away, or choose another: output_dir=…"
        )
    if resolved.is_file() and resuming:
        _refuse_changes(load_recipe(resolved), recipe)
        return True
    if resolved.is_file() and overwrite:
        for path in folder.iterdir():  # a run owns its folder
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"output_dir: cannot create {folder}: {error.strerror}") from error
    return resuming


def _refuse_changes(before: Recipe, now: Recipe) -> None:
    old, new = (_dotted(r.model_dump(mode="json", by_alias=True)) for r in (before, now))
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and k != "output_dir"]
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


def _load_all(
    entries: Sequence[DataConfig], renderer: Renderer, recipe: Recipe, algorithm: Algorithm[Any], block: str
) -> tuple[list[list[Group]], list[DataReport]]:
    sources, reports = [], []
    for i, entry in enumerate(entries):
        groups, report = load_groups(entry, renderer, max_length=recipe.train.max_length)
        _check_needs(groups, algorithm, recipe.algorithm.name, f"{block}.{i}", report)
        sources.append(groups)
        reports.append(report)
    return sources, reports


def _check_needs(
    groups: Sequence[Group], algorithm: Algorithm[Any], name: str, where: str, report: DataReport
) -> None:
    needs = algorithm.needs
    for group in groups:
        if len(group.completions) < needs.completions:
            raise DataError(
                f"{where} ({report.path}, read as {report.format}): {name} needs {needs.completions} completions a "
                f"prompt, row {group.id!r} has {len(group.completions)}. Expected columns such as prompt, chosen, "
                "rejected, or prompt, completions; `fields` maps other names."
            )
        if needs.preferences and any(c.reward != c.reward for c in group.completions):
            raise DataError(
                f"{where} ({report.path}, read as {report.format}): {name} needs to know which completion is better, "
                f"row {group.id!r} does not say. Expected chosen and rejected, or scores."
            )
        missing = sorted(needs.fields - set(group.fields))
        if missing:
            raise DataError(
                f"{where} ({report.path}): {name} needs the column {missing[0]!r}, row {group.id!r} has "
                f"{', '.join(sorted(group.fields)) or 'no further columns'}; `fields: {{{missing[0]}: theirs}}` maps it."
            )


def _flat(sources: Sequence[Sequence[Group]]) -> list[Group]:
    return [group for groups in sources for group in groups]


def _scorer(recipe: Recipe, held_out: Sequence[Group], renderer: Renderer) -> Callable[[list[Group]], list[Group]]:
    sources = build_sources(recipe.eval.rewards)

    def score(groups: list[Group]) -> list[Group]:
        score_groups(groups, sources, 0, stop_ids=renderer.stop_ids)
        return groups

    return score


def _roster(recipe: Recipe, policy: CausalPolicy, algorithm: Algorithm[Any]) -> Roster:
    models: dict[str, ScoringModel] = {}
    caches: dict[str, LogpsCache] = {}
    for name in sorted({column.partition(".")[0] for column in algorithm.needs.columns} - {"policy", "behaviour"}):
        config = recipe.models.get(name, RosterModelConfig.model_validate({"from": "policy"}))
        models[name] = _other_model(recipe.model, config, policy)
        if config.precompute:
            start = policy.bare if config.source == "policy" else load_policy(_frozen(recipe.model, config.source))
            software = f"torch {torch.__version__} transformers {version('transformers')}"
            identity = f"{fingerprint(start)} {recipe.model.dtype} {recipe.model.attn_implementation} {software}"
            caches[name] = LogpsCache(identity, policy.dist.world)
    unknown = sorted(set(recipe.models) - set(models))
    if unknown:
        raise RecipeError(
            f"models.{unknown[0]}: {recipe.algorithm.name} uses no model of that name; it uses "
            f"{', '.join(models) or 'none besides the policy'}"
        )
    return Roster(policy, models, caches)


def _frozen(model: ModelConfig, path: str) -> ModelConfig:
    return model.model_copy(update={"name_or_path": path, "lora": None, "gradient_checkpointing": False})


def _other_model(model: ModelConfig, config: RosterModelConfig, policy: CausalPolicy) -> ScoringModel:
    if config.source == "policy" and model.lora is not None:
        return AdapterReference(policy)
    frozen = _frozen(model, model.name_or_path if config.source == "policy" else config.source)
    return FrozenModel(lambda: CausalPolicy(load_policy(frozen).to(policy.dist.device), policy.dist))


def _starts_at_reference(recipe: Recipe, algorithm: Algorithm[Any]) -> bool:
    uses = "reference.logps" in algorithm.needs.columns
    source = recipe.models["reference"].source if "reference" in recipe.models else "policy"
    noisy = recipe.model.lora is not None and recipe.model.lora.dropout > 0
    return uses and source == "policy" and not noisy


def _restore(trainer: Trainer, console: Console, resuming: bool, files: Sequence[JsonlSink | None]) -> None:
    path = trainer.checkpoints.newest_valid(lambda text: console.print(text, markup=False)) if resuming else None
    if path is None:
        for file in files:
            if file is not None:
                file.fresh()
        return
    trainer.checkpoints.load(path, *trainer.parts())
    trainer.policy.load(path)
    console.print(f"continuing from {path}", markup=False)


def _write_facts(
    recipe: Recipe, folder: Path, reports: Sequence[DataReport], groups: Sequence[Group], world_size: int
) -> None:
    """What was asked for and with what, before the first step."""
    (folder / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "departures.yaml").write_text(
        yaml.safe_dump(departures(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    (folder / "data_report.json").write_text(json.dumps([r.to_json() for r in reports], indent=1), encoding="utf-8")
    rows = hashlib.sha256()
    for group in groups:
        rows.update(repr((group.prompt, [c.tokens for c in group.completions])).encode())
    lock = {
        "alignkit": alignkit.__version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "world_size": world_size,
        "seed": recipe.seed,
        "recipe_sha256": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest(),
        "data_sha256": rows.hexdigest(),
    }
    (folder / "run.lock").write_text(json.dumps(lock, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in LOCKED_PACKAGES}


def _run_id(folder: Path) -> str:
    """Eight characters that stay the same when the run is resumed."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]


def _headline(recipe: Recipe, trainer: Trainer, num_groups: int) -> str:
    trained = sum(p.numel() for p in trainer.policy.parameters())
    total = sum(p.numel() for p in trainer.policy.bare.parameters())
    return (
        f"{recipe.algorithm.name}: {num_groups} groups, {trainer.progress.total_steps} steps of "
        f"{recipe.train.batch_size} units on {trainer.dist.world.size} process(es); training {trained:,} of {total:,} "
        f"weights in {recipe.model.dtype}, layout padded; run folder {trainer.folder}"
    )


def _finish(recipe: Recipe, folder: Path, trainer: Trainer, reports: Sequence[DataReport]) -> RunResult:
    metrics: dict[str, float] = {}
    report: Path | None = None
    if trainer.dist.is_main:
        trainer.write_model(folder)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            metrics |= json.loads(line)
        write_card(
            folder,
            CardFacts(
                base_model=recipe.model.name_or_path,
                datasets=[entry.path for entry in recipe.data],
                algorithm=recipe.algorithm.name,
                paper=(sys.modules[type(trainer.algorithm).__module__].__doc__ or "").strip().partition("\n")[0] or None,
                peft=trainer.policy.is_peft,
                conversational=any(report.conversational for report in reports),
                versions=_versions(),
                metrics=metrics,
            ),
        )
        report = write_report([folder])
    trainer.dist.world.barrier()
    return RunResult(folder, trainer.progress.step, metrics, report)


def _weights_of(folder: Path) -> Path:
    """The finished model, else the newest checkpoint. Raises RecipeError when there is neither."""
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    steps = sorted((int(p.name.removeprefix("checkpoint-")), p) for p in folder.glob("checkpoint-*"))
    if not steps:
        raise RecipeError(f"{folder} holds no model yet: the run has not reached its first checkpoint")
    return steps[-1][1]
