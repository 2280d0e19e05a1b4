"""What may be done to a column of scores before it is weighed, by name: the `transforms` of a reward.

A transform is a class registered here, in your own module or as an entry point of the group `alignkit.transforms`, with
its keys beside its name:

    @register.transform("shift")
    class Shift(Transform[ShiftConfig]):
        config_type = ShiftConfig

        def apply(self, scores, valid, table, world): ...

The mathematics are the pure functions below. Shapes: B completions; rows that are not valid are left out of every
statistic. What each assumes of the scale of a reward is said where it matters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from alignkit.core.config import Config
from alignkit.core.contracts import World
from alignkit.core.errors import RecipeError, RunFailed
from alignkit.core.lazy import F, torch
from alignkit.core.registry import Entry, register
from alignkit.rewards.table import RewardTable, by_group

if TYPE_CHECKING:
    from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""Added to a variance before its root is taken."""
MAD_TO_STD = 1.4826
"""A median absolute deviation times this is the standard deviation of normal scores."""


class TransformConfig(Config):
    """What every entry of `transforms` may hold."""

    name: str = Field(description="registered name, entry point or 'module:Class'")


ConfigT = TypeVar("ConfigT", bound=TransformConfig)


class Transform(ABC, Generic[ConfigT]):
    """A column of scores in, a column out. Pure: the same scores give the same column in every round."""

    config_type: ClassVar[type[TransformConfig]] = TransformConfig
    reads_raw_scores: ClassVar[bool] = False
    """Whether scores are compared with rewards that no transform has touched."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def requires(self) -> tuple[str, ...]:
        """The data set columns it reads."""
        return ()

    @abstractmethod
    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """The new column [B]. Every process calls it for every round, rows or none; `world` None = one process."""


def find_transform(name: str) -> Entry:
    """The registered transform of that name, entry point or 'module:Class'. Raises RecipeError."""
    entry = register.transform.get(name)
    if not (isinstance(entry.target, type) and issubclass(entry.target, Transform)):
        raise RecipeError(f"{name!r} is {entry.target!r}, expected a subclass of alignkit.rewards.transforms.Transform")
    return entry


def build_transform(config: TransformConfig) -> Transform[Any]:
    """The transform that an entry describes."""
    built: Transform[Any] = find_transform(config.name).target(config)
    return built


def soft_clip(scores: Tensor, bound: float) -> Tensor:
    """c·tanh(r/c), elementwise: straight near 0, never beyond ±c."""
    return bound * torch.tanh(scores / bound)


def whiten(scores: Tensor, valid: Tensor, world: World | None = None, *, shift_mean: bool = True) -> Tensor:
    """(r − mean) / √(var + 1e-8) over the valid rows of all processes, with 1/(n − 1); fewer than 2 stay as they are.

    Args: [B] scores and booleans; returns [B]. Without `shift_mean` the mean is put back.
    """

    def total(x: Tensor) -> Tensor:
        return x if world is None else world.sum(x)

    kept = scores.where(valid, 0.0)
    count, summed = total(torch.stack([valid.sum().to(scores.dtype), kept.sum()]))
    mean = summed / count.clamp(min=1.0)
    squares = total((scores - mean).where(valid, 0.0).square().sum())
    if count < 2:
        return scores
    scaled = (scores - mean) * torch.rsqrt(squares / (count - 1) + VARIANCE_FLOOR)
    whitened: Tensor = scaled if shift_mean else scaled + mean
    return whitened


def group_norm(
    scores: Tensor, valid: Tensor, group: Tensor, scale: Literal["std", "none", "mad"] = "std", eps: float = 1e-6
) -> Tensor:
    """(r − mean) / (scale + eps) within each prompt; equal scores, and a score alone, give 0.

    Args: [B] scores, booleans and group numbers; returns [B]. std with 1/(n − 1); none only subtracts the mean; mad:
    median and 1.4826·median absolute deviation.
    """

    def normed(some: Tensor) -> Tensor:
        if len(some) < 2 or bool((some == some[0]).all()):
            return torch.zeros_like(some)
        if scale == "mad":
            centred = some - some.quantile(0.5)
            return centred / (MAD_TO_STD * centred.abs().quantile(0.5) + eps)
        centred = some - some.mean()
        return centred if scale == "none" else centred / (some.std() + eps)

    return by_group(normed, scores, valid, group)


def group_rank(scores: Tensor, valid: Tensor, group: Tensor) -> Tensor:
    """Rank within each prompt, −1 for the lowest to 1 for the highest, ties sharing the mean; alone 0. [B] → [B]."""

    def ranked(some: Tensor) -> Tensor:
        if len(some) < 2:
            return torch.zeros_like(some)
        below = (some[None] < some[:, None]).sum(1).to(some.dtype)
        equal = (some[None] == some[:, None]).sum(1).to(some.dtype) - 1
        return 2 * (below + 0.5 * equal) / (len(some) - 1) - 1

    return by_group(ranked, scores, valid, group)


def log_sigmoid_centred(scores: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """log σ((r − r_ref)/T), elementwise: how sure it is, in nats, that an answer is good. Source: arXiv 2402.00742."""
    return F.logsigmoid((scores - reference) / temperature)


def calibrated(score: float, reference: Sequence[float]) -> float:
    """Share of reference rewards below a score, ties counting half. Source: arXiv 2412.19792."""
    below = sum(other < score for other in reference)
    equal = sum(other == score for other in reference)
    return (below + 0.5 * equal) / len(reference)


def exp_tilt(quantile: Tensor, t: float, mode: Literal["best_of_n", "worst_of_n"]) -> Tensor:
    """exp(t·C) / exp(t) for best-of-n, −exp(−t·C) for worst-of-n, of C in [0, 1]; so within ±1.

    Source: arXiv 2412.19792; divided by its largest value, since exp(10) would drown every other reward.
    """
    return torch.exp(t * (quantile - 1)) if mode == "best_of_n" else -torch.exp(-t * quantile)


class ClipConfig(TransformConfig):
    """Keys of `clip`."""

    low: float | None = Field(None, description="lowest score; null = none")
    high: float | None = Field(None, description="highest score; null = none")

    @model_validator(mode="after")
    def _has_bounds(self) -> ClipConfig:
        if self.low is None and self.high is None:
            raise ValueError("clip needs `low`, `high` or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self


@register.transform("clip")
class Clip(Transform[ClipConfig]):
    """Bounds on a score."""

    config_type = ClipConfig

    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """min(max(r, low), high)."""
        del valid, table, world
        return scores.clamp(self.config.low, self.config.high)


class SoftClipConfig(TransformConfig):
    """Keys of `soft_clip`."""

    bound: float = Field(gt=0, description="scores stay within ± this")


@register.transform("soft_clip")
class SoftClip(Transform[SoftClipConfig]):
    """Bounds that a score approaches and never meets."""

    config_type = SoftClipConfig

    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """See `soft_clip`."""
        del valid, table, world
        return soft_clip(scores, self.config.bound)


class WhitenConfig(TransformConfig):
    """Keys of `whiten`."""

    shift_mean: bool = Field(True, description="also subtract the mean")
    mean: float | None = Field(None, description="of reference answers, held fixed; null = of the round")
    std: float | None = Field(None, gt=0, description="of reference answers, with `mean`; null = of the round")

    @model_validator(mode="after")
    def _has_both_moments(self) -> WhitenConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("whiten needs `mean` and `std`, or neither")
        return self


@register.transform("whiten")
class Whiten(Transform[WhitenConfig]):
    """Mean 0 and standard deviation 1 over the round, all processes together, or of answers whose moments are given.

    The former mixes hard prompts with bad answers.
    """

    config_type = WhitenConfig

    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """See `whiten`; (r − mean) / std, every score by itself, where these are given."""
        del table
        mean, std = self.config.mean, self.config.std
        if mean is not None and std is not None:
            return (scores - mean) / std + (0.0 if self.config.shift_mean else mean)
        return whiten(scores, valid, world, shift_mean=self.config.shift_mean)


class GroupNormConfig(TransformConfig):
    """Keys of `group_norm`."""

    scale: Literal["std", "none", "mad"] = Field("std", description="what centred scores are divided by")
    eps: float = Field(1e-6, gt=0, description="added to it")


@register.transform("group_norm")
class GroupNorm(Transform[GroupNormConfig]):
    """Mean 0 and unit scale within each prompt."""

    config_type = GroupNormConfig

    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """See `group_norm`."""
        del world
        return group_norm(scores, valid, table.group, self.config.scale, self.config.eps)


@register.transform("rank")
class Rank(Transform[TransformConfig]):
    """Only the order within each prompt counts."""

    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """See `group_rank`."""
        del world
        return group_rank(scores, valid, table.group)


class LscConfig(TransformConfig):
    """Keys of `lsc`."""

    reference: Literal["quantile", "canned", "constant"] = Field(
        "quantile", description="r_ref: a quantile of a prompt's reference rewards, one reward a prompt, or one number"
    )
    q: float = Field(0.85, ge=0, le=1, description="which quantile; 0.85 is the paper's for helpfulness")
    column: str = Field("ref_rewards", description="data column of a prompt's reference rewards, or of its one reward")
    constant: float = Field(0.0, description="r_ref, with reference: constant")
    temperature: float = Field(1.0, gt=0, description="divides r − r_ref")


@register.transform("lsc")
class Lsc(Transform[LscConfig]):
    """Log-sigmoid centring: rewards on the scale of log-odds add up to "good in every way". Source: arXiv 2402.00742.

    The scores must be those of a Bradley-Terry model. u ≤ 0 always; dividing by a group's deviation afterwards undoes
    part of it.
    """

    config_type = LscConfig
    reads_raw_scores = True

    @property
    def requires(self) -> tuple[str, ...]:
        """The column of reference rewards, unless r_ref is a constant."""
        return () if self.config.reference == "constant" else (self.config.column,)

    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """See `log_sigmoid_centred`."""
        del world
        references = [self._reference(table, row) if ok else 0.0 for row, ok in enumerate(valid.tolist())]
        return log_sigmoid_centred(scores, scores.new_tensor(references), self.config.temperature)

    def _reference(self, table: RewardTable, row: int) -> float:
        if self.config.reference == "constant":
            return self.config.constant
        found = reference_rewards(table, self.config.column, row)
        if self.config.reference == "canned":
            return found[0]
        return float(torch.tensor(found, dtype=torch.float64).quantile(self.config.q))


class CalibrateConfig(TransformConfig):
    """Keys of `calibrate`."""

    column: str = Field("ref_rewards", description="data column of rewards of the reference's answers to a prompt")


@register.transform("calibrate")
class Calibrate(Transform[CalibrateConfig]):
    """Where a score stands among those of the reference model's answers, 0 … 1. Source: arXiv 2412.19792.

    Better than all K of them is 1, however much better: the resolution is 1/K.
    """

    config_type = CalibrateConfig
    reads_raw_scores = True

    @property
    def requires(self) -> tuple[str, ...]:
        """The column of reference rewards."""
        return (self.config.column,)

    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """See `calibrated`."""
        del world
        rows = enumerate(zip(scores.tolist(), valid.tolist(), strict=True))
        found = [
            calibrated(score, reference_rewards(table, self.config.column, row)) if ok else 0.0
            for row, (score, ok) in rows
        ]
        return scores.new_tensor(found)


class ExpTiltConfig(TransformConfig):
    """Keys of `exp_tilt`."""

    t: float = Field(10.0, gt=0, description="how strong; 10 suits four answers")
    mode: Literal["best_of_n", "worst_of_n"] = Field("best_of_n", description="what is done with the answers later")


@register.transform("exp_tilt")
class ExpTilt(Transform[ExpTiltConfig]):
    """Calibrated scores made ready for best-of-n, or for worst-of-n. Behind `calibrate`. Source: arXiv 2412.19792."""

    config_type = ExpTiltConfig

    def apply(self, scores: Tensor, valid: Tensor, table: RewardTable, world: World | None) -> Tensor:
        """See `exp_tilt`. Raises RunFailed where a score is no share."""
        del table, world
        wrong = scores[valid & ((scores < 0) | (scores > 1))]
        if len(wrong):
            raise RunFailed(
                f"transform 'exp_tilt' met the score {float(wrong[0]):g}; expected one in 0 … 1, put `calibrate` before"
            )
        return exp_tilt(scores, self.config.t, self.config.mode)


def reference_rewards(table: RewardTable, column: str, row: int) -> list[float]:
    """The rewards in a row's reference column, a number or a list of them. Raises RunFailed where there is none."""
    value = table.columns[column][row]
    found = [value] if isinstance(value, (int, float)) else value
    if not isinstance(found, list) or not found or not all(isinstance(x, (int, float)) and x == x for x in found):
        raise RunFailed(
            f"column {column!r} of row {row} (completion {table.texts[row][:60]!r}) is {str(value)[:60]!r}; expected "
            "the rewards of reference answers, a number or a list of numbers"
        )
    return [float(x) for x in found]
