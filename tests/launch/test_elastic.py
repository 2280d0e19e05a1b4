"""Two machines under elastic.sh: namespaces of the network, each with an address of its own and a link between them."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH, Job, until

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("launch")]

MACHINES, LINK = ("alignkit1", "alignkit2"), "wire"
ADDRESSES = ("10.77.41.1", "10.77.41.2")


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        pytest.skip(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def machines(debian) -> Iterator[None]:
    debian("iproute2")
    remove = [("netns", "del", name) for name in MACHINES]
    for command in remove:
        ip(*command, check=False)
    try:
        for name in MACHINES:
            ip("netns", "add", name)
        ip("-n", MACHINES[0], "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", MACHINES[1])
        for name, address in zip(MACHINES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", LINK, "up")
        yield
    finally:
        for command in remove:
            ip(*command, check=False)


def worker_of(machine: str) -> int | None:
    """The process of the run on this machine, without the launcher that started it."""
    for pid in ip("netns", "pids", machine).split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it is just ending
            environment = Path("/proc", pid, "environ").read_bytes().split(b"\0")
            if any(line.startswith(b"RANK=") for line in environment):
                return int(pid)
    return None


def start(job: Job, number: int, run: str) -> subprocess.Popen[bytes]:
    environment = {
        "MASTER_ADDR": ADDRESSES[0],
        "PROCESSES": "1",
        "GLOO_SOCKET_IFNAME": LINK,
        "PET_LOCAL_ADDR": ADDRESSES[number],
        "PET_RDZV_CONF": f"is_host={int(number == 0)}",  # torchrun does not find the address among its machine's own
    }
    command = ["ip", "netns", "exec", MACHINES[number], LAUNCH / "elastic.sh", job.recipe, f"output_dir={job[run]}"]
    with job[f"{run}-{number}.log"].open("wb") as said:
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=said, stderr=subprocess.STDOUT)


def test_both_machines_start_again_when_a_process_is_killed(job: Job, machines: None) -> None:
    launchers = [start(job, number, "elastic") for number in (0, 1)]
    try:
        until(lambda: job.reached("elastic"), "the first checkpoint", alive=launchers)
        before = [worker_of(machine) for machine in MACHINES]
        assert None not in before
        os.kill(before[1], signal.SIGKILL)
        until(
            lambda: all(worker_of(machine) not in (None, old) for machine, old in zip(MACHINES, before, strict=True)),
            "another process on both machines",
            alive=launchers,
        )
        assert [launcher.wait(120) for launcher in launchers] == [0, 0]
    finally:
        for launcher in launchers:
            launcher.terminate()  # not killed: it ends the processes that it started
            launcher.wait(60)
    said = [job[f"elastic-{number}.log"].read_text() for number in (0, 1)]
    assert "exitcode: -9" in said[1]
    assert any(f"continuing from {job['elastic']}/checkpoint-" in text for text in said)
    assert "".join(said).count("on 2 processes") >= 2  # before, and after
    job.assert_whole("elastic")
