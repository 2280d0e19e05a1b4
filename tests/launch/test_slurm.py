"""A Slurm of two nodes, both of them this machine: slurm.sbatch runs on it, is told to stop, and goes on."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignkit.loop.checkpoint import find_fault
from tests.launch.conftest import LAUNCH, SAVE, STEPS, TOLD, Job, until

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("launch")]

CONFIG = """\
ClusterName=alignkit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17011 CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17012 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=30 State=UP
"""


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def slurm(debian, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    debian("slurmctld", "slurmd", "slurm-client", "munge")
    tmp_path = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-n1", "spool-n2"):
        (tmp_path / name).mkdir()
    config = tmp_path / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname().partition(".")[0], folder=tmp_path))
    # A munge of its own: one that a machine has may be of its cluster.
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    names = ("socket", "pid", "log", "seed")
    flags = [f"--{name}-file={tmp_path}/munge.{name}" for name in names[1:]]
    flags += [f"--key-file={key}", f"--socket={tmp_path}/munge.socket", "--force"]
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(config))
    try:
        output("munged", *flags)
        output("slurmctld", "-f", config)
        for node in ("n1", "n2"):
            output("slurmd", "-f", config, "-N", node)
        until(lambda: output("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], "two idle nodes", 60)
        yield
    finally:
        patch.undo()
        for pid in tmp_path.glob("*.pid"):
            subprocess.run(["kill", pid.read_text().strip()], check=False)


def test_a_job_of_two_nodes_stops_when_told_and_goes_on(job: Job, slurm: None, monkeypatch) -> None:
    monkeypatch.setenv("PROCESSES", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # n1 is a name for Slurm alone
    log, run = job["slurm.log"], job["slurm"]
    number = output(
        *(
            "sbatch",
            "--parsable",
            "--nodes=2",
            f"--output={log}",
            LAUNCH / "slurm.sbatch",
            job.recipe,
            f"output_dir={run}",
        )
    ).strip()

    def state() -> str:
        return output("squeue", "-h", "-j", number, "-t", "all", "-o", "%T").strip()

    until(lambda: job.reached("slurm"), "the first checkpoint")
    output("scancel", "--batch", "--signal=USR1", number)  # what --signal sends before the time is up
    until(lambda: state() == "PENDING", "the job back in the queue")
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))
    assert SAVE <= steps[-1] < STEPS
    assert find_fault(run / f"checkpoint-{steps[-1]}") is None
    said = log.read_text()
    assert f"stopped by SIGUSR1 after step {steps[-1]}" in said

    until(lambda: state() == "COMPLETED", "the end of the job")
    again = log.read_text()[len(said) :]
    assert f"continuing from {run}/checkpoint-{steps[-1]}" in again
    assert "on 2 processes" in again
    job.assert_whole("slurm")


def test_tasks_of_srun_find_their_places(slurm: None, tmp_path: Path) -> None:
    output("srun", "--nodes=2", "--ntasks=2", sys.executable, "-c", TOLD, tmp_path)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [entry.pop("RANK") for entry in told] == ["0", "1"]
    port = told[0]["MASTER_PORT"]
    place = {"launcher": "srun", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": port}
    assert told == [place, place]
