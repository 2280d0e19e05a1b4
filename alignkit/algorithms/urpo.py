"""URPO: Unified Reward & Policy Optimization, one model as player and referee in one GRPO. Lu et al. 2025, arXiv
2507.17515.

    verifiable   r = what a rule says of the answer
    preference   r = τ(scores the policy gives to N answers of the data, their true scores)
    open         r = the score that the policy itself gives the answer among those of its group, no gradient
    A = λ_task · (r − mean of the group) / (std of the group)          loss = grpo's, over all three together

Rewards are chosen by the column `task`; `referee_rank`, `self_referee` and the operation `referee` are made for it. No
code is published: prompts, scales and votes, and that open prompts wait until the referee is right often enough and
count little at first, are reconstructed. Deviations: the divergence from the reference is not multiplied by λ; the
accuracy that open prompts wait for is a moving average over the rounds' preference rows, new to the policy in the first
epoch, and no held-out one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from alignkit.algorithms.grpo import GRPO, GRPOConfig
from alignkit.core import Batch, Completion, Forward, Group, Metric, Metrics, Terms, Unit, World, register
from alignkit.core.answers import answer_units
from alignkit.core.errors import DataError, RecipeError

Task = Literal["verifiable", "preference", "open"]
TASKS: tuple[Task, ...] = get_args(Task)
CHANCE = 0.5
"""Accuracy of a referee that does not look; its moving average begins there."""


class URPOConfig(GRPOConfig):
    """The keys of grpo, and when and how much each task counts."""

    task_weights: dict[Task, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        {}, description="λ of tasks that do not count 1; prompts of a task with 0 are left unanswered"
    )
    min_referee_acc: float = Field(
        0.6, ge=0, le=1, description="open prompts wait until the running accuracy of the referee is so high"
    )
    ramp_steps: int = Field(100, ge=0, description="steps in which their weight then rises to λ")
    referee_average: float = Field(
        0.9, ge=0, lt=1, description="what the running accuracy keeps at each round; it begins at ½"
    )
    referee: str = Field("referee_rank", description="the reward, by its label, that tells the referee's accuracy")

    @model_validator(mode="after")
    def _compares_groups(self) -> URPOConfig:
        if self.advantage != "group_std":
            raise ValueError(
                f"advantage {self.advantage}: rewards of different tasks have different scales, which only group_std "
                "takes out; leave it"
            )
        return self


def task_of(group: Group) -> Task:
    """The task of a row: its column `task`, verifiable without one. Raises DataError for any other value."""
    found = group.fields.get("task")
    for task in TASKS:
        if found in (task, None):
            return task
    raise DataError(f"row {group.id!r}: its task is {found!r}, expected {', '.join(TASKS)}")


@register.algorithm("urpo")
class URPO(GRPO):
    """grpo over problems with a rule, comparisons of given answers, and open prompts that the policy scores itself."""

    needs = replace(GRPO.needs, vector=False)
    config_type = URPOConfig
    config: URPOConfig

    def __init__(self, config: URPOConfig) -> None:
        super().__init__(config)
        self._accuracy, self._ramp = CHANCE, 0

    def prepare(self, groups: Sequence[Group]) -> None:
        """Check the tasks of all rows.

        Raises:
            DataError: a row has another task.
            RecipeError: open prompts would wait for an accuracy that nothing measures.
        """
        tasks, config = {task_of(group) for group in groups}, self.config
        if "open" not in tasks or not self._lambda("open") or config.min_referee_acc <= CHANCE:
            return
        if "preference" not in tasks or not self._lambda("preference"):
            raise RecipeError(
                "algorithm.min_referee_acc: open prompts wait for a referee that is right in "
                f"{config.min_referee_acc:g} of all pairs, and no preference row can tell; add some, or set it to 0"
            )
        if config.referee not in self._facts.weights:
            raise RecipeError(
                f"algorithm.referee: no reward is called {config.referee!r}, whose accuracy open prompts wait for; "
                f"there are {', '.join(self._facts.weights)}. Name the one that scores preference rows"
            )

    def _lambda(self, task: Task) -> float:
        return self.config.task_weights.get(task, 1.0)

    def weight(self, task: Task) -> float:
        """What advantages of a task are multiplied by at present."""
        share, steps = 1.0, self.config.ramp_steps
        if task == "open":
            share = (min(1.0, self._ramp / steps) if steps else 1.0) if self._is_ready else 0.0
        return share * self._lambda(task)

    @property
    def _is_ready(self) -> bool:
        """Whether the referee has been right often enough, now or before."""
        return self._ramp > 0 or self._accuracy >= self.config.min_referee_acc

    def admits(self, group: Group) -> bool:
        """Whether its task counts at present."""
        return self.weight(task_of(group)) > 0

    def build(self, groups: list[Group]) -> list[Unit]:
        """A unit is one completion, with the number of its task."""
        return answer_units(groups, self._objectives, _task_number)

    def annotate(self, batch: Batch, world: World) -> Batch:
        """Advantages times the weight of their task, and what the referee is worth so far."""
        batch = super().annotate(batch, world)
        weights = batch["advantage"].new_tensor([self.weight(task) for task in TASKS])[batch["task"].long()]
        return batch.with_columns(
            {
                "advantage": batch["advantage"] * weights[:, None],
                "task_weight": weights,
                "referee_accuracy": weights.new_full(weights.shape, self._accuracy),
            }
        )

    def loss(self, out: Forward, batch: Batch) -> tuple[Terms, Metrics]:
        """That of grpo."""
        terms, metrics = super().loss(out, batch)
        lengths = batch["mask"].sum(-1).float()
        metrics["referee/running_accuracy"] = Metric.mean(batch["referee_accuracy"], batch["row"])
        for number, task in enumerate(TASKS):
            mine = batch["row"] & (batch["task"] == number)
            metrics[f"tasks/{task}/reward"] = Metric.mean(batch["reward"], mine & ~batch["reward"].isnan())
            metrics[f"tasks/{task}/length"] = Metric.mean(lengths, mine)
            metrics[f"tasks/{task}/weight"] = Metric.mean(batch["task_weight"], mine)
        return terms, metrics

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Move the referee's accuracy with each round that tells one; open prompts count more with every step."""
        found, keep = metrics.get(f"rewards/{self.config.referee}/accuracy"), self.config.referee_average
        if found is not None:
            self._accuracy = keep * self._accuracy + (1 - keep) * found
        if self._is_ready:
            self._ramp += 1

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self._accuracy, "ramp": self._ramp}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._accuracy, self._ramp = float(state["accuracy"]), int(state["ramp"])


def _task_number(group: Group, completion: Completion) -> dict[str, float]:
    del completion
    return {"task": float(TASKS.index(task_of(group)))}
