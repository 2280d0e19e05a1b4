"""The house rules that a tool can hold: layers, who names which library, what starts light, the loop on one page."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignkit
from alignkit.core import register

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "alignkit"
FILES = sorted(PACKAGE.rglob("*.py"))

HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate", "wandb", "deepspeed", "matplotlib")
"""Packages that reading a recipe and asking for help must not import."""

NAMED_BY = {
    "trl": ("_compat.py",),
    "accelerate": (),
    "deepspeed": ("dist/",),
    "torch.distributed": ("dist/",),
    "wandb": ("track/",),
    "datasets": ("data/",),
    "peft": ("models/",),
    "transformers": (
        "models/",
        "rollout/plain.py",
        "rewards/scorers.py",
        "quickstart/",
        "testing.py",
    ),  # the last two build tiny models
}
"""Library → the files that may import it."""


def imports(path: Path) -> Iterator[str]:
    """Dotted names a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def built_in_algorithms() -> list[str]:
    """Registered names whose file is part of the package."""
    kind = register.algorithm
    return [name for name in kind.names() if kind.get(name).target.__module__.startswith("alignkit.algorithms.")]


def test_the_loop_fits_a_page_and_names_no_method() -> None:
    text = (PACKAGE / "loop" / "trainer.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    words = set(re.findall(r"[a-z0-9]+", text.lower()))
    assert not words & {part for name in built_in_algorithms() for part in (name, name.replace("_", ""))}


@pytest.mark.parametrize("library", NAMED_BY)
def test_a_library_is_named_where_it_belongs(library: str) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    assert {user for user in users if not user.startswith(NAMED_BY[library])} == set()
    assert users or not NAMED_BY[library]  # a rule about a library nobody uses any more would hold by itself


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [5-9] kept, 0 broken", done.stdout)


@pytest.mark.parametrize(
    "code",
    [
        "import alignkit",
        "import alignkit.recipe, alignkit.algorithms.dpo, alignkit.rewards.rules",
        "import runpy; sys.argv = ['alignkit', '--help']; runpy.run_module('alignkit', run_name='__main__')",
    ],
    ids=["import", "recipe", "help"],
)
def test_the_front_door_is_light(code: str) -> None:
    program = (
        "import atexit, json, sys, time\n"
        f"seen = lambda: [name for name in {HEAVY} if name in sys.modules]\n"
        "atexit.register(lambda: print(json.dumps([time.process_time(), seen()]), file=sys.stderr))\n"
        f"{code}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, "NO_COLOR": "1"}
    )
    seconds, heavy = json.loads(done.stderr.splitlines()[-1])
    assert heavy == []
    assert seconds < 1.0  # of processor time: other work on the machine does not count
    assert "train" in done.stdout or "--help" not in code


def test_every_public_name_is_there() -> None:
    found = {name: getattr(alignkit, name) for name in alignkit.__all__}
    assert {"train", "load_recipe", "register", "Algorithm", "RewardSource"} <= found.keys()
    assert all(value is not None for value in found.values())
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = alignkit.trian


def test_a_run_on_local_files_opens_no_connection(tmp_path: Path) -> None:
    """In a process where every attempt to leave the machine is an error, and nothing says that it is offline."""
    program = """
        import csv, socket, sys
        from pathlib import Path

        attempts = []

        def refuse(*arguments, **_):
            attempts.append(arguments)
            raise OSError("no connection is allowed here")

        for name in ("connect", "connect_ex", "sendto"):
            setattr(socket.socket, name, refuse)
        socket.getaddrinfo = refuse

        from alignkit.algorithms.dpo import DPO
        from alignkit.cli import main
        from alignkit.testing import build_tiny_model, toy_rows

        build_tiny_model(Path("model"))
        with open("rows.csv", "w") as file:  # read by `datasets`, unlike JSON lines
            writer = csv.DictWriter(file, ["id", "prompt", "chosen", "rejected"])
            writer.writeheader()
            writer.writerows(toy_rows(DPO, 4))
        Path("r.yaml").write_text(
            "output_dir: run\\nmodel: {name_or_path: model, lora: {}}\\ndata: [{path: rows.csv}]\\n"
            "algorithm: {name: dpo}\\ntrain: {max_steps: 1, max_length: 64}\\n"
            "eval: {data: [{path: rows.csv}], num_samples: 2, rewards: [{name: word_valence}]}\\n"
        )
        sys.argv = ["alignkit", "-q", "train", "r.yaml"]
        try:
            main()
        finally:
            assert not attempts, attempts
    """
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**environment, "ALIGNKIT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("name", built_in_algorithms())
def test_a_method_is_whole(name: str) -> None:
    """File of its name, document, recipes of its own, own tests."""
    target = register.algorithm.get(name).target
    assert (target.__doc__ or "").strip()
    assert (ROOT / "docs" / "algorithms" / f"{name}.md").read_text(encoding="utf-8").startswith(f"# {name}")
    assert list((ROOT / "recipes" / name).glob("*.yaml"))
    module = target.__module__.rpartition(".")[2]
    assert (ROOT / "tests" / "algorithms" / f"test_{module}.py").is_file()


def test_every_module_says_what_it_is() -> None:
    bare = [path.relative_to(ROOT).as_posix() for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert bare == []
