"""What this machine has for a run, what it lacks, and what to do about it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import combinations
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PACKAGE = "alignkit"
GIB = 2**30
EXTRAS = {
    "wandb": "runs logged to Weights & Biases (track.wandb)",
    "tensorboard": "runs logged for TensorBoard (track.tensorboard)",
    "deepspeed": "dist.backend: zero1, zero2 and zero3, with offloading",
    "qlora": "model.quantization: frozen weights in 4 or 8 bits under adapters",
    "rewards": "the rewards math_equal (math-verify) and bleu (sacrebleu)",
    "dev": "what the tests and checks of alignkit itself need",
}
"""What `pip install 'alignkit[NAME]'` adds."""
SCARCE_DISK, SCARCE_SHARED = 10 * GIB, GIB
"""Bytes free below which a disk, and the memory that processes share, are worth a word."""


@dataclass(frozen=True)
class Extra:
    """An extra of the package: what it adds, and which of its packages are not here."""

    name: str
    adds: str
    missing: list[str]


@dataclass(frozen=True)
class Problem:
    """What is not as it should be, and what helps."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Examination:
    """Facts by name. `problems` are what is worth acting on."""

    versions: Mapping[str, str]
    machine: Mapping[str, str]
    devices: list[str]
    links: list[str]
    disks: Mapping[str, str]
    extras: list[Extra]
    problems: list[Problem]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a reader."""
        found = [*_block("versions", self.versions), *_block("machine", self.machine)]
        found += ["devices", *(f"  {line}" for line in self.devices), "links", *(f"  {line}" for line in self.links)]
        found += _block("disk", self.disks)
        found.append("extras")
        for extra in self.extras:
            state = "installed" if not extra.missing else f"pip install 'alignkit[{extra.name}]'"
            found.append(f"  {extra.name:<12} {state:<34} {extra.adds}")
        found.append("problems" if self.problems else "no problems")
        for problem in self.problems:
            found += [f"  {problem.what}", f"    → {problem.remedy}"]
        return found


def examine() -> Examination:
    """Look at this machine. Imports torch; starts no process group and moves nothing to a device."""
    import torch

    cuda = torch.cuda.is_available()
    devices, links = _devices(torch) if cuda else (["no GPU: computes on the CPU"], ["processes talk over gloo"])
    return Examination(
        versions=_versions(torch),
        machine=_machine(),
        devices=devices,
        links=links,
        disks={name: _disk(path) for name, path in _places().items()},
        extras=list(_extras()),
        problems=[*_wrong_versions(), *_machine_problems(cuda), *_disk_problems()],
    )


def _block(title: str, facts: Mapping[str, str]) -> list[str]:
    width = max(map(len, facts), default=0)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in facts.items())]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in requires(PACKAGE) or ()]


def _needed() -> list[Requirement]:
    """What the package needs whatever its extras."""
    return [need for need in _requirements() if need.marker is None or need.marker.evaluate({"extra": ""})]


def _extras() -> Iterator[Extra]:
    for name, adds in EXTRAS.items():
        needs = [n for n in _requirements() if n.marker is not None and n.marker.evaluate({"extra": name})]
        own = [need for need in needs if not need.marker.evaluate({"extra": ""})]  # type: ignore[union-attr]
        yield Extra(name, adds, [need.name for need in own if _installed(need.name) is None])


def _versions(torch: Any) -> dict[str, str]:
    found = {PACKAGE: _installed(PACKAGE) or "not installed", "python": platform.python_version()}
    for name in [*(need.name for need in _needed()), "deepspeed"]:
        found[name] = _installed(name) or "not installed"
    found["CUDA"] = torch.version.cuda or "none: torch was built without it"
    if torch.cuda.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _devices(torch: Any) -> tuple[list[str], list[str]]:
    devices, links = [], []
    count = torch.cuda.device_count()
    for i in range(count):
        facts = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        used = f", {(total - free) / GIB:.1f} in use" if total - free > GIB else ""
        devices.append(f"cuda:{i}  {facts.name}, {total / GIB:.1f} GiB{used}, compute {facts.major}.{facts.minor}")
    for a, b in combinations(range(count), 2):
        direct = torch.cuda.can_device_access_peer(a, b)
        links.append(f"cuda:{a} – cuda:{b}  {'direct' if direct else 'through the memory of the host: slow'}")
    if count > 1 and (topology := _output("nvidia-smi", "topo", "-m")):
        links += topology.splitlines()
    return devices, links or ["one GPU: nothing to link"]


def _output(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def _machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _memory_limit()
    bound = f", {limit / GIB:.1f} allowed to this container" if limit is not None and limit < memory else ""
    allowed, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "system": platform.platform(),
        "cores": f"{cores}{f', {allowed} allowed to this process' if allowed < cores else ''}",
        "memory": f"{memory / GIB:.1f} GiB{bound}",
        "open files": str(files),
        "compiler": shutil.which("c++") or "none",
    }


def _memory_limit() -> int | None:
    """Bytes that a container may use; None without a limit."""
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            return int(text)
    return None


def _places() -> dict[str, Path]:
    """Folders that a run writes into, by what for."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    found = {"here": Path.cwd(), "hub's cache": home}
    if Path("/dev/shm").is_dir():
        found["/dev/shm"] = Path("/dev/shm")
    return found


def _free(path: Path) -> int:
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def _disk(path: Path) -> str:
    return f"{_free(path) / GIB:.1f} GiB free ({path})"


def _wrong_versions() -> Iterator[Problem]:
    for need in _needed():
        found = _installed(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            is_there = f"{need.name} {found} is installed" if found else f"{need.name} is not installed"
            yield Problem(f"{is_there}, and alignkit needs {need.name}{need.specifier}", f"pip install '{need}'")


def _machine_problems(cuda: bool) -> Iterator[Problem]:
    if not cuda and _output("nvidia-smi", "-L"):
        yield Problem(
            "there is an NVIDIA GPU, and torch does not see it",
            "install a build of torch for CUDA (https://pytorch.org/get-started), and look at CUDA_VISIBLE_DEVICES",
        )
    if _installed("deepspeed") and not cuda and not (shutil.which("c++") and shutil.which("ninja", path=_programs())):
        yield Problem(
            "DeepSpeed compiles a part of itself at its first use on a CPU, and a C++ compiler or ninja is missing",
            "apt-get install g++ && pip install ninja, or use dist.backend: fsdp2",
        )
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > cores:
        yield Problem(
            f"OMP_NUM_THREADS is {threads}, and this process may use {cores} core(s): threads wait for one another",
            f"export OMP_NUM_THREADS={cores}, divided by the processes you start on this machine",
        )
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        yield Problem(
            "MASTER_ADDR is set and WORLD_SIZE is not, so that a run takes itself for one of several and is alone",
            "unset MASTER_ADDR, or start with torchrun",
        )
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Problem("HF_HUB_OFFLINE is set: nothing is downloaded", "unset it, or name local folders in recipes")


def _programs() -> str:
    """Where programs are looked for: beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _disk_problems() -> Iterator[Problem]:
    for name, path in _places().items():
        free = _free(path)
        if name == "/dev/shm":
            if free < SCARCE_SHARED:
                yield Problem(
                    f"/dev/shm has {free / GIB:.2f} GiB free; processes of one machine exchange through it",
                    "docker run --shm-size=8g, or in Kubernetes an emptyDir with medium: Memory at /dev/shm",
                )
        elif free < SCARCE_DISK:
            yield Problem(
                f"{path} has {free / GIB:.1f} GiB free; a checkpoint of full training takes 12 bytes a weight",
                "make room, or point output_dir (HF_HOME for the hub's cache) to a larger disk",
            )
