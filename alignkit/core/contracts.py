"""Who promises what to whom. Algorithms, rewards and evaluations meet models, engines and ranks only through these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, get_args, runtime_checkable

from alignkit.core.config import AlgorithmConfig, CombineConfig
from alignkit.core.types import Batch, Forward, Group, Metric, RewardBatch, RewardOutput, Term, Unit

if TYPE_CHECKING:
    from torch import Tensor

ConfigT = TypeVar("ConfigT", bound=AlgorithmConfig)
Terms = dict[str, Term]
Metrics = dict[str, Metric]


@runtime_checkable
class Stateful(Protocol):
    """State that cannot be recomputed: a nested dict of tensors, numbers, strings, lists and None."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class World(Protocol):
    """Rank facts and reductions. Every rank must make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks."""
        ...

    def mean(self, x: Tensor, over: Tensor) -> Tensor:
        """Global mean of `x` where the boolean `over` is True; 0 when it is True nowhere."""
        ...

    def gather(self, obj: Any) -> list[Any]:
        """Every rank's object, in rank order, on every rank."""
        ...


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of the run; the recipe is checked against it before anything starts.

    `completions`: at least so many per group. `columns`: no-grad columns `<model>.<output>` to fill before `annotate`
    (`reference.logps`; `policy.logps` are of the round's beginning, `behaviour.weight` how much a token counts that
    another engine drew). `slots`: rows of a unit that a column of tokens is filled for, 0 elsewhere; a column it leaves
    out is filled for all. `outputs`: fields of `Forward` the loss reads; with
    `values` the run has a critic. `fields`: dataset columns `build` reads; a
    method that reads `label` takes preference rows too, as one desirable and one undesirable answer. `preferences`:
    completions must be ordered by their reward, as chosen and rejected are. `rewards`: the method is online: every
    round the policy answers prompts, and the recipe's `rewards` score what it wrote; without it a recipe that has some
    is refused. `vector`: it can take several rewards apart (`RolloutFacts.combine`); `combine`: keys of that block
    without which it would be another method. `refills`: how often prompts
    are drawn in place of groups the method does not keep. `demonstration`: a column whose answers are scored with the
    completions, into the field `demonstration.reward`. `partners`: every group comes with the
    completion that stands before it in its round (`Group.partner`), the first with the last one's, whatever the ranks;
    without one where that is an answer to its own prompt. `strata`: a column whose values each round holds in the
    proportion in which all the data does, so that equally frequent values come equally often. `models`: the run's other
    models besides those of `columns` that the method or its rewards ask, and when each moves (`never`, `round`) where
    the recipe does not say; it says so too of models in `columns`. `starts`: whose weights such a model begins with
    where the recipe does not say, by name; otherwise the policy's. `sources`: rewards that score a round where the
    recipe lists none. `scored`: False where an online method has no use for rewards. `given`: completions that the data
    has of a prompt stand behind those the policy writes, and are scored with them. `fresh`: columns filled anew before
    every optimizer step, for `relabel`. `late`: columns filled for one micro-batch at a time, right before its forward:
    they are in no annotation and no checkpoint, which is for what is too large to be kept, such as logits. `others`:
    models whose weights the recipe has to name, since what the policy starts from would say nothing in their place.
    """

    completions: int = 1
    columns: frozenset[str] = frozenset()
    slots: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    outputs: frozenset[str] = frozenset({"logps"})
    fields: frozenset[str] = frozenset()
    preferences: bool = False
    rewards: bool = False
    vector: bool = False
    combine: Mapping[str, str] = field(default_factory=dict, hash=False)
    refills: int = 0
    demonstration: str | None = None
    partners: bool = False
    strata: str | None = None
    models: Mapping[str, str] = field(default_factory=dict, hash=False)
    starts: Mapping[str, str] = field(default_factory=dict, hash=False)
    sources: tuple[str, ...] = ()
    scored: bool = True
    given: bool = False
    fresh: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()

    @property
    def roster(self) -> frozenset[str]:
        """Names of the run's other models that the method asks for."""
        columns = {column.partition(".")[0] for column in self.columns | self.fresh | self.late}
        return frozenset((columns | set(self.models)) - {"policy", "behaviour"})


@dataclass(frozen=True)
class Heads:
    """What stands on the policy's backbone.

    `kind`: language = the model's own output layer, or one copy of it for each of `names`, of which a row uses the one
    that its input `head` numbers; sequence and token = a layer that gives one number for each of `names`, read at the
    last token or at marked ones, saved as transformers' sequence or token classifier.
    `noise`: standard deviation of what is added to copies of the output layer. `hidden`: a score layer with a ReLU
    layer before it, which transformers' classifiers do not have. `frozen`: the backbone does not train.
    `members`: whole models side by side, of different heads at the start; their scores stand behind each other.
    `zero`: a score layer that is new says 0 of everything.
    """

    kind: Literal["language", "sequence", "token"] = "language"
    names: tuple[str, ...] = ()
    noise: float = 0.0
    hidden: bool = False
    frozen: bool = False
    members: int = 1
    zero: bool = False

    @property
    def is_language(self) -> bool:
        """Whether the policy writes text; the others only score it."""
        return self.kind == "language"


def _without_tokenizer(text: str) -> list[int]:
    """In place of a tokenizer where facts are made by hand, as tests do of methods that write no prompts."""
    raise ValueError(f"these facts come without a tokenizer, so {text!r} has no tokens; give `render` and `encode`")


@dataclass(frozen=True)
class RolloutFacts:
    """What an online method may have to know of the rest of its recipe.

    `weights`: the rewards by name; `Completion.scores` holds each. `max_completion_length` in tokens. `render`: a text
    → the tokens of the prompt it makes, as the user's turn where the policy has a chat template and else as it is.
    `encode`: a text → its tokens, none added. `max_length`: tokens of prompt and completion.
    """

    num_generations: int
    max_completion_length: int
    weights: Mapping[str, float]
    combine: CombineConfig
    max_length: int = 0
    render: Callable[[str], list[int]] = _without_tokenizer
    encode: Callable[[str], list[int]] = _without_tokenizer


class Algorithm(ABC, Generic[ConfigT]):
    """One method: groups → units → loss. Subclass it as `class Mine(Algorithm[MineConfig])` in one file.

    `build` and `loss` are pure. `annotate` and `observe` may keep state, which `state_dict` must then return.
    """

    needs: Needs = Needs()
    """What every config of the method needs; `__init__` may ask for more on an instance, once it knows its config."""
    config_type: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, AlgorithmConfig):
                    cls.config_type = argument

    def heads(self) -> Heads:
        """What the policy needs on its backbone."""
        return Heads()

    @classmethod
    def rows_per_unit(cls, config: ConfigT) -> int:
        """Rows of every unit under this config, for the plan of a run."""
        del config
        return cls.needs.completions

    def count_units(self, group: Group) -> int:
        """How many units `build` makes of a group: steps are planned before anything is built."""
        del group
        return 1

    def prepare(self, groups: Sequence[Group]) -> None:
        """Called once before anything is built, with all rows to train on, the same on every rank."""
        del groups

    def take_facts(self, facts: RolloutFacts) -> None:
        """Called once before anything is built: what the recipe says of rollouts and rewards. For online methods."""
        del facts

    def admits(self, group: Group) -> bool:
        """Whether a prompt is to be answered at all, before anything is written or scored for it."""
        del group
        return True

    def keeps(self, group: Group) -> bool:
        """Whether the method has a use for a scored group of a round; others make room as `needs.refills` says."""
        del group
        return True

    @abstractmethod
    def build(self, groups: list[Group]) -> list[Unit]:
        """Choose, pair or rank: plain Python, no tensors. Every unit has the same number of rows."""

    def annotate(self, batch: Batch, world: World) -> Batch:
        """Add credit, weights and batch statistics as columns. No gradient; sees the whole local round."""
        del world
        return batch

    def annotate_held_out(self, batch: Batch, world: World) -> Batch:
        """`annotate` of an evaluation. To be overridden where `annotate` moves state, which measuring must not."""
        return self.annotate(batch, world)

    def relabel(self, batch: Batch, world: World) -> Batch:
        """Columns that follow the policy from step to step, from the `fresh` ones. No gradient; sees this rank's units
        of one optimizer step. Columns named as the batch's own take their place, for counts too."""
        del world
        return batch

    @abstractmethod
    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        """Unreduced terms and metrics of a micro-batch. Pure; never averages."""

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        """Globally reduced metrics → what is logged of them, for numbers that are no mean over rows."""
        return metrics

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Called after each step with the globally reduced metrics; for adaptive coefficients."""
        del metrics

    def at_reference(self) -> Mapping[str, float]:
        """Metrics in closed form while policy = reference, for the step-0 truths. Empty when there is none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


LossFunction = Callable[[Forward, Batch, Any], tuple[Terms, Metrics]]
"""`function(out, batch, config)`, with the return of `Algorithm.loss`."""


def with_loss(algorithm: type[Algorithm[Any]], function: LossFunction) -> type[Algorithm[Any]]:
    """The same bundle with other mathematics. Its closed form at the reference is no longer known."""

    class Swapped(algorithm):  # type: ignore[valid-type, misc]
        def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
            return function(out, batch, self.config)

        def at_reference(self) -> Mapping[str, float]:
            return {}

    Swapped.__name__ = Swapped.__qualname__ = f"{algorithm.__name__}WithLoss"
    return Swapped


class Policy(Protocol):
    """A model that scores batches; how it lays them out is its secret."""

    def forward(self, batch: Batch, outputs: frozenset[str]) -> Forward: ...


class RolloutEngine(Protocol):
    """Gives groups their completions. Groups that arrive full are returned as they are."""

    def fill(self, groups: list[Group], n: int) -> list[Group]: ...

    def sync(self, version: int) -> None: ...


class Models(Protocol):
    """The run's models by name, as they stand when a round is scored, for reward sources.

    They are `policy`, those of the recipe's `models` block and those the method has; any other name is a RecipeError.
    """

    def identity(self, model: str = "policy") -> str:
        """Tells a model's present weights from all others', for what is kept of its answers."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        model: str = "policy",
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
    ) -> list[list[str]]:
        """`n` answers to each prompt, without the stop token or string that ended them; "" where it wrote nothing.

        A prompt is the user's turn where the model has a chat template, else the text to go on with. Draws are keyed by
        the prompt and the policy's version, so they depend on nothing that is asked beside it.
        """
        ...

    def choices(self, prompts: Sequence[str], answers: Sequence[str], model: str = "policy") -> list[list[float]]:
        """[B][n]: log-probability in nats, summed over its tokens, of each answer right behind each prompt."""
        ...

    def logps(self, units: Sequence[Unit], model: str = "policy") -> list[list[float]]:
        """Of every row, in order: the log-probabilities of its trained tokens, in nats."""
        ...


class RewardSource(Protocol):
    """Scores the completions of a round. `requires` names the dataset columns it reads."""

    requires: tuple[str, ...]

    def score(self, rows: RewardBatch, models: Models | None) -> RewardOutput: ...


@runtime_checkable
class AsksModels(Protocol):
    """A reward source that asks models of the run, and says which: they are then there, or the recipe is refused."""

    def models(self) -> tuple[str, ...]: ...


class Sink(Protocol):
    """Receives what a run logs, on rank 0 only. A sink never steers and never stops a run for want of a network."""

    def start(self, facts: Mapping[str, Any]) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...
