"""The loop. Read `run` and `update`: there is no other.

A round is: scored completions (`rollouts.py`), units, columns, annotations; then one or more optimizer steps.
Nothing here knows which algorithm runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.core.contracts import Algorithm, Stateful
from alignkit.core.errors import Interrupted, RunFailed
from alignkit.core.rng import key
from alignkit.core.types import Batch, Forward
from alignkit.data.collate import collate
from alignkit.dist.engine import DistEngine
from alignkit.loop.checkpoint import Checkpoints
from alignkit.loop.config import TrainConfig
from alignkit.loop.drift import RoundWatch
from alignkit.loop.evaluate import Evaluator
from alignkit.loop.failure import nonfinite
from alignkit.loop.micros import at_present, micros
from alignkit.loop.reduction import combine, common_metrics, drop_single_term, global_counts
from alignkit.loop.rollouts import Rollouts
from alignkit.loop.round import Progress, Round, blank_like
from alignkit.loop.signals import StopRequest
from alignkit.loop.truths import check_closed_form, check_reference, check_rows, check_sampling
from alignkit.models.policy import CausalPolicy
from alignkit.models.roster import Roster
from alignkit.track.metrics import add, reduce, values
from alignkit.track.tracker import Tracker

LOGGED = frozenset({"entropy", "correct"})
"""Outputs computed only for the log."""


@dataclass
class Trainer:
    """Every part of a run, assembled; `run` trains from wherever the parts stand."""

    config: TrainConfig
    seed: int
    folder: Path
    algorithm: Algorithm[Any]
    policy: CausalPolicy
    scheduler: torch.optim.lr_scheduler.LRScheduler
    dist: DistEngine
    rollouts: Rollouts
    roster: Roster
    progress: Progress
    round: Round
    track: Tracker
    checkpoints: Checkpoints
    evaluator: Evaluator
    watch: RoundWatch
    write_model: Callable[[Path], None]
    starts_at_reference: bool
    max_logp_difference: float | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    def run(self) -> None:
        """Train to the end, or until a signal asks to stop.

        Raises:
            Interrupted: stopped by a signal; a checkpoint of the last step is on disk.
            RunFailed: a loss or gradient is not finite, or a step-0 truth does not hold.
        """
        self.policy.module.train()
        with self.stop:
            if self.progress.step == 0:
                self.evaluate()
            for index in self.progress.rounds():
                if self.round.index != index:
                    asked = self.roster.asks_policy(self.algorithm.needs) or self.progress.step == 0
                    with self.dist.whole(asked, write=self.watch.rolls_back):
                        self.begin(index)
                while (part := self.round.part()) is not None and self.progress.step < self.progress.total_steps:
                    self.update(part)
                    self.due()
            if self.progress.step == 0 < self.progress.total_steps:
                raise RunFailed("no row gave anything to train on: no group was left, or none gave a unit")
            self.track.flush()
            self.evaluate()
            self.save()

    def begin(self, index: int) -> None:
        """Take the next round, unless nobody got anything: completions, scores, units, columns, annotations."""
        algorithm, needs, world = self.algorithm, self.algorithm.needs, self.dist.world
        groups, news = self.rollouts.collect(self.progress.version)
        units = self.watch.admit(index, groups, algorithm.build(groups), news)
        self.roster.refresh(self.progress.version)
        if not any(world.gather(len(units))):
            return
        batch = self.roster.fill(collate(units, blank_like(units, world)), needs.columns, needs.slots)
        self.round.begin(index, algorithm.annotate(batch, world), units, self.rollouts.places, world, news)
        if self.progress.step == 0 and self.config.step0_checks:
            check_rows(self.policy, units, self.dist.dtype)

    def update(self, part: list[int]) -> None:
        """One optimizer step on these units of the round, whatever the micro-batches and ranks."""
        started, step, needs = time.perf_counter(), self.progress.step + 1, self.algorithm.needs
        assert self.round.batch is not None
        with self.dist.whole(bool(needs.fresh)):
            batch, index = at_present(self.round.batch, part, self.algorithm, self.roster, self.dist.world)
        self.dist.seed(key(self.seed, "step", step, self.dist.world.rank))  # adapter dropout draws from it
        outputs = needs.outputs | (LOGGED if self.track.wants(step) else frozenset())
        counts = global_counts(batch, index, self.dist.world)
        parts = micros(batch, index, self.policy, self.config, self.dist.world)
        totals, fresh = self.round.news(), self.round.is_fresh

        def objective(out: Forward, some: Batch) -> Tensor:
            if step == 1 and self.config.step0_checks and self.starts_at_reference:
                check_reference(out.logps, some, self.dist.dtype)
            terms, metrics = self.algorithm.loss(out, some)
            loss, logged = combine(terms, some, counts)
            add(totals, {**logged, **metrics, **common_metrics(out, some, fresh=fresh)})
            return loss

        for i, micro in enumerate(parts):
            with self.dist.whole(bool(needs.late)):
                filled = self.roster.fill(micro, needs.late)
            with self.dist.accumulate(last=i == len(parts) - 1):
                self.dist.backward(self.policy.loss(filled, outputs, objective))
        totals = reduce(totals, self.dist.world)
        found = values(totals)
        grad_norm = float(self.dist.grad_norm(self.policy.parameters(), self.config.max_grad_norm))
        if not all(isfinite(x) for x in (*found.values(), grad_norm)):
            raise nonfinite(self, part, {**found, "grad_norm": grad_norm})
        if step == 1 and self.config.step0_checks and self.starts_at_reference:
            check_closed_form(self.algorithm.at_reference(), found, self.dist.dtype)
        check_sampling(found, self.max_logp_difference)
        facts = {"epoch": self.rollouts.stream.epoch, "learning_rate": float(self.scheduler.get_last_lr()[0])}
        self.dist.step()  # from here to the counters nothing may fail: what a checkpoint holds moves together
        self.scheduler.step()
        self.round.advance()
        tokens = int(found.pop("num_input_tokens"))
        self.progress.step, self.progress.tokens = step, self.progress.tokens + tokens
        self.algorithm.observe(found)
        del totals["num_input_tokens"]
        drop_single_term(totals)
        seconds = time.perf_counter() - started
        facts |= {"grad_norm": grad_norm, "num_tokens": self.progress.tokens}
        self.track.step(step, totals, facts, {"step_time": seconds, "perf/tokens_per_second": tokens / seconds})

    def due(self) -> None:
        """What comes after a step: evaluation, checkpoint, and leaving when asked to."""
        step = self.progress.step
        if self.evaluator.due(step, spent=self.round.part() is None):
            self.evaluate()
        stop = self.stop.agreed(self.dist.world)
        if stop or (self.config.save_steps and step % self.config.save_steps == 0):
            self.save()
        if stop:
            rest = f"after step {step}; continue with `alignkit resume {self.folder}`"
            raise Interrupted(f"stopped by {self.stop.name or 'another rank'} {rest}")

    def evaluate(self) -> None:
        """Measure on held-out data, unless this step was measured already; keep the best, stop when none comes."""
        step, best = self.progress.step, self.evaluator.best
        if self.evaluator.last_step != step:
            if record := self.evaluator.measure(step):
                self.track.log({"step": step, "epoch": self.rollouts.stream.epoch, **record})
            improved = best.judge(step, record)
            if best.exhausted:
                self.progress.stop()
            if improved:
                self.save()

    def parts(self) -> tuple[dict[str, Stateful], dict[str, Stateful]]:
        """All state that cannot be recomputed: what is equal on every rank, and what each rank has its own of."""
        shared: dict[str, Stateful] = {
            "progress": self.progress,
            "lr_scheduler": self.scheduler,
            "stream": self.rollouts.stream,
            "algorithm": self.algorithm,
            "roster": self.roster,
            "track": self.track,
            "evaluator": self.evaluator,
            "watch": self.watch,
        }
        return shared, {"round": self.round, "optimizer": self.dist.optimizer_state}

    def save(self) -> None:
        """Checkpoint this step, unless it is there already; the best one is kept beside the newest."""
        with self.dist.whole(new := self.progress.step not in self.checkpoints.steps()):
            if new:
                self.dist.check_same(self.policy.module)
            self.checkpoints.save(self.progress.step, *self.parts(), self.write_model, self.evaluator.best.step)
