"""Faults, each planted in the process it is called in: deaths at a chosen point, broken numbers, signals."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alignkit.loop import checkpoint
from alignkit.loop.spool import DiskSpool
from alignkit.loop.trainer import Trainer
from alignkit.track.sinks import JsonlSink


def die(_: object = None) -> None:
    """As by `kill -9` or a power cut: no handler, no `finally`, no buffer flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(step: int) -> None:
    """Die between the backward pass of this step and the move of the weights."""

    def before_moving(trainer: Trainer) -> None:
        move = trainer.dist.step

        def moved() -> None:
            if trainer.progress.step + 1 == step:
                die()
            move()

        trainer.dist.step = moved  # type: ignore[method-assign]

    _at_start(before_moving)


def kill_in_checkpoint(step: int) -> None:
    """Die when everything of this step's checkpoint is written and nothing is renamed yet."""
    seal = checkpoint._seal

    def dying(folder: Any) -> None:
        seal(folder)
        if folder.name.endswith(f"-{step}"):
            die()

    checkpoint._seal = dying


def kill_in_model(step: int) -> None:
    """Die half-way through a checkpoint: the state is written, the weights are cut short."""

    def before_writing(trainer: Trainer) -> None:
        write = trainer.write_model

        def cut_short(folder: Any) -> None:
            write(folder)
            if folder.name.endswith(f"checkpoint-{step}"):
                weights = next(folder.glob("*.safetensors"))
                os.truncate(weights, weights.stat().st_size // 2)
                die()

        trainer.write_model = cut_short

    _at_start(before_writing)


def kill_in_record(step: int) -> None:
    """Die with half of a line of metrics.jsonl written."""
    log = JsonlSink.log

    def half(self: JsonlSink, record: Any) -> None:
        if self.path.name == "metrics.jsonl" and record["step"] >= step:
            with self.path.open("ab") as file:
                file.write(b'{"step": 3, "lo')
            die()
        log(self, record)

    JsonlSink.log = half  # type: ignore[method-assign]


def kill_in_phase(phase_and_step: tuple[str, int]) -> None:
    """Die when this phase of the round that begins at this step is done, with half of it on disk."""
    phase, step = phase_and_step
    write = DiskSpool._write

    def half(handle: int) -> None:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        die()

    def dying(self: DiskSpool, path: Path, *what: Any) -> None:
        if path.name.startswith(f"step-{step}-0-{phase}-"):
            os.fsync = half
        write(self, path, *what)

    DiskSpool._write = dying  # type: ignore[method-assign]


def nan_in_weights(step: int) -> None:
    """One weight turns to nan before this step, as faulty memory would have it."""
    _before_step(step, lambda trainer: _spoil(trainer, "up_proj.weight"))


def nan_in_adapter(step: int) -> None:
    """The same in a low-rank factor."""
    _before_step(step, lambda trainer: _spoil(trainer, "up_proj.lora_B.default.weight"))


def signal_in_step(step_and_numbers: tuple[int, list[int]]) -> None:
    """The process receives these signals, one after the other, while it computes this step."""
    step, numbers = step_and_numbers

    def send(trainer: Trainer) -> None:
        del trainer
        for number in numbers:
            os.kill(os.getpid(), number)

    _before_step(step, send)


def fill(folder: Path, spare_kib: int) -> None:
    """Put a file into the folder that leaves so much of its disk free."""
    rest = shutil.disk_usage(folder).free - 1024 * spare_kib
    (folder / "ballast").write_bytes(bytes(max(0, rest)))


def fill_disk(step: int) -> None:
    """Something else fills the disk of the run before this step."""
    _before_step(step, lambda trainer: fill(trainer.folder, 0))


def fill_disk_before_export(spare_kib: int) -> None:
    """The disk fills up between the last checkpoint and the finished model, but for a little."""
    run = Trainer.run

    def filled(self: Trainer) -> None:
        run(self)
        fill(self.folder, spare_kib)

    Trainer.run = filled  # type: ignore[method-assign]


def _spoil(trainer: Trainer, name: str) -> None:
    weights = dict(trainer.policy.bare.named_parameters())
    (found,) = [key for key in weights if "layers.1.mlp" in key and key.endswith(name)]
    with torch.no_grad():
        weights[found][3, 2] = float("nan")


def _at_start(act: Callable[[Trainer], None]) -> None:
    run = Trainer.run

    def acted(self: Trainer) -> None:
        act(self)
        run(self)

    Trainer.run = acted  # type: ignore[method-assign]


def _before_step(step: int, act: Callable[[Trainer], None]) -> None:
    update = Trainer.update

    def acted(self: Trainer, part: list[int]) -> None:
        if self.progress.step + 1 == step:
            act(self)
        update(self, part)

    Trainer.update = acted  # type: ignore[method-assign]
