"""A recipe → bytes of live tensors a process holds in each phase of its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

from alignkit.core.config import IterativeConfig
from alignkit.core.contracts import Algorithm, Heads, Needs
from alignkit.dist.config import WHOLE_SHARDED, ZERO, DistConfig
from alignkit.dist.zero import BUCKET
from alignkit.memory.given import find_config
from alignkit.memory.profile import PROMPT_SHARE, Model, Pass, Profile, Rows, Sizes
from alignkit.models.config import ModelConfig
from alignkit.recipe import Recipe, find_algorithm, prompts_per_round
from alignkit.rollout.config import SamplingConfig

LOGGED = frozenset({"entropy", "correct"})
"""Outputs that a step computes for the log."""
KEPT_GATHERED = 10**9
"""Numbers that DeepSpeed keeps gathered in stage 3 where they are soon needed again."""
PREFETCHED = 3
"""Layers that FSDP2 has whole at once: the one that computes, the next, and the buffer that is being filled."""
MOMENTS = 2
"""Numbers that AdamW keeps of each that it moves."""
MAX_BATCH, MANY = 64, 10**6
"""Rows that the native sampler writes at a time, and more prompts than it could."""
WORD = 4
"""Bytes of a float32."""
KINDS = ("weights", "gradients", "optimizer", "others", "activations")
"""What takes memory: the policy's weights (with a critic's), their gradients, what the optimizer keeps, other models of
the run, and what passes through."""


@dataclass(frozen=True)
class Phase:
    """Bytes a process holds at the worst moment of a phase, by what they are."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Prediction:
    """The phases of a run in the order in which they come.

    `fed`: tokens of the largest micro-batch as laid out; `forwards`: micro-batches of a step; `assumed`: what had to be
    taken for granted.
    """

    phases: list[Phase]
    sizes: Sizes
    fed: int
    forwards: int
    layout: str
    assumed: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)


@lru_cache(maxsize=64)
def _profile(model: str, critic: str | None, heads: Heads, device: str, shape: str) -> Profile:
    """By JSON, which can be compared; other changes of a recipe find it again. `shape`: what the config.json says."""
    del shape
    return Profile(
        Model(
            ModelConfig.model_validate_json(model),
            heads,
            None if critic is None else ModelConfig.model_validate_json(critic),
        ),
        device,
    )


@lru_cache(maxsize=64)
def _train(profile: Profile, rows: Rows) -> Pass:
    return profile.train(rows)


@lru_cache(maxsize=64)
def _score(profile: Profile, rows: Rows) -> int:
    return profile.score(rows)


@lru_cache(maxsize=64)
def _written(profile: Profile, rows: int, prompts: int, prompt: int, sampling: str) -> int:
    return profile.write(rows, prompts, prompt, SamplingConfig.model_validate_json(sampling))


class Unpredictable(Exception):
    """A model whose code cannot be followed without numbers."""


@contextmanager
def _followed() -> Iterator[None]:
    # A model's code may ask anything of a tensor, and answers for stand-ins are missing in their own ways.
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Unpredictable(f"the model's code cannot be followed without weights: {first}") from error


def predict(recipe: Recipe, *, world_size: int = 1, device: str = "cuda", config: str) -> Prediction:
    """The memory of each process of a run of so many, on a kind of device, if rows are as long as `train.max_length`.

    `config`: the policy's config.json, or a folder that holds it.

    Raises:
        Unpredictable: the model cannot be followed.
    """
    with _followed():
        return _Run(recipe, world_size, device, config).predict()


def least(recipe: Recipe, *, world_size: int, device: str, config: str) -> int:
    """Bytes that a process of a run takes at least: a quick answer. Raises Unpredictable."""
    with _followed():
        return _Run(recipe, world_size, device, config).least()


class _Run:
    """One recipe on one kind of device."""

    def __init__(self, recipe: Recipe, world: int, device: str, path: str) -> None:
        self.recipe, self.world, self.device = recipe, world, device
        self.method: Algorithm[Any] = find_algorithm(recipe.algorithm.name).target(recipe.algorithm)
        self.needs: Needs = self.method.needs
        self.sharing = Sharing(recipe.dist, world, device)
        self.model = recipe.model.model_copy(update={"name_or_path": path})
        self.assumed: list[str] = []

    def predict(self) -> Prediction:
        """Every phase."""
        profile = self._of(self.model, self._critic(), self.method.heads())
        rows, sizes = self._rows(), profile.sizes
        step = _train(profile, rows)
        sharing, resident = self.sharing, self._others(sizes)
        state = sharing.optimizer(sizes)
        whole = {"weights": sharing.gathered(sizes), "optimizer": state, "others": resident}
        phases = [Phase("loading", {"weights": sizes.weights + sharing.parts_beside_whole(sizes)})]
        if scoring := self._scoring(profile, rows):
            phases.append(max((Phase("reference", parts) for parts in scoring), key=lambda phase: phase.total))
        if writing := self._writing(profile):
            phases.append(Phase("rollout", {**whole, "activations": writing}))
        update = {"weights": sharing.weights(sizes), "optimizer": state, "others": resident}
        before = sharing.gradients(sizes, arrived=step.forwards > 1)
        phases.append(Phase("forward", {**update, "gradients": before, "activations": step.forward}))
        if sharing.whole_gradients and step.forwards == 1:
            gradients = sharing.gradients(sizes, arrived=False)
            phases.append(Phase("backward", {**update, "gradients": gradients, "activations": step.arriving}))
        else:
            gradients = sharing.gradients(sizes, arrived=True)
            phases.append(Phase("backward", {**update, "gradients": gradients, "activations": step.backward}))
        stepping = sharing.gradients(sizes, arrived=True)
        held = {"weights": sharing.held(sizes), "optimizer": state, "others": resident}
        phases.append(Phase("step", {**held, "gradients": stepping, "activations": sharing.stepping(sizes)}))
        if sharing.spreads_weights:
            phases.append(Phase("saving", whole))
        return Prediction(
            phases, sizes, step.fed, step.forwards, profile.policy.path.layout, [*dict.fromkeys(self.assumed)]
        )

    def least(self) -> int:
        """Bytes that an update takes whatever passes through it."""
        sizes = self._of(self.model, self._critic(), self.method.heads()).sizes
        held = self.sharing.held(sizes) + self.sharing.optimizer(sizes) + self._others(sizes)
        return max(sizes.weights, held + self.sharing.gradients(sizes, arrived=True))

    def _of(self, model: ModelConfig, critic: ModelConfig | None = None, heads: Heads | None = None) -> Profile:
        heads = heads if heads is not None else Heads()
        told = None if critic is None else critic.model_dump_json()
        path = Path(model.name_or_path)
        shape = (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
        return _profile(model.model_dump_json(), told, heads, self.device, shape)

    def _critic(self) -> ModelConfig | None:
        if "values" not in self.needs.outputs:
            return None
        given = self.recipe.models.get("critic")
        source = "policy" if given is None else given.source
        return self.model.model_copy(update={"name_or_path": self._path("critic", source)})

    def _path(self, name: str, source: str) -> str:
        """The config of another model of the run; the policy's where it is not to be found."""
        if source in ("policy", self.recipe.model.name_or_path):
            return self.model.name_or_path
        found = find_config(source)
        if found is None:
            self.assumed.append(f"models.{name}: {source} is not on this machine; taken to be as large as the policy")
        return found if found is not None else self.model.name_or_path

    def _rows(self) -> Rows:
        train, rollout = self.recipe.train, self.recipe.rollout
        online = self.needs.rewards
        prompt = train.max_length - rollout.max_completion_length if online else train.max_length // PROMPT_SHARE
        return Rows(
            units=ceil(train.batch_size / self.world),
            k=self.method.rows_per_unit(self.recipe.algorithm),
            length=train.max_length,
            prompt=max(1, prompt),
            shared_by=rollout.num_generations if online else 1,
            outputs=self.needs.outputs | LOGGED,
            tokens=train.micro_batch_tokens,
            most=train.micro_batch_size,
        )

    def _is_cached(self, name: str) -> bool:
        """Whether a model scores all rows before the run, and is freed."""
        given = self.recipe.models.get(name)
        precomputes = given is None or given.precompute
        return (
            precomputes and not self.needs.rewards and not self._moves(name) and f"{name}.logps" in self.needs.columns
        )

    def _names(self) -> list[str]:
        """Models with weights here besides the policy and its critic."""
        named = {name for name in self.recipe.models if name != "critic"} | self.needs.roster
        return sorted(n for n in named if n not in self.recipe.models or self.recipe.models[n].endpoint is None)

    def _moves(self, name: str) -> bool:
        given = self.recipe.models.get(name)
        refresh = None if given is None else given.refresh
        return (refresh or self.needs.models.get(name, "never")) == "round"

    def _source(self, name: str) -> str:
        given = self.recipe.models.get(name)
        if given is None and self.needs.starts.get(name) in self.recipe.models:
            given = self.recipe.models[self.needs.starts[name]]
        return "policy" if given is None else given.source

    def _frozen(self) -> dict[str, ModelConfig]:
        """Models that never move and have weights of their own."""
        adapters = self.model.lora is not None
        plain = {"lora": None, "quantization": None, "gradient_checkpointing": False}
        return {
            name: self.model.model_copy(update={**plain, "name_or_path": self._path(name, self._source(name))})
            for name in self._names()
            if not self._moves(name) and not (adapters and self._source(name) == "policy")
        }

    def _others(self, sizes: Sizes) -> int:
        """Bytes of other models that stay. Those that move share one copy of what trains."""
        frozen = [config for name, config in self._frozen().items() if not self._is_cached(name)]
        moves = any(self._moves(name) for name in self._names())
        return moves * sizes.trained + sum(self._of(config).sizes.weights for config in frozen)

    def _scoring(self, profile: Profile, rows: Rows) -> list[dict[str, int]]:
        """Rows are scored before they are learned from, by weights that are whole on every process: once before the run
        by models that are then freed, and in every round by those that stay."""
        sizes, found, frozen = profile.sizes, [], self._frozen()
        weights, resident = self.sharing.gathered(sizes), self._others(sizes)
        names = self._names()
        if cached := [name for name in names if self._is_cached(name)]:
            configs = [self._of(frozen[name]) for name in cached if name in frozen]
            every = replace(rows, units=MANY)
            scoring = max((_score(each, every) for each in configs), default=0) or _score(profile, every)
            others = max((each.sizes.weights for each in configs), default=0)
            masters = self.sharing.masters(sizes)
            found.append({"weights": weights, "others": others, "optimizer": masters, "activations": scoring})
        staying = [name for name in names if name not in cached]
        if staying or any(column.startswith("policy.") for column in self.needs.columns):
            asked = [profile, *(self._of(frozen[name]) for name in staying if name in frozen)]
            batch = replace(rows, units=MANY) if isinstance(self.recipe.algorithm, IterativeConfig) else rows
            scoring = max(_score(each, batch) for each in asked) if self.method.heads().is_language else 0
            second = sum(self._moves(name) for name in names) > 0  # copied before the one before is given up
            others, state = resident + second * sizes.trained, self.sharing.optimizer(sizes)
            found.append({"weights": weights, "others": others, "optimizer": state, "activations": scoring})
        return found

    def _writing(self, profile: Profile) -> int:
        """Bytes of what the native sampler keeps while it writes; 0 where nobody writes here."""
        recipe, rollout, evaluation, found = self.recipe, self.recipe.rollout, self.recipe.eval, 0
        if self.needs.rewards and rollout.engine == "native":
            prompts = ceil(prompts_per_round(recipe, self.method, MANY) / self.world)
            found = self._write(profile, prompts, rollout.num_generations, rollout)
        if evaluation.num_samples and self.method.heads().is_language:
            prompts = ceil(evaluation.num_samples / self.world)
            found = max(found, self._write(profile, prompts, 1, evaluation.sampling))
        return found

    def _write(self, profile: Profile, prompts: int, each: int, sampling: SamplingConfig) -> int:
        rows = min(MAX_BATCH, prompts * each)
        prompt = max(1, self.recipe.train.max_length - sampling.max_completion_length)
        knobs = SamplingConfig.model_validate(sampling.model_dump(include=set(SamplingConfig.model_fields)))
        return _written(profile, rows, ceil(rows / each), prompt, knobs.model_dump_json())


class Sharing:
    """How processes share weights, gradients and optimizer state: bytes of each, of one process."""

    def __init__(self, config: DistConfig, world: int, device: str) -> None:
        self._config, self._world, self._device = config, world, device
        asked = "ddp" if config.backend == "auto" else config.backend
        self.backend = asked if world > 1 else "ddp"
        self.spreads_weights = self.backend in WHOLE_SHARDED
        self.whole_gradients = self.backend in {"ddp", "zero1"}

    def held(self, sizes: Sizes) -> int:
        """Weights between two updates."""
        if not self.spreads_weights:
            return sizes.weights
        return 0 if self._config.offload_weights else sizes.weights // self._world

    def weights(self, sizes: Sizes) -> int:
        """Weights during an update: this process's part, what is in no layer, and the layers that are gathered."""
        if not self.spreads_weights:
            return sizes.weights
        layers = PREFETCHED * sizes.layer if self.backend == "fsdp2" else max(sizes.layer, KEPT_GATHERED * WORD)
        return self.held(sizes) + min(sizes.weights, sizes.outside + layers)

    def gathered(self, sizes: Sizes) -> int:
        """Weights where they are whole: for rollouts, scoring and saving."""
        return sizes.weights + (self.held(sizes) if self.spreads_weights else 0)

    def parts_beside_whole(self, sizes: Sizes) -> int:
        """Parts that are cut while the model is still whole."""
        return self.held(sizes) if self.spreads_weights else 0

    def masters(self, sizes: Sizes) -> int:
        """DeepSpeed's own copy of the weights that this process moves; stage 3 moves the float32 parts themselves."""
        if self.backend not in {"zero1", "zero2"} or self._config.offload_optimizer:
            return 0
        return sizes.trained_numbers * WORD // self._world

    def optimizer(self, sizes: Sizes) -> int:
        """What AdamW keeps, in float32."""
        if self._config.offload_optimizer and self.backend != "ddp":
            return 0
        moments = MOMENTS * sizes.trained
        return (moments if self.backend == "ddp" else moments // self._world) + self.masters(sizes)

    def gradients(self, sizes: Sizes, *, arrived: bool) -> int:
        """Gradients, where they have `arrived`, and the buffers through which they are exchanged."""
        if self.backend == "ddp":
            return sizes.trained * (arrived + (self._world > 1))
        if self.backend == "fsdp2":
            part = 0 if self._config.offload_weights else sizes.trained // self._world
            passing = min(sizes.trained, sizes.outside + 2 * sizes.layer)
            return part * arrived + passing
        buffers = BUCKET * WORD * (2 if self._device == "cuda" and self.backend != "zero3" else 1)
        if self.backend == "zero1":
            return sizes.trained * arrived + buffers
        part = 0 if self._config.offload_optimizer else sizes.trained // self._world
        return part * arrived + buffers

    def stepping(self, sizes: Sizes) -> int:
        """What a step takes for itself: DeepSpeed puts this process's gradients into one row."""
        flat = self.backend in ZERO and not self._config.offload_optimizer
        return sizes.trained // self._world if flat else 0
