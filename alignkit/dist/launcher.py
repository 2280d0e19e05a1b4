"""Which launcher started this process, and what it left in the environment. Torch-free, and nothing is started here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import Literal

from alignkit.core.errors import EnvironmentProblem

Launcher = Literal["python", "alignkit", "accelerate", "torchrun", "deepspeed", "srun", "environment"]
"""`python` = nobody started several; `environment` = RANK and the rest are set, by whom it does not say."""

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What every process of a group must be told."""
MARKS: tuple[tuple[str, Launcher], ...] = (
    ("ALIGNKIT_LAUNCHED", "alignkit"),
    ("ACCELERATE_MIXED_PRECISION", "accelerate"),  # before torchrun, which it is built on
    ("TORCHELASTIC_RUN_ID", "torchrun"),
    ("CROSS_RANK", "deepspeed"),
)
"""A variable that only this launcher sets, the outermost launcher first."""
FIRST_PORT, PORTS = 15000, 15000
"""Range of the ports that jobs meet at: below those the kernel hands out."""
LOST_PEER = re.compile(r"gloo|NCCL|TCPStore|(closed|reset) by peer|Broken pipe", re.IGNORECASE)
"""What a collective says when the process at its other end is gone."""


def adopt_launcher(environ: MutableMapping[str, str] = os.environ) -> Launcher:
    """Name the launcher of this process; of a task of `srun`, also set what the others set. May be called again.

    Raises:
        EnvironmentProblem: some of the variables of a process group are set and others are not.
    """
    if "RANK" not in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _adopt_step(environ)
    # An address by itself is harmless: people export it for all their jobs.
    missing = [name for name in RENDEZVOUS if name not in environ]
    if missing and {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & environ.keys():
        there = ", ".join(f"{name}={environ[name]}" for name in RENDEZVOUS if name in environ)
        raise EnvironmentProblem(
            f"the environment describes half a process group: {there}, but no {', '.join(missing)}. torchrun, "
            "accelerate launch, deepspeed and srun set all of them; to run in one process, unset those that are there."
        )
    marked = next((name for mark, name in MARKS if mark in environ), None)
    if marked is not None or missing:
        return marked or "python"
    return "srun" if environ.get("SLURM_PROCID") == environ["RANK"] else "environment"


def launched_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank the launcher gave this process, before any process group exists."""
    return int(environ.get("RANK", "0"))


def launched_size(environ: Mapping[str, str] = os.environ) -> int:
    """Processes the launcher started."""
    return int(environ.get("WORLD_SIZE", "1"))


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return type(error).__name__.startswith("Dist") or LOST_PEER.search(str(error)) is not None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `a[07-09,12],b1` gives `a07`."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if entry is None:
        raise EnvironmentProblem(
            f"Slurm's node list {nodes!r} names no host; set MASTER_ADDR to that of the first task"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", entry[0])


def tasks_of_node(tasks: str, node: int) -> int:
    """Tasks on a node, by Slurm's way of counting: `4(x2),3` gives 4, 4, 3."""
    counts: list[int] = []
    for entry in tasks.split(","):
        count, _, times = entry.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[node]


def _adopt_step(environ: MutableMapping[str, str]) -> None:
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"]
    devices = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # Slurm may show each task a device of its own, which is then its first and only one.
    environ["LOCAL_RANK"] = "0" if len(devices) == 1 and devices[0] else environ["SLURM_LOCALID"]
    environ["LOCAL_WORLD_SIZE"] = str(tasks_of_node(environ["SLURM_STEP_TASKS_PER_NODE"], int(environ["SLURM_NODEID"])))
    environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    environ.setdefault(
        "MASTER_PORT", str(FIRST_PORT + (job * 32 + step) % PORTS)
    )  # steps of a job may run side by side
