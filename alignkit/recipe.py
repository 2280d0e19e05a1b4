"""The recipe: one typed tree assembled from every part's config, and the only file that knows them all. Torch-free.

A recipe is YAML plus what it `extends` plus overrides. Reading one reports all its mistakes at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PrivateAttr, SerializeAsAny, field_validator, model_validator

from alignkit.advice import advise, key_homes
from alignkit.core.config import AlgorithmConfig, CombineConfig, Config, IterativeConfig, OnlineConfig
from alignkit.core.contracts import Algorithm
from alignkit.core.documents import (
    Block,
    Entry,
    Items,
    Mistakes,
    Node,
    Place,
    Scalar,
    apply_override,
    from_python,
    is_null,
    join,
    merge,
    parse,
    retyped,
)
from alignkit.core.errors import RecipeError
from alignkit.core.reading import ConfigReader, did_you_mean, type_scalar
from alignkit.core.registry import Entry as Registered
from alignkit.core.registry import load_module, load_object, register
from alignkit.core.types import Completion, Group
from alignkit.data.config import DataConfig
from alignkit.data.operations import OperationConfig, find_operation
from alignkit.dist.config import WHOLE_SHARDED, DistConfig
from alignkit.files import note_missing_files
from alignkit.loop.config import DriftConfig, EvalConfig, TrainConfig
from alignkit.models.config import ModelConfig, RosterModelConfig
from alignkit.rewards.config import NO_ARGS, RewardConfig, args_type
from alignkit.rewards.transforms import TransformConfig, find_transform
from alignkit.rollout.config import RolloutConfig
from alignkit.rollout.guides import GuideConfig, find_guide
from alignkit.track.config import TrackConfig


@dataclass(frozen=True)
class Origin:
    """Where each key of a recipe was written. It says nothing of what the recipe means, so all origins are equal."""

    root: Node = field(default=Block(Place("recipe"), {}), compare=False, repr=False)

    def place(self, path: str) -> Place:
        """The place of a dotted key, or of the nearest block above it that was written."""
        node, place = self.root, self.root.place
        for part in path.split("."):
            if isinstance(node, Block) and part in node.entries:
                node = node.entries[part].node
            elif isinstance(node, Items) and part.isdecimal() and int(part) < len(node.nodes):
                node = node.nodes[int(part)]
            else:
                break
            place = node.place
        return place


class Recipe(Config):
    """Everything a run depends on."""

    seed: int = Field(0, ge=0, description="of every draw: shuffling, sampling, initial weights")
    output_dir: str = Field(description="the run folder, relative to the current directory")
    model: ModelConfig
    data: list[DataConfig] = Field(min_length=1, description="what to train on")
    algorithm: SerializeAsAny[AlgorithmConfig]
    models: dict[str, RosterModelConfig] = Field({}, description="the run's other models by name: reference, …")
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    drift: DriftConfig = DriftConfig()
    track: TrackConfig = TrackConfig()
    rewards: list[RewardConfig] = Field([], description="what scores the completions of every round")
    combine: CombineConfig = CombineConfig()
    rollout: RolloutConfig = RolloutConfig()
    dist: DistConfig = DistConfig()
    imports: list[str] = Field([], description="modules of yours to import first, so that they can register")
    env: dict[str, str] = Field({}, description="environment variables to set before anything is imported")

    _origin: Origin = PrivateAttr(default=Origin())

    @field_validator("algorithm", mode="before")
    @classmethod
    def _named_algorithm(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "name" not in value:
            return value
        entry = find_algorithm(value["name"])
        return config_type(entry).model_validate({**entry.preset, **value})

    @model_validator(mode="after")
    def _spreads_what_can_be_spread(self) -> Recipe:
        refuse_quantized(self.model, self.dist.backend)
        return self

    @property
    def origin(self) -> Origin:
        """Where its keys were written, for messages."""
        return self._origin


def refuse_quantized(model: ModelConfig, backend: str) -> None:
    """Quantized weights cannot be cut into parts. Raises ValueError where the backend would."""
    if model.quantization is not None and backend in WHOLE_SHARDED:
        raise ValueError(
            f"model.quantization: {model.quantization} and dist.backend: {backend} exclude each other: quantized "
            "weights are not cut into parts. They are small: take zero2, which spreads gradients and optimizer state"
        )


def find_algorithm(name: str) -> Registered:
    """The registered algorithm of that name, entry point or 'module:attribute'. Raises RecipeError."""
    entry = register.algorithm.get(name)
    if not (isinstance(entry.target, type) and issubclass(entry.target, Algorithm)):
        raise RecipeError(f"{name!r} is {entry.target!r}, expected a subclass of alignkit.Algorithm")
    return entry


def config_type(entry: Registered) -> type[AlgorithmConfig | OperationConfig | GuideConfig | TransformConfig]:
    """The config class of a registered algorithm, operation, guide or transform."""
    found: type[AlgorithmConfig | OperationConfig | GuideConfig | TransformConfig] = entry.target.config_type
    return found


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), *, files: bool = False
) -> Recipe:
    """Read a recipe: a YAML file, the name of a shipped recipe, or a mapping; `overrides` are `a.b=value`.

    Sets the variables of `env` and imports the modules of `imports`. Raises RecipeError with all mistakes; with
    `files`, local files that are not there are among them.
    """
    mistakes = Mistakes()
    root: Node = _assemble(source, mistakes)
    for text in overrides:
        root = apply_override(root, text, mistakes)
    assert isinstance(root, Block)  # an override has a key, so it never replaces the root
    reading = _Reading(root, mistakes)
    recipe = reading.read()
    if files:
        note_missing_files(root, mistakes)
    mistakes.stop_if_any()
    assert recipe is not None
    recipe._origin = Origin(root)
    return recipe


def _assemble(
    source: str | os.PathLike[str] | Mapping[str, Any], mistakes: Mistakes, above: tuple[Path, ...] = ()
) -> Block:
    """The tree of a recipe with everything it extends merged below it."""
    if isinstance(source, Mapping):
        root, folder = from_python(source, Place("recipe")), Path()
        mistakes.open("recipe")
    else:
        path = find_recipe(source)
        root, folder, above = parse(_read(path, mistakes), str(path), mistakes), path.parent, (*above, path.resolve())
    if not isinstance(root, Block):
        mistakes.add(root.place, "", "a recipe is a mapping of blocks: model, data, algorithm, train, …")
        mistakes.stop()
    entry = root.entries.get("extends")
    if entry is None:
        return root
    own = Block(root.place, {key: value for key, value in root.entries.items() if key != "extends"})
    merged: Node = Block(root.place, {})
    for node in entry.node.nodes if isinstance(entry.node, Items) else [entry.node]:
        if isinstance(node, Scalar) and is_null(node):
            continue
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            mistakes.add(node.place, "extends", "expected the path of a recipe, or a list of them")
            continue
        base = _base(folder, node, mistakes)
        if base is None:
            continue
        if base.resolve() in above:
            mistakes.add(node.place, "extends", f"goes round in a circle: {base} is being extended already")
            mistakes.stop()
        merged = merge(merged, _assemble(base, mistakes, above))
    if mistakes.found:
        mistakes.stop()
    result = merge(merged, own)
    assert isinstance(result, Block)
    return result


def _base(folder: Path, node: Scalar, mistakes: Mistakes) -> Path | None:
    beside = Path(os.path.normpath(folder / node.value))
    if beside.is_file():
        return beside
    shipped = shipped_recipes()
    if node.value in shipped:
        return shipped[node.value]
    hint = did_you_mean(beside.name, (file.name for file in beside.parent.glob("*.y*ml")))
    hint = hint or did_you_mean(node.value, shipped)
    mistakes.add(
        node.place, "extends", f"there is no file {beside} and no shipped recipe {node.value!r}; {hint}".rstrip("; ")
    )
    return None


def _read(path: Path, mistakes: Mistakes) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        mistakes.add(Place(str(path)), "", f"not UTF-8 text (byte {error.start}); is this a recipe?")
        mistakes.stop()
    except OSError as error:
        mistakes.add(Place(str(path)), "", f"cannot be read: {error.strerror}")
        mistakes.stop()


class _Reading:
    """One reading of an assembled tree: names are looked up as their blocks are met."""

    def __init__(self, root: Block, mistakes: Mistakes) -> None:
        self.root, self.mistakes = root, mistakes
        self.algorithm: Registered | None = None
        self.presets: dict[str, Mapping[str, Any]] = {}
        self.reader = ConfigReader(mistakes, self._choose, self._advise)

    def read(self) -> Recipe | None:
        """The recipe, or None with the mistakes noted."""
        os.environ.update(self.reader.read_field(self.root, Recipe, "env"))
        for number, module in enumerate(self.reader.read_field(self.root, Recipe, "imports")):
            try:
                load_module(module)
            except RecipeError as error:
                self.mistakes.add(Origin(self.root).place(f"imports.{number}"), f"imports.{number}", str(error))
        self.algorithm = self._find_algorithm()
        recipe = self.reader.read(self.root, Recipe)
        if self.algorithm is not None:
            _check_needs(self.root, self.algorithm, self.mistakes)
        if recipe is not None and self.algorithm is not None:
            _check_rollouts(recipe, self.algorithm, Origin(self.root), self.mistakes)
        return recipe

    def _find_algorithm(self) -> Registered | None:
        """The algorithm the recipe names; None, with the mistake noted if a name was given, when there is none."""
        block = self.root.entries.get("algorithm")
        if block is None or not isinstance(block.node, Block):
            return None
        name = block.node.entries.get("name")
        if name is None or not isinstance(name.node, Scalar) or not isinstance(name.node.value, str):
            return None
        try:
            return find_algorithm(name.node.value)
        except RecipeError as error:
            self.mistakes.add(name.node.place, "algorithm.name", str(error))
            return None

    def _choose(self, declared: type[Config], block: Block, path: str) -> tuple[type[Config], Mapping[str, Any]] | None:
        if declared in NAMED_ENTRIES:
            return self._named(declared, block, path)
        if declared is RewardConfig:
            self._read_args(block, path)
        if declared is not AlgorithmConfig:
            return declared, self.presets.get(path, {})
        self._check_named(block, "loss", path, load_object)
        if self.algorithm is not None:
            return config_type(self.algorithm), self.algorithm.preset
        if "name" not in block.entries:
            for key, entry in block.entries.items():
                hint = did_you_mean(key, ["name"])
                if hint:
                    self.mistakes.add(entry.place, join(path, key), f"unknown key; {hint}")
            known = ", ".join(register.algorithm.names())
            self.mistakes.add(block.place, join(path, "name"), f"missing key; it is required (one of {known})")
        elif not any(mistake.path == join(path, "name") for mistake in self.mistakes.found):
            self.mistakes.add(block.entries["name"].node.place, join(path, "name"), "expected the name of an algorithm")
        return None

    def _named(self, declared: type[Config], block: Block, path: str) -> tuple[type[Config], Mapping[str, Any]] | None:
        named = block.entries.get("name")
        if named is None or not isinstance(named.node, Scalar) or is_null(named.node):
            return declared, {}
        try:
            entry = NAMED_ENTRIES[declared](str(named.node.value))
        except RecipeError as error:
            self.mistakes.add(named.node.place, join(path, "name"), str(error))
            return None
        return config_type(entry), entry.preset

    def _read_args(self, block: Block, path: str) -> None:
        """Gives a reward's `args` the types that its source declares, with every mistake noted where it stands."""
        name, args, where = block.entries.get("name"), block.entries.get("args"), join(path, "args")
        if name is None or not isinstance(name.node, Scalar) or is_null(name.node):
            return
        node = Block(block.place, {}) if args is None else args.node
        try:
            entry = register.reward.get(str(name.node.value))
            takes = args_type(entry)
        except RecipeError as error:
            self.mistakes.add(name.node.place, join(path, "name"), str(error))
            return
        if not isinstance(node, Block):
            return  # the entry's own reading tells
        if takes is None:
            if node.entries:
                self.mistakes.add(node.place, where, NO_ARGS)
            return
        self.presets[where] = entry.preset
        found = self.reader.read(node, takes, where)
        if found is not None and args is not None:
            typed = {info.alias or name: getattr(found, name) for name, info in takes.model_fields.items()}
            block.entries["args"] = Entry(args.place, retyped(node, typed))

    def _check_named(self, block: Block, key: str, path: str, find: Any) -> None:
        """Notes that what `key` names does not exist."""
        entry = block.entries.get(key)
        if entry is None or not isinstance(entry.node, Scalar) or is_null(entry.node):
            return
        try:
            find(str(entry.node.value))
        except RecipeError as error:
            self.mistakes.add(entry.node.place, join(path, key), str(error))

    def _advise(self, path: str, key: str) -> str | None:
        if not path and key == "extends":
            return "`extends` works in a file only, not as an override"
        chosen: dict[type[Config], type[Config]] = {}
        if self.algorithm is not None:
            chosen[AlgorithmConfig] = config_type(self.algorithm)
        advice = advise(path, key, key_homes(Recipe, chosen))
        if advice is None and not path:
            return did_you_mean(key, [*Recipe.model_fields, "extends"]) or None
        return advice


NAMED_ENTRIES: Mapping[type[Config], Callable[[str], Registered]] = {
    OperationConfig: find_operation,
    GuideConfig: find_guide,
    TransformConfig: find_transform,
}
"""Entries of lists whose further keys belong to what their `name` names."""
_PAIRS = ("text", "messages", "prompt", "prompt_completion")


def _check_needs(root: Block, algorithm: Registered, mistakes: Mistakes) -> None:
    """Notes what the algorithm needs and the recipe cannot give."""
    needs = algorithm.target.needs
    used = sorted(needs.roster | ({"critic"} if "values" in needs.outputs else set()))
    asked = _asked_by_rewards(root.entries["rewards"].node) if "rewards" in root.entries else set()
    models = root.entries.get("models")
    if models is not None and isinstance(models.node, Block):
        for name, entry in models.node.entries.items():
            if name not in used and name not in asked:
                hint = did_you_mean(name, used) or (f"it uses {', '.join(used)}" if used else "it uses none; remove it")
                mistakes.add(entry.place, f"models.{name}", f"{algorithm.name} uses no model {name!r}; {hint}")
    rewards = root.entries.get("rewards")
    if rewards is not None and not needs.rewards and isinstance(rewards.node, Items) and rewards.node.nodes:
        text = f"{algorithm.name} learns from given completions, which nothing scores; to score samples: eval.rewards"
        mistakes.add(rewards.place, "rewards", text)
    train = root.entries.get("train")
    size = train.node.entries.get("batch_size") if train is not None and isinstance(train.node, Block) else None
    if needs.partners and size is not None and isinstance(size.node, Scalar) and size.node.value in (1, "1"):
        text = f"{algorithm.name} also scores answers behind another row's prompt, so a step needs 2 rows or more"
        mistakes.add(size.place, "train.batch_size", text)
    data = root.entries.get("data")
    for number, node in enumerate(data.node.nodes if data is not None and isinstance(data.node, Items) else ()):
        given = node.entries.get("format") if isinstance(node, Block) else None
        if given is None or not isinstance(given.node, Scalar):
            continue
        shape = given.node.value
        if (needs.preferences or needs.completions > 1) and not needs.rewards and shape in _PAIRS:
            text = f"{algorithm.name} learns from preference or ranked rows, which {shape!r} rows are not"
            mistakes.add(given.node.place, f"data.{number}.format", text)


def _asked_by_rewards(node: Node) -> set[str]:
    """Names that rewards may give of models: every text among their `args`, or what stands there by default."""
    asked = _texts_below(node)
    for name in asked & set(register.reward.names()):
        config = getattr(register.reward.get(name).target, "config_type", Config)
        asked |= {field.default for field in config.model_fields.values() if isinstance(field.default, str)}
    return asked


def _texts_below(node: Node) -> set[str]:
    """Every text in a part of a recipe."""
    match node:
        case Scalar():
            return {str(node.value)}
        case Items():
            return {text for inner in node.nodes for text in _texts_below(inner)}
        case Block():
            return {text for entry in node.entries.values() for text in _texts_below(entry.node)}
    return set()


def recipe_rewards(recipe: Recipe) -> list[RewardConfig]:
    """What scores the completions of a round: the recipe's `rewards`, or those its method has where there are none."""
    if recipe.rewards:
        return recipe.rewards
    method: Algorithm[Any] = find_algorithm(recipe.algorithm.name).target(recipe.algorithm)
    return [RewardConfig(name=name) for name in method.needs.sources]


def units_per_prompt(recipe: Recipe, method: Algorithm[Any], *, answered: bool = True) -> int:
    """Units that an online method makes of the completions of a prompt, at most.

    `answered`: the data has a pair of answers to it, which methods that ask for them (`needs.given`) learn from too.
    """
    given = [Completion("", [], reward=1.0), Completion("", [], reward=0.0)] if method.needs.given and answered else []
    written = [Completion("", [])] * recipe.rollout.num_generations
    return max(1, method.count_units(Group(id="", messages=[], prompt=[], completions=[*written, *given])))


def prompts_per_round(recipe: Recipe, method: Algorithm[Any], num_prompts: int) -> int:
    """Prompts that an online method answers at once, of so many that the data has."""
    config = recipe.algorithm
    if isinstance(config, OnlineConfig) and config.prompts_per_round is not None:
        return config.prompts_per_round
    if isinstance(config, IterativeConfig):
        assert config.rounds is not None, "its own validation"
        return max(1, ceil(num_prompts / config.rounds))
    return max(1, recipe.train.batch_size // units_per_prompt(recipe, method))


def _check_rollouts(recipe: Recipe, algorithm: Registered, origin: Origin, mistakes: Mistakes) -> None:
    """Notes what keeps an online method from answering prompts and learning from what it wrote."""
    rollout, config = recipe.rollout, recipe.algorithm
    method: Algorithm[Any] = algorithm.target(config)
    needs = method.needs  # as this config has them

    def note(key: str, text: str) -> None:
        mistakes.add(origin.place(key), key, text)

    if recipe.drift != DriftConfig() and not isinstance(config, IterativeConfig):
        note("drift", f"{algorithm.name} has no rounds to compare; remove the block")
    for name in sorted(needs.others):
        if name not in recipe.models or recipe.models[name].source == "policy":
            text = f"{algorithm.name} learns from weights other than the policy's own here; name them: `from: PATH`"
            note(f"models.{name}", text)
    if not needs.rewards:
        for key, block in (("rollout", rollout), ("combine", recipe.combine)):
            if block != type(block)():
                note(key, f"{algorithm.name} learns from given completions and writes none; remove the block")
        return
    if not recipe.rewards and not needs.sources and needs.scored:
        note("rewards", f"missing key; {algorithm.name} learns from scored completions, so say what scores them")
    least = needs.completions
    if rollout.num_generations < least:
        text = f"{algorithm.name} compares completions of a prompt and needs {least} or more; it is"
        note("rollout.num_generations", f"{text} {rollout.num_generations}")
    if rollout.temperature == 0:
        note("rollout.temperature", "0 writes the same completion again and again; give a number above 0, such as 1.0")
    if rollout.max_completion_length >= recipe.train.max_length:
        text = f"{recipe.train.max_length} tokens leave no room for a prompt and {rollout.max_completion_length} tokens"
        note("train.max_length", f"{text} of completion (rollout.max_completion_length)")
    for key, value in needs.combine.items():
        if (found := getattr(recipe.combine, key)) != value:
            note(f"combine.{key}", f"it is {found}, which is not {algorithm.name}; set {key}: {value}")
    if recipe.combine.level == "advantage" and not needs.vector:
        note("combine.level", f"{algorithm.name} takes one reward a completion; set level: reward")
    if recipe.rewards and not needs.scored:
        note("rewards", f"{algorithm.name} learns from completions whatever they are worth; remove the block")
    prompts = config.prompts_per_round if isinstance(config, OnlineConfig) else None
    size, count = recipe.train.batch_size, units_per_prompt(recipe, method)
    if prompts is None and not isinstance(config, IterativeConfig) and size % count:
        near = max(count, round(size / count) * count)
        note(
            "train.batch_size",
            f"{size} completions are not whole prompts of {count} completions (rollout.num_generations); {near} are, "
            "or say algorithm.prompts_per_round",
        )


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with alignkit: `folder/stem` → file."""
    here = Path(__file__).parent
    folder = here / "_recipes" if (here / "_recipes").is_dir() else here.parent / "recipes"
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """The file a user means: a path, or the name of a shipped recipe. Raises RecipeError with the nearest names."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; expected a YAML file or the name of a shipped recipe")
    hint = did_you_mean(path.name, (file.name for file in path.parent.glob("*.y*ml"))) or did_you_mean(
        str(name), shipped
    )
    raise RecipeError(
        f"there is no recipe {str(name)!r}: neither a file nor a shipped recipe. {hint.capitalize()}".rstrip()
        + " `alignkit recipes` lists the shipped ones."
    )


class _Dumper(yaml.SafeDumper):
    """Writes text so that the schema-led reader gets the same text back."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    ambiguous = type_scalar(value, Any) != value or is_null(Scalar(Place(""), value, plain=True))
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if ambiguous else None)


_Dumper.add_representer(str, _text)


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML, defaults included; loading it gives an equal recipe."""
    values = recipe.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def departures(recipe: Recipe) -> dict[str, Any]:
    """Dotted key → value wherever the recipe differs from the defaults, which for an algorithm are its name's."""
    return dict(_departures(recipe, None, ""))


def _departures(config: Config, default: Config | None, path: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    preset = register.algorithm.get(config.name).preset if isinstance(config, AlgorithmConfig) else {}
    for name, info in type(config).model_fields.items():
        value, key = getattr(config, name), join(path, info.alias or name)
        usual = getattr(default, name) if default is not None else info.get_default(call_default_factory=True)
        usual = preset.get(name, usual)
        if value == usual:
            continue
        inner = (
            _departures(value, usual if isinstance(usual, Config) else None, key) if isinstance(value, Config) else []
        )
        found.extend(inner or [(key, _compact(value))])
    return found


def _compact(value: Any) -> Any:
    """Plain data, without what is default inside."""
    if isinstance(value, Config):
        return value.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    if isinstance(value, list | tuple):
        return [_compact(item) for item in value]
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    return value


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors; whatever has a `name` is a registered component."""
    schema = Recipe.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    definitions.pop("AlgorithmConfig")
    algorithms = [find_algorithm(name) for name in register.algorithm.names()]
    schema["properties"]["algorithm"] = _named_choice(algorithms, definitions)
    operations = [find_operation(name) for name in register.operation.names()]
    definitions["OperationConfig"] = _named_choice(operations, definitions)
    guides = [find_guide(name) for name in register.guide.names()]
    definitions["GuideConfig"] = _named_choice(guides, definitions)
    transforms = [find_transform(name) for name in register.transform.names()]
    definitions["TransformConfig"] = _named_choice(transforms, definitions)
    texts = {"type": "string"}
    schema["properties"]["extends"] = {
        "anyOf": [texts, {"type": "array", "items": texts}],
        "description": "recipes to start from: paths relative to this file, or shipped ones by name",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _named_choice(entries: Sequence[Registered], definitions: dict[str, Any]) -> dict[str, Any]:
    """One of these components with its own keys, or one of the reader's own; puts what they share in `definitions`."""
    choices: list[dict[str, Any]] = []
    for entry in entries:
        choice = config_type(entry).model_json_schema()
        definitions.update(choice.pop("$defs", {}))
        for key, value in entry.preset.items():
            choice["properties"][key]["default"] = value
        choice["properties"]["name"] = {"const": entry.name}
        choices.append({**choice, "title": entry.name, "required": ["name"]})
    own = {"type": "string", "pattern": ":", "description": "your own, as 'module:attribute'"}
    choices.append({"title": "your own", "type": "object", "properties": {"name": own}, "required": ["name"]})
    return {"oneOf": choices}


def check_paths(recipe: Recipe) -> None:
    """Raises RecipeError naming every local file or folder of the recipe that is not there."""
    mistakes = Mistakes()
    written = recipe.origin.root
    unwritten = isinstance(written, Block) and not written.entries  # made in Python, not read
    root = from_python(recipe.model_dump(by_alias=True), written.place) if unwritten else written
    note_missing_files(root, mistakes)
    mistakes.stop_if_any()
