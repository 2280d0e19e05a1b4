"""Recipe → `Trainer`: the one file that knows every part.

`recipe.py` stays free of torch so that a bad recipe is refused at once; this is what it cannot build without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from alignkit.assemble_models import build_models, forward_options
from alignkit.core.config import CombineConfig, IterativeConfig, OnlineConfig
from alignkit.core.contracts import Algorithm, AsksModels, Heads, RolloutEngine, RolloutFacts, World, with_loss
from alignkit.core.errors import DataError, RecipeError, RunFailed
from alignkit.core.registry import load_object, register
from alignkit.core.rng import key
from alignkit.core.types import Completion, Group, Metric, Unit
from alignkit.data.config import DataConfig
from alignkit.data.groups import label_pairs, load_groups
from alignkit.data.render import Renderer
from alignkit.data.report import DataReport
from alignkit.data.stream import Stream, groups_per_epoch, with_partners
from alignkit.dist.engine import DistEngine
from alignkit.loop.checkpoint import Checkpoints
from alignkit.loop.drift import Drift, RoundWatch, labelled_pairs
from alignkit.loop.evaluate import Evaluator
from alignkit.loop.optim import build_optimizer, build_scheduler
from alignkit.loop.rollouts import Rollouts, completion_metrics
from alignkit.loop.round import Progress, Round
from alignkit.loop.spool import SPOOLED, DiskSpool
from alignkit.loop.trainer import Trainer
from alignkit.models.config import RosterModelConfig
from alignkit.models.heads import members
from alignkit.models.load import (
    DTYPES,
    adapter_base,
    check_context,
    load_policy,
    load_renderer,
    set_padding,
)
from alignkit.models.merged import save_merged
from alignkit.models.policy import CausalPolicy
from alignkit.models.roster import OLD
from alignkit.recipe import Recipe, prompts_per_round, recipe_rewards, refuse_quantized
from alignkit.rewards.pipeline import (
    build_sources,
    check_asked,
    check_columns,
    reward_metrics,
    reward_name,
    score_groups,
)
from alignkit.rollout.config import SamplingConfig
from alignkit.rollout.given import GivenCompletions
from alignkit.rollout.models import RunModels
from alignkit.rollout.native import NativeEngine
from alignkit.rollout.vllm import VllmEngine
from alignkit.track.sinks import JsonlSink, make_sinks
from alignkit.track.tracker import Tracker

TRIED_TOKENS = 16
"""Tokens of answers that are written only to try the model on."""
CRITIC_HEAD = Heads(kind="token", names=("value",), zero=True)
TRIED_GROUPS = 4
"""Rows on which a model's way from rows to log-probabilities is tried before it is used."""


@dataclass
class Assembled:
    """A trainer and what its run folder tells of it. `groups` are all rows to train on, `held_out` to evaluate on,
    `labels` to hold the judge of rounds to."""

    trainer: Trainer
    renderer: Renderer
    groups: list[Group]
    held_out: list[Group]
    labels: list[Group]
    reports: list[DataReport]
    files: list[JsonlSink]

    def precompute(self, console: Console) -> None:
        """Score every row the run will meet once with the models that never move, and free those."""
        algorithm, progress = self.trainer.algorithm, self.trainer.progress
        if algorithm.needs.rewards:  # what will be written is not known yet
            return
        rounds = min(progress.total_rounds, ceil(progress.total_steps / self.trainer.config.epochs_per_round))
        units: list[Unit] = algorithm.build([*self.trainer.rollouts.stream.preview(rounds), *self.held_out])
        with self.trainer.dist.whole(self.trainer.roster.precomputes):
            self.trainer.roster.precompute(
                units,
                algorithm.needs.columns,
                progress=lambda text: console.print(text, markup=False),
                bar=lambda chunks, title: track(
                    chunks, title, console=console, transient=True, disable=not console.is_terminal
                ),
            )

    def close(self) -> None:
        """Close every file and sink, and the engine's."""
        if isinstance(self.trainer.rollouts.engine, VllmEngine):
            self.trainer.rollouts.engine.close()
        self.trainer.track.close()
        for file in self.files:
            file.close()


def assemble(recipe: Recipe, dist: DistEngine, console: Console) -> Assembled:
    """Load data and model and put every part in its place.

    Raises:
        RecipeError: the recipe does not fit the model.
        DataError: the data is missing, unusable, or not what the algorithm needs.
        RunFailed: the model's weights are broken.
    """
    folder = Path(recipe.output_dir)
    try:
        refuse_quantized(recipe.model, dist.backend.name)  # which `auto` left to the launcher
    except ValueError as error:
        raise RecipeError(str(error)) from error
    torch.manual_seed(key(recipe.seed, "start"))
    algorithm = build_algorithm(recipe)
    needs = algorithm.needs
    renderer = load_renderer(recipe.model)
    sources, reports = _load_all(recipe.data, renderer, recipe, algorithm, "data")
    held_out_sources, held_out_reports = _load_all(recipe.eval.data, renderer, recipe, algorithm, "eval.data")
    labels, label_reports = _labels(recipe, renderer)
    reports += [*held_out_reports, *label_reports]
    console.print("\n".join(line for report in reports for line in report.lines()), markup=False)
    groups, held_out = _flat(sources), _flat(held_out_sources)
    held_out = with_partners(held_out, recipe.train.max_length) if needs.partners else held_out

    algorithm.take_facts(
        RolloutFacts(
            num_generations=recipe.rollout.num_generations,
            max_completion_length=recipe.rollout.max_completion_length,
            weights={reward_name(reward): reward.weight for reward in recipe_rewards(recipe)},
            combine=recipe.combine,
            max_length=recipe.train.max_length,
            render=renderer.prompt,
            encode=renderer.encode,
        )
    )
    heads = algorithm.heads()
    if recipe.eval.num_samples and not heads.is_language:
        raise RecipeError(f"eval.num_samples: {recipe.algorithm.name} scores text and writes none; leave it at 0")
    bare = load_policy(recipe.model, recipe.seed, heads)
    check_context(bare, recipe.train.max_length)
    if not heads.is_language:
        set_padding(members(bare), renderer)
    # Ratios are of what tokens were drawn from; likelihoods and implicit rewards are of the model itself.
    temperature = recipe.rollout.temperature if OLD in needs.columns else 1.0
    critic = _critic(recipe, dist) if "values" in needs.outputs else None
    policy = CausalPolicy(bare.to(dist.device), dist, forward_options(recipe.model, temperature), heads, critic)
    _check_weights(policy, recipe.model.name_or_path)
    algorithm.prepare(groups)
    sample = _sample(recipe, groups, algorithm, policy, renderer)
    policy.try_path(sample)
    stream = Stream(
        sources,
        [entry.weight for entry in recipe.data],
        seed=recipe.seed,
        groups_per_round=_groups_per_round(recipe, algorithm, sources),
        rank=dist.world.rank,
        size=dist.world.size,
        partners=recipe.train.max_length if needs.partners else None,
        strata=needs.strata,
    )
    progress = plan_progress(recipe, stream, algorithm)
    scorers = _Scorers(recipe, algorithm)
    scorers.check_asked({*recipe.models, *needs.roster, *needs.starts})
    roster, models = build_models(recipe, policy, algorithm, renderer, sample, scorers.models, lambda: progress.version)
    policy.prepare(
        lambda: build_optimizer(policy.parameters(), recipe.train, policy.critic_parameters()),
        recipe.train.max_grad_norm,
    )
    names = ["metrics.jsonl", "samples.jsonl", *(["rounds.jsonl"] if _is_iterative(recipe) else [])]
    files = [JsonlSink(folder / name) for name in names] if dist.is_main else []
    sinks = make_sinks(recipe.track, folder, console, quiet=console.quiet) if dist.is_main else []
    scored = [*groups, *labels]
    rollouts = _rollouts(recipe, algorithm, stream, policy, renderer, scored, files, console, scorers, models)
    scheduler = build_scheduler(dist.optimizer, recipe.train, progress.total_steps)
    tracker = Tracker(files[0] if files else None, sinks, recipe.train.logging_steps, algorithm.derive)
    watch = RoundWatch()
    if _is_iterative(recipe):
        file = files[2] if files else None
        watch = Drift(recipe.drift, rollouts, policy, models, progress, scheduler, tracker, labels, file)

    trainer = Trainer(
        config=recipe.train,
        seed=recipe.seed,
        folder=folder,
        algorithm=algorithm,
        policy=policy,
        scheduler=scheduler,
        dist=dist,
        rollouts=rollouts,
        roster=roster,
        progress=progress,
        round=Round(recipe.seed, recipe.train.batch_size, recipe.train.epochs_per_round),
        track=tracker,
        checkpoints=Checkpoints(folder, recipe.train.save_total_limit, dist.world),
        evaluator=Evaluator(
            scorers.eval_config,
            held_out,
            algorithm=algorithm,
            policy=policy,
            roster=roster,
            dist=dist,
            sampler=build_sampler(policy, renderer, recipe.eval.sampling, recipe.seed),
            score=scorers.evaluation(held_out, renderer, models),
            samples=files[1] if files else None,
            say=lambda text: console.print(text, markup=False),
        ),
        watch=watch,
        write_model=partial(write_model, policy, renderer),
        starts_at_reference=_starts_at_reference(recipe, algorithm, policy),
        max_logp_difference=recipe.rollout.allowed_difference(recipe.model.dtype)
        if policy.temperature == recipe.rollout.temperature
        else None,
    )
    return Assembled(trainer, renderer, groups, held_out, labels, reports, files)


def write_model(policy: CausalPolicy, renderer: Renderer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Weights (in `dtype`; None = as they are trained) and tokenizer, as a folder plain transformers or peft loads."""
    policy.save(folder, dtype)
    for place in policy.folders(folder):
        renderer.tokenizer.save_pretrained(place)


def build_algorithm(recipe: Recipe) -> Algorithm[Any]:
    """The recipe's algorithm, with its `loss` swapped when the recipe names another."""
    target: type[Algorithm[Any]] = register.algorithm.get(recipe.algorithm.name).target
    if recipe.algorithm.loss is not None:
        target = with_loss(target, load_object(recipe.algorithm.loss))
    return target(recipe.algorithm)


def plan_progress(recipe: Recipe, stream: Stream, algorithm: Algorithm[Any]) -> Progress:
    """How many rounds and optimizer steps the recipe asks for."""
    config, method = recipe.train, recipe.algorithm
    rounds = max(1, round(config.num_epochs * stream.rounds_per_epoch))
    if isinstance(method, OnlineConfig) and method.rounds is not None:
        rounds = method.rounds
    if config.max_steps is not None:
        return Progress(max(rounds, config.max_steps), config.max_steps)
    blank = [Completion("", [])] * recipe.rollout.num_generations
    online, given = algorithm.needs.rewards, algorithm.needs.given
    units = (
        sum(
            algorithm.count_units(
                replace(group, completions=[*blank, *(group.completions if given else ())]) if online else group
            )
            for group in groups
        )
        for groups in stream.rounds(rounds)
    )
    steps = sum(ceil(count / config.batch_size) for count in units) * config.epochs_per_round
    return Progress(rounds, max(1, steps))


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


def _load_all(
    entries: Sequence[DataConfig], renderer: Renderer, recipe: Recipe, algorithm: Algorithm[Any], block: str
) -> tuple[list[list[Group]], list[DataReport]]:
    sources, reports = [], []
    for i, entry in enumerate(entries):
        room = recipe.rollout.max_completion_length if algorithm.needs.rewards else 0
        length, given = recipe.train.max_length, algorithm.needs.given
        groups, report = load_groups(entry, renderer, max_length=length, room=room, given=given)
        if report.format == "preference" and "label" in algorithm.needs.fields:
            groups = label_pairs(groups)
        _check_needs(groups, algorithm, recipe.algorithm.name, f"{block}.{i}", report)
        if algorithm.needs.rewards and not algorithm.needs.given:
            groups = [replace(group, completions=[]) for group in groups]
        sources.append(groups)
        reports.append(report)
    _tell_apart(_flat(sources))
    return sources, reports


def _labels(recipe: Recipe, renderer: Renderer) -> tuple[list[Group], list[DataReport]]:
    """The pairs that the judge of rounds is held to."""
    found = [load_groups(entry, renderer, max_length=recipe.train.max_length) for entry in recipe.drift.labels]
    groups = [group for groups, _ in found for group in groups]
    _tell_apart(groups)
    return labelled_pairs(groups, recipe.drift.num_labels), [report for _, report in found]


def _is_iterative(recipe: Recipe) -> bool:
    return isinstance(recipe.algorithm, IterativeConfig)


def _tell_apart(groups: Sequence[Group]) -> None:
    """Number the ids that rows share, in place: samples, draws and parts of a round are found by id."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.id] = seen.get(group.id, 0) + 1
        if seen[group.id] > 1:
            group.id = f"{group.id}#{seen[group.id]}"


def _check_needs(groups: Sequence[Group], algorithm: Algorithm[Any], name: str, where: str, report: DataReport) -> None:
    needs = algorithm.needs
    for group in groups:
        if len(group.completions) < needs.completions and not needs.rewards:
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
                f"{', '.join(sorted(group.fields)) or 'no others'}; `fields: {{{missing[0]}: theirs}}` maps it."
            )


def _check_weights(policy: CausalPolicy, path: str) -> None:
    broken = policy.broken_weights()
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise RunFailed(
            f"model.name_or_path: the weights in {path} hold nan or infinity: {', '.join(broken[:3])}{more}. Nothing "
            "was trained; start from a whole copy, or from an earlier checkpoint of the run that wrote them."
        )


def _flat(sources: Sequence[Sequence[Group]]) -> list[Group]:
    return [group for groups in sources for group in groups]


class _Scorers:
    """The rewards of rounds, and those of evaluations: samples of an online method are scored as in training where
    `eval` names no rewards."""

    def __init__(self, recipe: Recipe, algorithm: Algorithm[Any]) -> None:
        given = recipe_rewards(recipe) if algorithm.needs.rewards else []
        as_trained = given and not recipe.eval.rewards and recipe.eval.num_samples
        self.eval_config = recipe.eval.model_copy(update={"rewards": given}) if as_trained else recipe.eval
        self.of_rounds, self.of_evaluations = build_sources(given), build_sources(self.eval_config.rewards)
        self._combine = recipe.combine
        self._eval_combine = CombineConfig() if recipe.eval.rewards else recipe.combine

    def check_asked(self, known: Collection[str]) -> None:
        """Raises RecipeError where some reward asks a model that is none of these."""
        check_asked([*self.of_rounds, *self.of_evaluations], known)

    @property
    def models(self) -> set[str]:
        """Models of the run that some reward asks."""
        sources = [source for _, source in (*self.of_rounds, *self.of_evaluations)]
        return {name for source in sources if isinstance(source, AsksModels) for name in source.models()}

    def rounds(
        self, groups: Sequence[Group], renderer: Renderer, models: RunModels, world: World
    ) -> Callable[[list[Group], int], list[Group]]:
        """What scores a round."""
        check_columns(groups, self.of_rounds, self._combine)

        def score(given: list[Group], version: int) -> list[Group]:
            stops, combine = renderer.stop_ids, self._combine
            return score_groups(given, self.of_rounds, version, models, stop_ids=stops, combine=combine, world=world)

        return score

    def evaluation(
        self, held_out: Sequence[Group], renderer: Renderer, models: RunModels
    ) -> Callable[[list[Group]], list[Group]]:
        """What scores the samples of an evaluation."""
        sources, combine = self.of_evaluations, self._eval_combine
        check_columns(held_out, sources, combine)

        def score(groups: list[Group]) -> list[Group]:
            score_groups(groups, sources, models.version(), models, stop_ids=renderer.stop_ids, combine=combine)
            return groups

        return score


def _groups_per_round(recipe: Recipe, algorithm: Algorithm[Any], sources: Sequence[Sequence[Group]]) -> int:
    """Offline a round is an optimizer batch; online so many prompts as are answered at once."""
    if not algorithm.needs.rewards:
        return recipe.train.batch_size
    weights = [entry.weight for entry in recipe.data]
    return prompts_per_round(recipe, algorithm, groups_per_epoch(sources, weights))


def _rollouts(
    recipe: Recipe,
    algorithm: Algorithm[Any],
    stream: Stream,
    policy: CausalPolicy,
    renderer: Renderer,
    groups: Sequence[Group],
    files: Sequence[JsonlSink],
    console: Console,
    scorers: _Scorers,
    models: RunModels,
) -> Rollouts:
    """What fills the rounds of this recipe."""
    needs, world = algorithm.needs, policy.dist.world
    if not needs.rewards:
        return Rollouts(stream, GivenCompletions(), algorithm, world, needs.completions)
    score = scorers.rounds(groups, renderer, models, world)

    def measure(given: Sequence[Group]) -> dict[str, Metric]:
        longest = recipe.rollout.max_completion_length
        if needs.given:  # what the data has says nothing of the policy
            given = [replace(group, completions=[c for c in group.completions if c.version >= 0]) for group in given]
        return {**reward_metrics(given, scorers.of_rounds), **completion_metrics(given, longest)}

    def say(text: str) -> None:
        console.print(text, markup=False)

    def encode(text: str) -> list[int]:
        return [*renderer.encode(text), renderer.eos_id]

    engine: RolloutEngine
    if recipe.rollout.engine == "vllm":
        engine = VllmEngine(
            recipe.rollout,
            model=recipe.model.name_or_path,
            write=lambda place: save_merged(policy.bare, place, DTYPES[recipe.model.dtype]),
            folder=Path(recipe.output_dir) / "rollout",
            decode=lambda ids: renderer.tokenizer.decode(ids, skip_special_tokens=True),
            stop_ids=renderer.stop_ids,
            seed=recipe.seed,
            world=world,
            say=say,
        )
    else:
        engine = _Autocast(build_sampler(policy, renderer, recipe.rollout, recipe.seed), policy.dist)
    shown = files[1] if files else None
    spool = DiskSpool(Path(recipe.output_dir) / SPOOLED, world)
    return Rollouts(
        stream,
        engine,
        algorithm,
        world,
        recipe.rollout.num_generations,
        score,
        measure,
        encode,
        shown,
        say,
        spool=spool if _is_iterative(recipe) else None,
    )


@dataclass
class _Autocast:
    """The policy writes in the precision in which it is trained."""

    engine: NativeEngine
    dist: DistEngine

    def fill(self, groups: list[Group], n: int) -> list[Group]:
        with self.dist.autocast():
            return self.engine.fill(groups, n)

    def sync(self, version: int) -> None:
        self.engine.sync(version)


def _critic(recipe: Recipe, dist: DistEngine) -> Any:
    """The model that expects rewards: of the policy's weights or another's, its score layer 0 where it is new.

    An adapter writes text; beside one the critic starts from the weights under it.
    """
    config = recipe.models.get("critic", RosterModelConfig.model_validate({"from": "policy"}))
    path = recipe.model.name_or_path if config.source == "policy" else config.source
    model = recipe.model.model_copy(update={"name_or_path": adapter_base(path) or path})
    return load_policy(model, key(recipe.seed, "critic"), CRITIC_HEAD).to(dist.device)


def _sample(
    recipe: Recipe, groups: Sequence[Group], algorithm: Algorithm[Any], policy: CausalPolicy, renderer: Renderer
) -> list[Unit]:
    """A few units on which the first use of a model is tried; online of answers that are written for it."""
    tried = _longest_and_shortest(groups)
    if algorithm.needs.rewards:
        short = recipe.rollout.model_copy(update={"max_completion_length": TRIED_TOKENS})
        with policy.dist.autocast():
            written = build_sampler(policy, renderer, short, recipe.seed).fill(tried, 2)
        return [(group.row(completion),) for group in written for completion in group.completions]
    return algorithm.build(with_partners(tried, recipe.train.max_length) if algorithm.needs.partners else tried)


def _longest_and_shortest(groups: Sequence[Group]) -> list[Group]:
    """A few rows on which the first use of a model is tried."""

    def length(group: Group) -> int:
        return len(group.prompt) + max((len(completion.tokens) for completion in group.completions), default=0)

    ordered = sorted(groups, key=length, reverse=True)
    return [*ordered[:TRIED_GROUPS], *ordered[TRIED_GROUPS:][-1:]]


def _starts_at_reference(recipe: Recipe, algorithm: Algorithm[Any], policy: CausalPolicy) -> bool:
    uses = "reference.logps" in algorithm.needs.columns
    source = recipe.models["reference"].source if "reference" in recipe.models else "policy"
    return uses and source == "policy" and not policy.is_noisy and policy.heads.noise == 0
