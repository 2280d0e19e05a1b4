"""What each process of the launches in test_backends.py runs: `backends_worker.py FOLDER BACKEND`.

Every recipe of FOLDER/recipes is trained under the backend, into FOLDER/BACKEND; runs whose names say so are killed and
resumed, left killed, or resumed from what one process left. What this rank saw is written beside them.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.dist import fsdp, zero
from alignkit.dist.engine import DistEngine
from alignkit.loop.trainer import Trainer
from alignkit.recipe import load_recipe
from alignkit.run import train
from alignkit.testing import Killed, killed_at

RANK = int(os.environ.get("RANK", "0"))
KILLED_AT = 3


def told(engine: DistEngine, module: torch.nn.Module) -> dict:
    """What this process runs with, and how much of the model and of its optimizer state it holds between steps."""
    backend = engine.backend
    local = 0
    for p in module.parameters():
        tensor = getattr(p, "ds_tensor", p)
        local += (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()
    return {
        "world": engine.world.size,
        "backend": backend.name,
        "group": torch.distributed.get_world_size(),
        "state": sum(slot.length for slot in backend.kept),
        "weights": local,
    }


@contextmanager
def alone_on_the_mesh():
    """FSDP2 over groups of one process each, which exchange nothing."""
    mesh = fsdp.init_device_mesh
    fsdp.init_device_mesh = lambda kind, shape: mesh(kind, (*shape, 1), mesh_dim_names=("apart", "together"))[
        "together"
    ]
    try:
        yield
    finally:
        fsdp.init_device_mesh = mesh


@contextmanager
def another_stage():
    """DeepSpeed told to do less than was asked for."""
    config = zero.Zero._config
    zero.Zero._config = lambda self, norm: {**config(self, norm), "zero_optimization": {"stage": 1}}
    try:
        yield
    finally:
        zero.Zero._config = config


UNSHARDED = {"fsdp2": alone_on_the_mesh, "zero2": another_stage}


@record  # the launcher shows what went wrong here
def main(folder: Path, backend: str) -> None:
    seen: list[dict] = []
    prepare = DistEngine.prepare

    def watched(self, module, build, max_grad_norm):
        weights = [p.numel() for p in module.parameters()]
        trained = [p.numel() for p in module.parameters() if p.requires_grad]
        done = prepare(self, module, build, max_grad_norm)
        seen.append({**told(self, module), "all_weights": sum(weights), "all_state": sum(trained)})
        assert self.world.size == torch.distributed.get_world_size() == 2
        assert self.backend.name == backend, f"{self.backend.name} runs in place of {backend}"
        return done

    DistEngine.prepare = watched

    def run(name: str, source: Path, *, resume: bool = False):
        recipe = load_recipe(source)
        dist = recipe.dist.model_copy(update={"backend": backend, "world_size": 2})
        update = {"output_dir": str(folder / backend / name), "dist": dist}
        return train(recipe.model_copy(update=update), resume=resume, quiet=True, report=False)

    for source in sorted((folder / "recipes").glob("*.yaml")):
        if backend != "ddp" or source.stem.startswith("dpo"):  # all others under DDP: tests/contract
            run(source.stem, source)
    for source in sorted((folder / "killed").glob("*.yaml")):
        for name in (source.stem, f"{source.stem}-left"):
            with killed_at(KILLED_AT):
                try:
                    run(name, source)
                except Killed:
                    pass
                else:
                    raise AssertionError("nothing was killed")
        run(source.stem, source, resume=True)
        run(f"{source.stem}-whole", source)
        run(f"{source.stem}-grown", source, resume=True)  # one process left it, see `grown` in test_backends.py
    run("back", folder / "back.yaml")
    some = next((folder / "killed").glob("*.yaml"))
    seen[-1]["broken"] = broken(run, some)
    if backend == "ddp":
        seen[-1]["drifted"] = drifted(run, some)
    if backend in UNSHARDED:
        with UNSHARDED[backend]():
            try:
                run("unsharded", some)
            except EnvironmentProblem as error:
                seen[-1]["unsharded"] = str(error)
    (folder / f"{backend}-rank-{RANK}.json").write_text(json.dumps(seen))


def broken(run, source: Path) -> str:
    """What is said of a gradient that is not finite, in the third step."""
    update, backward = Trainer.update, DistEngine.backward
    step = 0

    def counted(self, part):
        nonlocal step
        step = self.progress.step + 1
        update(self, part)

    Trainer.update = counted
    DistEngine.backward = lambda self, loss: backward(self, loss * float("nan") if step == 3 else loss)
    try:
        run("broken", source)
    except RunFailed as error:
        return str(error)
    finally:
        Trainer.update, DistEngine.backward = update, backward
    return "nothing"


def drifted(run, source: Path) -> str:
    """What is said when one rank's weights are no longer the other's at a checkpoint."""
    update = Trainer.update

    def wrong(self, part):
        update(self, part)
        if RANK == 1 and self.progress.step == 1:
            with torch.no_grad():
                next(iter(self.policy.parameters())).add_(1e-6)

    Trainer.update = wrong
    try:
        run("drifted", source)
    except RunFailed as error:
        return str(error)
    finally:
        Trainer.update = update
    return "nothing"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
