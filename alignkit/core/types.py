"""The nouns of alignkit. Everything that is not a tensor is a `Group`; everything that is a tensor is a `Batch`.

Shapes: N rows, L tokens, K rows a unit, U = N/K units, n completions a group, T tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

NAN = float("nan")
BEHAVIOUR = "behaviour.logps"
"""The column of what the writer of a completion said of its tokens: log-probabilities it drew them with, in nats."""


class Message(TypedDict, total=False):
    """One chat turn; further keys (tool calls, names) pass through to the chat template."""

    role: str
    content: str


@dataclass(slots=True)
class Score:
    """What one reward source said of one completion."""

    value: float
    valid: bool = True
    per_token: list[float] | None = None
    note: str = ""


@dataclass(slots=True)
class Completion:
    """One answer to a prompt, written by anybody.

    `tokens` [T] are ids after the prompt; `trained` [T] is None when all of them are, False on tool or environment
    tokens; `logps` [T] in nats, of the policy that wrote it. `reward` is the combined score, nan while unscored: a
    preference pair arrives with 1 for chosen and 0 for rejected. `version` -1 = not written by this run. `step_ends`:
    how many tokens it has up to the end of each of its steps, ascending; None where it has none. `ended`: whether it
    came to an end by itself, False when a limit of length cut it off; None = nobody said, so its last token tells.
    """

    text: str
    tokens: list[int]
    trained: list[bool] | None = None
    logps: list[float] | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    reward: float = NAN
    version: int = -1
    step_ends: list[int] | None = None
    ended: bool | None = None


@dataclass(slots=True)
class Group:
    """A prompt, its completions, and what the data set knows about it (`fields`).

    `partner` is an answer to another prompt of the same round, for methods whose needs ask for one; None without one.
    `plain`: the data gave the prompt as a text, not as turns; `messages` then holds it as one.
    """

    id: str
    messages: list[Message]
    prompt: list[int]
    completions: list[Completion] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    partner: Completion | None = None
    plain: bool = False

    def row(self, completion: Completion, **scalar: float) -> Row:
        """The prompt followed by one of its completions, for the model; `scalar` are facts for the loss."""
        trained = completion.trained if completion.trained is not None else [True] * len(completion.tokens)
        written = {} if completion.logps is None else {BEHAVIOUR: [*([0.0] * len(self.prompt)), *completion.logps]}
        return Row(
            tokens=[*self.prompt, *completion.tokens],
            trained=[*([False] * len(self.prompt)), *trained],
            token=written,
            scalar=dict(scalar),
            group=self.id,
        )


@dataclass(slots=True)
class Row:
    """One sequence through the model. `tokens`, `trained` and every list in `token` are [T] long.

    `inputs` are extra facts for the model: `head` = number of the output layer; `prompt` = how many tokens it shares
    with other rows, where training begins later than that. `token` and `scalar` are facts for the loss; `group` is the
    id of the group it came from, for messages.
    """

    tokens: list[int]
    trained: list[bool]
    inputs: dict[str, float] = field(default_factory=dict)
    token: dict[str, list[float]] = field(default_factory=dict)
    scalar: dict[str, float] = field(default_factory=dict)
    group: str = ""


Unit = tuple[Row, ...]
"""Rows whose loss is coupled: 1 for SFT and PPO, 2 for DPO, n for PRO. Never split between micro-batches or ranks."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as tensors, units adjacent.

    `inputs` face the model: `tokens`, `attention` [N, L]. `columns` face the loss, each [N, L], [N] or [U]; always
    there are the booleans `mask` [N, L] (tokens the loss is about), `row` [N] and `unit` [U] (False on padding).
    """

    inputs: dict[str, Tensor]
    columns: dict[str, Tensor]
    k: int

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.columns["row"].shape[0])

    @property
    def num_units(self) -> int:
        """U."""
        return int(self.columns["unit"].shape[0])

    def by_unit(self, x: Tensor) -> Tensor:
        """[N, ...] → [U, K, ...]."""
        return x.reshape(self.num_units, self.k, *x.shape[1:])

    def with_columns(self, columns: Mapping[str, Tensor]) -> Batch:
        """The same rows with more (or replaced) loss-facing columns."""
        return replace(self, columns={**self.columns, **columns})

    def keep_rows(self, *slots: int) -> Batch:
        """Only these rows of every unit, in this order: `keep_rows(0)` of a pair is the chosen half."""
        units, k = self.num_units, self.k

        def pick(x: Tensor) -> Tensor:
            return self.by_unit(x)[:, list(slots)].reshape(units * len(slots), *x.shape[1:])

        unit_shaped = {name for name, x in self.columns.items() if x.ndim == 1 and x.shape[0] == units and k != 1}
        return Batch(
            inputs={name: pick(x) for name, x in self.inputs.items()},
            columns={name: x if name in unit_shaped else pick(x) for name, x in self.columns.items()},
            k=len(slots),
        )


@dataclass(frozen=True, slots=True)
class Forward:
    """What the policy says of a batch; None = not asked for.

    `logps[n, t]` = log p(tokens[t] | tokens[<t]) in nats, 0 where `mask` is False: no off-by-one anywhere. `entropy`
    [N, L] in nats and `correct` [N, L] (1.0 where the most likely token was the right one) stand at the same place.
    `scores[n, t]` [N, L, H] is what the score layer says of tokens[<t], in float32, and `logits[n, t]` [N, L, V]
    predicts tokens[t]; `values[n, t]` [N, L] is what the critic expects of tokens[<t]. A model that scores has no
    `logps`: they are 0.
    """

    logps: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of the loss, unreduced: the trainer sums `value` where the column `over` is True, divides by the
    global count of that column, and multiplies by `weight`. `value` has the shape of that column: [N, L], [N], [U]."""

    value: Tensor
    over: str = "mask"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Metric:
    """A number to log that does not depend on how the batch was cut: it travels as sum and count.

    `how="mean"` is sum / count over all micro-batches and ranks, "sum" ignores count; for "min" and "max" `sum` holds
    the extreme of this part and `count` how many values it is over (0 = nothing to say).
    """

    sum: Tensor | float
    count: Tensor | float = 1.0
    how: Literal["mean", "sum", "min", "max"] = "mean"

    @classmethod
    def mean(cls, value: Tensor, over: Tensor) -> Metric:
        """The mean of `value` where the boolean `over` (same shape) is True. Works on detached values."""
        return cls(value.detach().double().where(over, 0.0).sum(), over.sum())

    @classmethod
    def extreme(cls, value: Tensor, over: Tensor, how: Literal["min", "max"]) -> Metric:
        """The smallest or largest of `value` where `over` is True."""
        worst = float("inf") if how == "min" else float("-inf")
        masked = value.detach().where(over, worst)
        return cls(masked.min() if how == "min" else masked.max(), over.sum(), how)


@dataclass(slots=True)
class RewardBatch:
    """The completions of a round as a reward source sees them. B rows; T = longest completion.

    `plain` [B]: where the data gave the prompt as a text, not as turns. `prompt_ids` [B]: the tokens of each prompt;
    `ids` [B]: of each group; `given` [B]: where the data gave the completion, and no model of this run wrote it.
    """

    prompts: list[list[Message]]
    completions: list[str]
    completion_ids: Tensor | None
    completion_mask: Tensor | None
    group: Tensor
    columns: dict[str, list[Any]]
    step: int
    ended: Tensor
    plain: list[bool] = field(default_factory=list)
    prompt_ids: list[list[int]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    given: list[bool] = field(default_factory=list)


@dataclass(slots=True)
class RewardOutput:
    """What a reward source answers: `score` [B] float32, never nan; `valid` [B] False = it had nothing to say."""

    score: Tensor
    valid: Tensor
    per_token: Tensor | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    info: list[dict[str, Any]] = field(default_factory=list)
