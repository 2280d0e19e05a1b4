"""What each process of the launches in test_processes.py runs: `worker.py kill FOLDER` or `worker.py train FOLDER`.

Every recipe of the folder is trained in one process group, and what this rank saw is written beside them.
"""

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from alignkit.core.errors import Interrupted
from alignkit.loop.trainer import Trainer
from alignkit.recipe import load_recipe
from alignkit.run import resume, train
from alignkit.testing import Killed, killed_at

RANK = int(os.environ["RANK"])


@contextmanager
def signalled(step: int, number: signal.Signals, ranks: tuple[int, ...]):
    """These ranks send themselves a signal inside the optimizer step."""
    original = Trainer.update

    def update(self, part):
        if self.progress.step + 1 == step and RANK in ranks:
            os.kill(os.getpid(), number)
        original(self, part)

    Trainer.update = update
    try:
        yield
    finally:
        Trainer.update = original


def run(name: str, folder: Path):
    return train(load_recipe(folder / f"{name}.yaml"), quiet=True, report=False)


def write_seen(folder: Path, name: str, **seen):
    world = torch.distributed.get_world_size()
    assert world == 2, f"{world} processes"
    (folder / f"{name}-rank-{RANK}.json").write_text(json.dumps({"world": world, **seen}))


def main(task: str, folder: Path) -> None:
    if task == "kill":
        run("sft", folder)
        write_seen(folder, "sft")  # written before the kill: this launcher did start two processes
        with signalled(6, signal.SIGKILL, (0, 1)):
            run("killed", folder)

    for name in ("full", "lora", "lora-on", "eval", "best"):
        result = run(name, folder)
        write_seen(folder, name, steps=result.steps, metrics=result.metrics)

    result = resume(folder / "killed", quiet=True, report=False)
    write_seen(folder, "resumed", steps=result.steps)

    for name, step in (("lora-killed", 3), ("best-killed", 5)):
        with killed_at(step):
            try:
                run(name, folder)
            except Killed:
                write_seen(folder, name)
        resume(folder / name, quiet=True, report=False)

    with signalled(2, signal.SIGTERM, (1,)):
        try:
            run("stopped", folder)
        except Interrupted as error:
            write_seen(folder, "stopped", message=str(error))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
