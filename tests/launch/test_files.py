"""The files that start runs elsewhere: read by the tools that know their kind, and by those who will be given them."""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from accelerate.commands import launch as launching
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

import alignkit
from alignkit.dist.world import launched_backend
from tests.launch.conftest import LAUNCH, ROOT

TOOLS = Path(sys.executable).parent
SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch"), ROOT / ".ci" / "run"])
DOCKERFILES = sorted(ROOT.glob("docker/Dockerfile.*"))
MANIFESTS = sorted(LAUNCH.glob("kubernetes/*.yaml"))
CONFIGS = sorted(LAUNCH.glob("accelerate/*.yaml"))


def run(*command: object, seconds: float = 60) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def by_name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_shell_scripts_pass_shellcheck(path: Path) -> None:
    run(TOOLS / "shellcheck", path)


@pytest.mark.parametrize("name", ["elastic.sh", "slurm.sbatch"])
def test_a_script_without_a_recipe_says_how_it_is_used(name: str) -> None:
    done = subprocess.run(["bash", LAUNCH / name], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"scripts/launch/{name} RECIPE [a.b=value" in done.stdout
    assert "#" not in done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=by_name)
def test_dockerfiles_pass_hadolint(path: Path) -> None:
    run(TOOLS / "hadolint", path)
    steps = path.read_text().splitlines()
    assert re.fullmatch(r"ARG BASE=\S+:\d+\.\d+\.\d+-\S+", next(line for line in steps if line.startswith("ARG")))
    assert "USER 10001:10001" in steps[steps.index('ENTRYPOINT ["alignkit"]') - 2 :]


def test_the_compose_file_fits_its_schema() -> None:
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml")


@pytest.mark.parametrize("path", MANIFESTS, ids=by_name)
def test_manifests_fit_the_schema_of_kubernetes(path: Path) -> None:
    for resource in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(resource, "1.37", strict=True)
        broken = {**resource, "spec": {**resource["spec"], "replica": 1}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, "1.37", strict=True)


def test_a_job_starts_a_torchrun_for_each_of_its_pods() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "train.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (trainer,) = pod["containers"]
    (command,) = trainer["args"]
    asked = dict(re.findall(r"--([a-z-]+)=(\S+)", command))
    assert int(asked["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(asked["nproc-per-node"]) == trainer["resources"]["limits"]["nvidia.com/gpu"]
    assert asked["rdzv-endpoint"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}:29400"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(asked["shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_a_server_is_started_as_runs_need_it(where: str) -> None:
    if where == "compose":
        server = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["server"]
        flags, environment = server["command"], server["environment"]
    else:
        deployment = list(yaml.safe_load_all((LAUNCH / "kubernetes" / "vllm.yaml").read_text()))[1]
        (server,) = deployment["spec"]["template"]["spec"]["containers"]
        flags, environment = server["args"], {entry["name"]: entry["value"] for entry in server["env"]}
    assert {"--logprobs-mode=processed_logprobs", "--generation-config=vllm"} <= set(flags)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize("path", CONFIGS, ids=by_name)
def test_accelerate_configs_ask_for_the_backend_they_are_named_for(path: Path, monkeypatch) -> None:
    started = []
    for way in ("deepspeed", "multi_gpu", "simple"):
        monkeypatch.setattr(launching, f"{way}_launcher", lambda arguments, way=way: started.append((way, arguments)))
    launching.launch_command(launching.launch_command_parser().parse_args(["--config_file", str(path), "alignkit"]))
    ((way, arguments),) = started
    prepare = {"deepspeed": prepare_deepspeed_cmd_env, "simple": prepare_simple_launcher_cmd_env}
    environment = prepare[way](arguments)[1] if way in prepare else prepare_multi_gpu_env(arguments)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    expected = {"single": None, "ddp": None, "cpu": None}
    assert launched_backend() == expected.get(path.stem, path.stem)
    assert arguments.num_processes == {"single": 1, "cpu": 2}.get(path.stem, 8)
    assert arguments.use_cpu == (path.stem == "cpu")
    assert way == {"single": "simple"}.get(path.stem, "deepspeed" if "zero" in path.stem else "multi_gpu")


SHELL = ("bash", "dash", "debianutils", "coreutils", "passwd", "python3-venv")
"""Debian packages that the build of an image makes use of."""


@pytest.fixture
def base(debian, tmp_path: Path) -> Iterator[list[str]]:
    """`buildah` with an image `base`, made of this machine's own packages; what is to be installed is at hand in it."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the packages of this environment are not for the Python of Debian 12, which is 3.11")
    debian("buildah", "python3-venv")
    omit = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    needed = run("apt-cache", "depends", "--recurse", "--installed", *omit, *SHELL).splitlines()
    owned = run("dpkg", "-L", *sorted({line for line in needed if line[:1].isalnum()})).splitlines()
    files = {str(Path(path).parent.resolve() / Path(path).name) for path in owned if path.startswith("/")}
    links = {"/bin", "/sbin", "/lib", "/lib64", "/usr/bin/sh"}  # of no package, or moved by one
    with tarfile.open(tmp_path / "base.tar", "w") as archive:
        for path in sorted({*files, *links, "/etc/passwd", "/etc/group", "/tmp"}):
            if os.path.lexists(path):
                archive.add(path, recursive=False)
    run(TOOLS / "pip", "download", "--quiet", "--dest", tmp_path / "wheels", "hatchling>=1.27", seconds=120)
    (tmp_path / "Containerfile").write_text(
        "FROM scratch\nADD base.tar /\nCOPY wheels /wheels\n"
        "ENV PYTHONPATH=/environment PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels\n"
    )
    buildah = ["buildah", "--storage-driver=vfs", f"--root={tmp_path}/storage", f"--runroot={tmp_path}/run"]
    run(*buildah, "build", "--quiet", "--isolation=chroot", "--tag=base", tmp_path, seconds=120)
    yield buildah
    subprocess.run([*buildah, "rm", "--all"], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.xdist_group("launch")
def test_the_image_is_built_and_runs_as_nobody_special(base: list[str]) -> None:
    installed = f"--volume={Path(yaml.__file__).parents[1]}:/environment:ro"
    build = ("build", "--quiet", "--isolation=chroot", "--build-arg=BASE=base", installed, "--tag=alignkit")
    run(*base, *build, "--file=docker/Dockerfile.cpu", ".", seconds=300)
    container = run(*base, "from", "alignkit").strip()
    program = "id -u; pwd; touch written; alignkit --version; alignkit recipes list | wc -l; ls /usr/src/alignkit"
    said = run(*base, "run", "--isolation=chroot", installed, container, "--", "sh", "-c", program).split("\n")
    assert said[:3] == ["10001", "/work", f"alignkit {alignkit.__version__}"]
    assert int(said[3]) > 10
    assert said[4:-1] == ["LICENSE", "README.md", "alignkit", "constraints.txt", "pyproject.toml", "recipes"]
    told = run(*base, "inspect", "--format={{.OCIv1.Config.User}} {{.OCIv1.Config.Entrypoint}}", "alignkit")
    assert told.strip() == "10001:10001 [alignkit]"
