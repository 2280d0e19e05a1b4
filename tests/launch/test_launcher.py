"""What each launcher leaves in the environment, and what is made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignkit.cli import app
from alignkit.core.errors import EnvironmentProblem, RecipeError
from alignkit.dist.launcher import adopt_launcher, first_host, is_lost_peer, launched_size, tasks_of_node
from alignkit.launch import processes_to_start
from alignkit.recipe import Recipe, load_recipe
from tests.launch.conftest import LAUNCH, TOLD

GROUP = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_STEP_NODELIST": "gpu[08-09,12]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
"""A task of `srun` on the last of three nodes."""


@pytest.mark.parametrize(
    ("marks", "launcher"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate"),
        ({"TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, "torchrun"),
        ({"CROSS_RANK": "0"}, "deepspeed"),
        ({"ALIGNKIT_LAUNCHED": "1"}, "alignkit"),
        ({}, "environment"),
    ],
)
def test_a_launcher_is_known_by_its_mark(marks: dict[str, str], launcher: str) -> None:
    environ = {**GROUP, **marks}
    assert adopt_launcher(environ) == launcher
    assert environ == {**GROUP, **marks}  # what a launcher set is left alone
    assert launched_size(environ) == 4


def test_one_process_was_launched_by_nobody() -> None:
    environ = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert adopt_launcher({}) == adopt_launcher(environ) == "python"
    assert launched_size(environ) == 1


def test_a_task_of_srun_is_told_its_place() -> None:
    environ = dict(STEP)
    assert adopt_launcher(environ) == "srun"
    found = {name: value for name, value in environ.items() if name not in STEP}
    assert found == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu08",
        "MASTER_PORT": str(15000 + (70001 * 32 + 2) % 15000),
    }
    assert adopt_launcher(environ) == "srun"  # asked again
    assert launched_size(environ) == 7


@pytest.mark.parametrize(("visible", "local"), [("3", "0"), ("0,1,2,3", "1"), ("", "1")])
def test_a_device_of_its_own_is_the_first(visible: str, local: str) -> None:
    environ = {**STEP, "CUDA_VISIBLE_DEVICES": visible}
    adopt_launcher(environ)
    assert environ["LOCAL_RANK"] == local


def test_an_address_that_was_given_is_kept() -> None:
    environ = {**STEP, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "7777"}
    adopt_launcher(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.7", "7777")


def test_a_batch_script_is_not_a_task_of_many() -> None:
    """There Slurm says how many tasks the job may have, but nobody started them."""
    environ = {"SLURM_JOB_ID": "70001", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert adopt_launcher(environ) == "python"
    assert "RANK" not in environ


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_group_is_refused(missing: str) -> None:
    environ = {name: value for name, value in GROUP.items() if name != missing}
    with pytest.raises(EnvironmentProblem, match=rf"half a process group: .* but no {missing}\."):
        adopt_launcher(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[08-09,12]", "gpu08"),
        ("login,gpu[1-2]", "login"),
        ("rack[2-3]-node[007,009],x1", "rack2-node007"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_node_list_without_a_host_is_refused() -> None:
    with pytest.raises(EnvironmentProblem, match="names no host"):
        first_host("")


@pytest.mark.parametrize(("tasks", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2(x3)", [1, 2, 2, 2])])
def test_tasks_of_each_node(tasks: str, counts: list[int]) -> None:
    assert [tasks_of_node(tasks, node) for node in range(len(counts))] == counts


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:15788: Connection reset by peer", True),
        ("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error", True),
        ("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ],
)
def test_a_lost_peer_is_told_from_other_faults(said: str, lost: bool) -> None:
    assert is_lost_peer(RuntimeError(said)) is lost


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Recipe:
    for name in (*GROUP, *STEP, "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return load_recipe(
        {
            "output_dir": str(tmp_path),
            "model": {"name_or_path": "owner/model"},
            "data": [{"path": "owner/pairs"}],
            "algorithm": {"name": "dpo"},
        }
    )


def of_size(recipe: Recipe, size: int) -> Recipe:
    return recipe.model_copy(update={"dist": recipe.dist.model_copy(update={"world_size": size})})


@pytest.mark.parametrize(
    ("devices", "asked", "wanted", "count"),
    [
        (0, None, None, 1),
        (1, None, None, 1),
        (8, None, None, 8),
        (8, 2, None, 2),
        (8, 1, None, 1),
        (8, None, 4, 4),
        (8, 4, 4, 4),
        (0, 2, None, 2),
    ],
)
def test_as_many_processes_as_asked_for_or_devices(recipe, monkeypatch, devices, asked, wanted, count) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    assert processes_to_start(of_size(recipe, wanted) if wanted else recipe, asked) == count


def test_a_resumed_run_has_as_many_as_before(recipe, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert processes_to_start(recipe, None, resume=True) == 8
    (tmp_path / "run.lock").write_text('{"world_size": 2}')
    assert processes_to_start(recipe, None, resume=True) == 2
    assert processes_to_start(recipe, 4, resume=True) == 4
    assert processes_to_start(recipe, None) == 8


def test_more_processes_than_devices_are_refused(recipe, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(EnvironmentProblem, match="16 processes are asked for and this machine has 2 device"):
        processes_to_start(of_size(recipe, 16), None)


def test_two_numbers_that_differ_are_refused(recipe) -> None:
    with pytest.raises(RecipeError, match=r"--processes 2, but dist\.world_size is 4"):
        processes_to_start(of_size(recipe, 4), 2)


def test_nothing_is_started_where_a_launcher_did(recipe, monkeypatch) -> None:
    for name, value in {**GROUP, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert processes_to_start(recipe, None) == processes_to_start(recipe, 4) == 1
    with pytest.raises(RecipeError, match="--processes 2, but torchrun started 4"):
        processes_to_start(recipe, 2)


def test_the_option_that_deepspeed_adds_is_taken() -> None:
    done = CliRunner().invoke(app, ["--local_rank=1", "algorithms"])
    assert done.exit_code == 0, done.output


@pytest.mark.distributed
@pytest.mark.xdist_group("launch")
@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ("torchrun", ["torchrun", "--standalone", "--nproc-per-node=2"]),
        ("accelerate", ["accelerate", "launch", "--config_file", LAUNCH / "accelerate" / "cpu.yaml"]),
        ("deepspeed", ["deepspeed", "--num_gpus=2"]),
    ],
)
def test_launchers_that_are_here_are_known(launcher: str, command: list[object], tmp_path: Path) -> None:
    found = Path(sys.executable).parent / str(command[0])
    if not found.exists():
        pytest.skip(f"{found} is not installed")
    script = tmp_path / "told.py"
    script.write_text(TOLD)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [found, *command[1:], script, tmp_path], env=environment, capture_output=True, timeout=120, check=True
    )
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(entry["launcher"], entry["RANK"], entry["WORLD_SIZE"]) for entry in told] == [
        (launcher, "0", "2"),
        (launcher, "1", "2"),
    ]
