"""What a recipe will do, said before it runs: files, columns, batch arithmetic, tokens and memory, without weights.

`check` answers at once. `check_tokens` and `check_memory` import what they need for it: a tokenizer, and torch.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from math import ceil, lcm
from pathlib import Path
from typing import Any

from alignkit.core.config import IterativeConfig, OnlineConfig
from alignkit.core.contracts import Algorithm, Needs
from alignkit.core.documents import Mistakes
from alignkit.core.errors import DataError, RecipeError
from alignkit.data.config import DataConfig
from alignkit.data.render import Rendered
from alignkit.data.shapes import SHAPES, BadRow, Example, Text, choose_format, to_example
from alignkit.data.sources import Table, in_our_shape, read_rows
from alignkit.dist.launcher import launched_size
from alignkit.memory.given import GIB, LEFT, MIB, find_config
from alignkit.recipe import (
    Recipe,
    check_paths,
    departures,
    find_algorithm,
    prompts_per_round,
    recipe_rewards,
    units_per_prompt,
)
from alignkit.rewards.pipeline import build_sources, check_asked, required_columns

PEEKED_ROWS = 64
"""Rows of a data entry that are looked at."""
COUNTED_BYTES = 256 * 2**20
"""Files larger than this are not counted: `check` answers at once."""
LAYOUTS = {
    "auto": "rows packed without padding, a shared prompt once, as far as the model can; the run says how it went",
    "padded": "padded rows and whole logits, for every model",
    "packed": "rows packed without padding; refused where the model cannot",
    "prefix_shared": "rows packed without padding, a shared prompt once; refused where the model cannot",
}
"""`model.layout` in words."""


def check(recipe: Recipe, world_size: int | None = None) -> list[str]:
    """What the recipe will do on so many processes (None: as it says itself), as lines to print.

    Raises: RecipeError with every file that is missing, or every data entry whose columns do not fit.
    """
    ranks = processes(recipe, world_size)
    check_paths(recipe)
    method: Algorithm[Any] = find_algorithm(recipe.algorithm.name).target(recipe.algorithm)
    needs = method.needs
    mistakes = Mistakes()
    mistakes.open(recipe.origin.root.place.document)
    entries = {f"data.{i}": entry for i, entry in enumerate(recipe.data)}
    entries |= {f"eval.data.{i}": entry for i, entry in enumerate(recipe.eval.data)}
    entries |= {f"drift.labels.{i}": entry for i, entry in enumerate(recipe.drift.labels)}
    lines = [f"recipe      {recipe.algorithm.name} on {recipe.model.name_or_path}, into {recipe.output_dir}"]
    lines.append(f"departures  {', '.join(departures(recipe))}")
    _check_model(recipe, mistakes)
    for key, entry in entries.items():
        try:
            lines.append(f"{key:<11} {_describe_data(entry, needs, recipe.algorithm.name)}")
        except DataError as error:
            mistakes.add(recipe.origin.place(f"{key}.path"), key, str(error))
    _check_rewards(recipe, method, mistakes)
    mistakes.stop_if_any()
    if needs.rewards:
        lines += _rollout_lines(recipe, method)
    lines += [*_eval_lines(recipe), *_drift_lines(recipe)]
    return [*lines, *_batch_lines(recipe, method, ranks)]


def _check_rewards(recipe: Recipe, method: Algorithm[Any], mistakes: Mistakes) -> None:
    """Notes rewards that cannot be made, that ask models which are not there, or read columns that the data lacks."""
    known = {*recipe.models, *method.needs.roster, *method.needs.starts}
    of_rounds = recipe_rewards(recipe) if method.needs.rewards else []
    blocks = {"rewards": (of_rounds, recipe.data), "eval.rewards": (recipe.eval.rewards, recipe.eval.data)}
    for block, (rewards, entries) in blocks.items():
        for i, reward in enumerate(rewards):
            key = f"{block}.{i}"
            try:
                ((_, source),) = sources = build_sources([reward])
                check_asked(sources, known)
                for entry in entries if reward.when is None else ():  # else only the rows tell which it scores
                    _check_columns(entry, required_columns(reward, source))
            except (RecipeError, DataError) as error:
                mistakes.add(recipe.origin.place(key), key, str(error))


def _check_columns(entry: DataConfig, required: Sequence[str]) -> None:
    """Raises DataError where the first rows tell that a column is not there; operations may write some."""
    columns = None if entry.operations else _columns(entry)
    missing = [] if columns is None else [name for name in required if name not in columns]
    if columns is not None and missing:
        raise DataError(
            f"it reads the column {missing[0]!r}, which {entry.path} lacks; there are {', '.join(columns)}. "
            f"`fields: {{{missing[0]}: THEIR_COLUMN}}` in that entry maps it"
        )


def processes(recipe: Recipe, asked: int | None = None) -> int:
    """How many processes a run is checked for: as asked, as the recipe says, or as were launched.

    Raises: RecipeError when the recipe says another number than is asked about.
    """
    fixed = recipe.dist.world_size
    if asked is not None and fixed is not None and asked != fixed:
        raise RecipeError(f"dist.world_size: {fixed}, and --world-size asks about {asked}; leave one out")
    return asked or fixed or launched_size()


def check_tokens(recipe: Recipe) -> list[str]:
    """A few rows of every file as the tokens a model is given, and as the text that these say; lines to print.

    Raises: DataError when rows cannot be written.
    """
    if find_config(recipe.model.name_or_path) is None or not Path(recipe.model.name_or_path).is_dir():
        return [f"template    unchecked: the tokenizer of {recipe.model.name_or_path} is not on this machine"]
    from alignkit.models.load import load_renderer

    renderer, lines = load_renderer(recipe.model), []
    for number, entry in enumerate(recipe.data):
        if not Path(entry.path).is_file():
            continue
        table = read_rows(entry.model_copy(update={"limit": min(entry.limit or PEEKED_ROWS, PEEKED_ROWS)}))
        shape, examples = choose_format(entry.format, table.columns, entry.path), []
        for i, row in enumerate(table.rows):
            with suppress(BadRow):  # the run counts them
                examples += [to_example(row, shape)] if i not in table.faults else []
        lengths, lost = [], []
        for example, written in zip(examples, renderer.render(examples), strict=True):
            if isinstance(written, Rendered):
                for tokens, texts in _rows(example, written):
                    lengths.append(len(tokens))
                    said = _words(renderer.decode(tokens))
                    lost += [text for text in map(_words, texts) if text not in said][:1]
        if not lengths:
            lines.append(f"template    data.{number}: none of the first {len(table.rows)} rows can be used")
            continue
        told = (
            f"{len(lost)} of them do not say all that the row does, first {lost[0][:60]!r}" if lost else "all is there"
        )
        span = f"{_count(len(lengths), 'row')} of {min(lengths)} to {max(lengths)} tokens"
        lines.append(f"template    data.{number}: {span}; read back, {told}")
    return lines


def _rows(example: Example, written: Rendered) -> Iterator[tuple[list[int], list[str]]]:
    """The tokens of each answer behind its prompt, or of the prompt alone, and the texts that should be in them."""
    asked = _contents(example.prompt)
    if not written.completions:
        yield written.prompt, asked
    for tokens, answer in zip(written.completions, example.completions, strict=True):
        yield [*written.prompt, *tokens], [*asked, *_contents(answer)]


def _contents(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else [turn.get("content") or "" for turn in text]


def _words(text: str) -> str:
    """Without what white space there is: templates trim, and tokenizers add a blank in front."""
    return "".join(text.split())


def check_memory(
    recipe: Recipe, world_size: int | None = None, *, available: int | None = None, config: Path | None = None
) -> tuple[list[str], str | None]:
    """What each process will hold on a GPU, as lines to print, and what to do where that is more than it has.

    `available`: bytes of a GPU. `config`: the policy's config.json, or its folder, where the model is not here.
    """
    ranks = processes(recipe, world_size)
    path = str(config) if config is not None else find_config(recipe.model.name_or_path)
    if path is None:
        why = f"{recipe.model.name_or_path} is not on this machine; `--config FILE` takes its config.json"
        return _not_predicted(why, available)
    from alignkit.memory.advice import remedies
    from alignkit.memory.predict import KINDS, Unpredictable, predict

    try:
        told = predict(recipe, world_size=ranks, device="cuda", config=path)
    except Unpredictable as reason:
        return _not_predicted(str(reason), available)
    backend = "" if ranks == 1 else f", {'ddp' if recipe.dist.backend == 'auto' else recipe.dist.backend}"
    scale, unit = (GIB, "GiB") if told.peak.total >= GIB else (MIB, "MiB")
    lines = [
        f"memory      {unit} on each of {_count(ranks, 'GPU')}{backend}: {_many(told.sizes.numbers)} weights, "
        f"{_many(told.sizes.trained_numbers)} of them trained; {told.fed} tokens a forward",
        f"            {'phase':<10}{''.join(f'{kind:>12}' for kind in KINDS)}{'all':>9}",
    ]
    for phase in told.phases:
        cells = "".join(f"{phase.parts.get(kind, 0) / scale:>12.2f}" for kind in KINDS)
        lines.append(f"            {phase.name:<10}{cells}{phase.total / scale:>9.2f}")
    lines += [f"            {assumed}" for assumed in told.assumed]
    if available is None:
        return lines, None
    room = int(available * (1 - LEFT))
    what = f"{available / GIB:.4g} GiB, of which {LEFT:.0%} are left to CUDA and to gaps"
    if told.peak.total <= room:
        return [*lines, f"fits        {told.peak.total / GIB:.1f} GiB in {what}"], None
    found = remedies(recipe, room, world_size=ranks, device="cuda", config=path)
    error = f"memory: {told.peak.total / GIB:.1f} GiB in the phase `{told.peak.name}` do not fit into {what}. " + (
        "The smallest changes that make it fit, each to be given behind the recipe:" if found else NOTHING_FITS
    )
    width = max((len(" ".join(remedy.change.overrides)) for remedy in found), default=0)
    changes = [f"\n  {' '.join(each.change.overrides):<{width}}  {each.peak / GIB:.1f} GiB" for each in found]
    return lines, error + "".join(changes)


def _many(number: int) -> str:
    """A number in three digits."""
    scale, letter = next((x for x in ((1e9, " B"), (1e6, " M"), (1e3, " K")) if number >= x[0]), (1, ""))
    return f"{number / scale:.3g}{letter}"


def _not_predicted(why: str, available: int | None) -> tuple[list[str], str | None]:
    """An error only where somebody asked whether it fits."""
    error = f"memory: nobody can say whether it fits: {why}" if available is not None else None
    return [f"memory      not predicted: {why}"], error


NOTHING_FITS = (
    "Neither gradient checkpointing, smaller micro-batches, another backend, shorter rows, adapters nor all of these "
    "together make it fit: it takes more or larger GPUs, or a smaller model."
)


def _check_model(recipe: Recipe, mistakes: Mistakes) -> None:
    folder = Path(recipe.model.name_or_path)
    if not folder.exists():
        return
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        place = recipe.origin.place("model.name_or_path")
        text = (
            f"{folder} holds no config.json or adapter_config.json; expected a folder that transformers or peft wrote"
        )
        mistakes.add(place, "model.name_or_path", text)


def _describe_data(entry: DataConfig, needs: Needs, algorithm: str) -> str:
    """One line on a data entry. Raises DataError when its columns do not fit the format or the algorithm."""
    columns = _columns(entry)
    if columns is None:
        where = "is looked for on the hub" if not Path(entry.path).exists() else "is not looked into before the run"
        return f"{entry.path}: unchecked, {where}"
    shape = choose_format(entry.format, columns, entry.path)
    if (needs.preferences or needs.completions > 1) and not needs.rewards and shape not in ("preference", "ranked"):
        wanted = " or ".join(", ".join(SHAPES[name]) for name in ("preference", "ranked"))
        raise DataError(
            f"{entry.path}: {algorithm} learns from preference or ranked rows; these are {shape!r} rows with the "
            f"columns {', '.join(columns)}. Expected {wanted}. Answers with scores or labels become pairs by "
            "`alignkit data convert IN OUT --to preference`."
        )
    implied = {"label"} if shape == "preference" else set()
    for column in sorted(needs.fields - set(columns) - implied):
        raise DataError(
            f"{entry.path}: {algorithm} needs the column {column!r}, there are {', '.join(columns)}. "
            f"`fields: {{{column}: THEIR_COLUMN}}` maps it."
        )
    rows = count_rows(entry)
    return f"{entry.path}: {'' if rows is None else f'{rows} rows, '}{shape} (columns {', '.join(columns)})"


def _columns(entry: DataConfig) -> list[str] | None:
    """The columns of the first rows, `fields` applied; None where looking would need more than this file can do."""
    path = Path(entry.path)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if not path.is_file() or not suffixes or path.suffix == ".zst":
        return None
    if suffixes[-1] in (".jsonl", ".json"):
        return read_rows(entry.model_copy(update={"limit": min(entry.limit or PEEKED_ROWS, PEEKED_ROWS)})).columns
    if suffixes[-1] == ".csv":
        return in_our_shape(_csv_head(path), entry).columns
    return None


def _csv_head(path: Path) -> Table:
    """The first rows of a CSV file. Raises DataError when there is none."""
    lines = (line.decode("utf-8-sig", errors="replace") for line in _lines(path))
    rows = list(islice(csv.DictReader(lines), PEEKED_ROWS))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return Table(rows, [*range(1, len(rows) + 1)])


def count_rows(entry: DataConfig) -> int | None:
    """Rows of a JSON-lines file after `limit`; None where counting is not cheap or `split` takes a slice."""
    path = Path(entry.path)
    if not path.is_file() or path.suffixes[-1:] == [".zst"] or ".jsonl" not in path.suffixes or "[" in entry.split:
        return None
    if path.stat().st_size > COUNTED_BYTES:
        return None
    count = sum(1 for line in _lines(path) if line.strip())
    return min(count, entry.limit or count)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _batch_lines(recipe: Recipe, method: Algorithm[Any], ranks: int) -> Iterator[str]:
    """The arithmetic from groups to updates, spelled out."""
    train, rows = recipe.train, method.rows_per_unit(recipe.algorithm)
    unit = "unit" if rows == 1 else f"unit of {rows} rows"
    share, rest = divmod(train.batch_size, ranks)
    spread = f"{share}" if not rest else f"{share} or {share + 1}"
    process = "the only process" if ranks == 1 else f"each of {ranks} processes"
    yield f"update      {train.batch_size} × {unit} an optimizer step; {spread} on {process}"
    fitting = max(1, train.micro_batch_tokens // (train.max_length * rows))
    fitting = min(fitting, train.micro_batch_size or fitting)
    most = ceil(-(-train.batch_size // ranks) / fitting)
    forwards = "1 forward" if most == 1 else f"1 to {most} forwards"
    yield from _arithmetic(recipe, method, ranks, min(fitting, ceil(train.batch_size / ranks)), most)
    yield f"layout      {recipe.model.layout}: {LAYOUTS[recipe.model.layout]}"
    yield (
        f"forward     {train.micro_batch_tokens} tokens as laid out hold {fitting} × {unit} at max_length "
        f"{train.max_length}; {forwards} a step"
    )
    if train.max_length * rows > train.micro_batch_tokens:
        yield f"            a {unit} is never cut: one at max_length takes up to {train.max_length * rows} tokens"
    yield f"length      {_length(recipe, method)}"


def _arithmetic(recipe: Recipe, method: Algorithm[Any], ranks: int, fitting: int, forwards: int) -> Iterator[str]:
    """Prompts × samples × processes × accumulation = update, and the nearest numbers that come out even."""
    size, each = recipe.train.batch_size, 1
    if method.needs.rewards and not isinstance(recipe.algorithm, IterativeConfig):
        each, samples = units_per_prompt(recipe, method), recipe.rollout.num_generations
        prompts = prompts_per_round(recipe, method, 0)
        units, written = prompts * each, f"{_count(prompts, 'prompt')} × {_count(samples, 'sample')}"
        made = "" if each == samples else f", {_count(each, 'unit')} a prompt"
        yield f"arithmetic  {written}{made} = {units} units a round = {_count(ceil(units / size), 'update')} of {size}"
        if prompts % ranks:
            yield f"uneven      {prompts} prompts on {ranks} processes; {_nearest(prompts, ranks, 'prompts a round')}"
        if units % size:
            near = _nearest(prompts, lcm(each, size) // each, "prompts a round")
            yield f"uneven      the last update of a round has {units % size} of {size} units; {near}"
    product = f"{_count(ranks, 'process')} × {_count(forwards, 'forward')} × {_count(fitting, 'unit')}"
    yield f"arithmetic  {product} {'=' if ranks * forwards * fitting == size else '≥'} {size} units an update"
    if size % ranks:
        near = _nearest(size, lcm(ranks, each), "units an update")
        yield f"uneven      {size} units on {ranks} processes; {near}"


def _nearest(number: int, step: int, what: str) -> str:
    """The multiples of a step next to a number."""
    below, above = number // step * step, -(-number // step) * step
    return f"{f'{below} or {above}' if below else above} {what} would be even"


def _count_groups(entry: DataConfig, method: Algorithm[Any]) -> int | None:
    """Groups that the rows become: a pair is two to a method that learns from labels.

    None where what the rows hold decides: an operation may make several of one, and a ranked row may be several units.
    """
    rows, columns = count_rows(entry), _columns(entry)
    if entry.operations:
        return None
    if rows is None or columns is None:
        return rows
    shape = choose_format(entry.format, columns, entry.path)
    if shape == "ranked" and type(method).count_units is not Algorithm.count_units:
        return None
    return rows * 2 if shape == "preference" and "label" in method.needs.fields else rows


def _length(recipe: Recipe, method: Algorithm[Any]) -> str:
    train = recipe.train
    if train.max_steps is not None:
        return f"{train.max_steps} steps (max_steps)"
    groups = _groups_per_epoch(recipe, method)
    if groups is None:
        return f"{train.num_epochs:g} epochs; the number of steps is known once the data is read"
    if method.needs.rewards:
        per_round = prompts_per_round(recipe, method, groups)
        rounds = _rounds(recipe, ceil(groups / per_round))
        return f"{groups} prompts an epoch, {per_round} a round → {_count(rounds, 'round')}, if no row is dropped"
    per_epoch = ceil(groups / train.batch_size)
    steps = max(1, round(train.num_epochs * per_epoch)) * train.epochs_per_round
    last = groups % train.batch_size
    short = f", the last with {last}" if last else ""
    repeated = f" × {train.epochs_per_round} a round" if train.epochs_per_round > 1 else ""
    return (
        f"{groups} groups an epoch → {per_epoch} steps{short}; × {train.num_epochs:g} epochs{repeated} = "
        f"{steps} steps, if no row is dropped"
    )


def _groups_per_epoch(recipe: Recipe, method: Algorithm[Any]) -> int | None:
    """Groups of an epoch, if no row is dropped; None where only reading the data tells."""
    counts = [_count_groups(entry, method) for entry in recipe.data]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    return sum(max(1, round(count * entry.weight)) for count, entry in zip(known, recipe.data, strict=True))


def _rounds(recipe: Recipe, per_epoch: int) -> int:
    config = recipe.algorithm
    asked = config.rounds if isinstance(config, OnlineConfig) else None
    return asked if asked is not None else max(1, round(recipe.train.num_epochs * per_epoch))


def _rollout_lines(recipe: Recipe, method: Algorithm[Any]) -> Iterator[str]:
    """Who answers how many prompts, what scores the answers, and how many updates that makes."""
    rollout, train = recipe.rollout, recipe.train
    groups = _groups_per_epoch(recipe, method)
    who = "the policy itself, in this process" if rollout.engine == "native" else f"the {rollout.engine} server"
    how = f"of at most {rollout.max_completion_length} tokens at temperature {rollout.temperature:g}, by {who}"
    each = _count(rollout.num_generations, "completion")
    if groups is None and isinstance(recipe.algorithm, IterativeConfig) and recipe.algorithm.prompts_per_round is None:
        yield f"rollout     the data in {recipe.algorithm.rounds} parts, {each} a prompt, {how}"
        updates = ""
    else:
        prompts = prompts_per_round(recipe, method, groups or 0)
        written = prompts * rollout.num_generations
        yield f"rollout     {_count(prompts, 'prompt')} × {each} = {written} a round, {how}"
        batches = ceil(prompts * _units_a_prompt(recipe, method) / train.batch_size) * train.epochs_per_round
        updates = f"up to {_count(batches, 'optimizer step')} on what was written, then "
    if names := " + ".join(f"{reward.weight:g} × {reward.name}" for reward in recipe_rewards(recipe)):
        yield f"rewards     {names}"
    yield f"round       {updates}it is written anew"


def _units_a_prompt(recipe: Recipe, method: Algorithm[Any]) -> float:
    """Units that are made of a prompt on average, where methods learn from the data's answers beside those written."""
    counts = [_count_groups(entry, method) for entry in recipe.data]
    known = [count for count in counts if count is not None]
    if not method.needs.given or len(known) < len(counts):
        return units_per_prompt(recipe, method)
    weights = [count * entry.weight for count, entry in zip(known, recipe.data, strict=True)]
    units = [units_per_prompt(recipe, method, answered=_is_answered(entry)) for entry in recipe.data]
    return sum(weight * each for weight, each in zip(weights, units, strict=True)) / sum(weights)


def _is_answered(entry: DataConfig) -> bool:
    """Whether rows hold answers one of which is better."""
    columns = _columns(entry)
    return columns is None or choose_format(entry.format, columns, entry.path) in ("preference", "ranked")


def _drift_lines(recipe: Recipe) -> Iterator[str]:
    """What is done when a round drifts."""
    for rule in recipe.drift.rules:
        bound, limit = rule.bound
        factor = f" by {rule.factor:g}" if rule.action == "damp" else ""
        yield f"drift       {rule.action}{factor} where {rule.metric} {bound.replace('_', ' ')} {limit:g}"


def _eval_lines(recipe: Recipe) -> Iterator[str]:
    """When the run measures, what decides which weights are the best, and what ends it early."""
    config, folder = recipe.eval, Path(recipe.output_dir)
    if not config.data:
        yield "eval        no held-out data: nothing is evaluated"
        return
    often = f", after every {_count(config.every_steps, 'step')}" if config.every_steps else ""
    often += ", after every round" if config.each_round else ""
    yield f"eval        before the first step{often} and after the last"
    if config.num_samples:
        yield f"samples     {_count(config.num_samples, 'held-out prompt')} an evaluation{_scored(recipe)}"
    if config.best_metric is not None:
        end = "lowest" if config.smaller_is_better else "highest"
        newest = "newest" if recipe.train.save_total_limit == 1 else f"{recipe.train.save_total_limit} newest"
        yield (
            f"best        {end} {config.best_metric}: its checkpoint is kept beside the {newest}, its weights go to "
            f"{folder / 'best'}; those of the last step to {folder}"
        )
    if config.patience is not None:
        gain = f"a gain of more than {config.min_delta:g}" if config.min_delta else "a gain"
        yield f"stop        early after {_count(config.patience, 'evaluation')} in a row without {gain}"


def _scored(recipe: Recipe) -> str:
    rewards = recipe.eval.rewards or recipe_rewards(recipe)  # an online method's samples are scored as in training
    if not rewards:
        return ""
    names = " + ".join(reward.name for reward in rewards)
    whom = "the start model's samples" if recipe.eval.opponent == "start" else "the data's chosen answers"
    return f", scored by {names}; eval_win_rate is against {whom}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("es" if noun.endswith("s") else "s") * (number != 1)
