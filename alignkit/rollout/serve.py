"""A vLLM server for a recipe's model, in a Python of its own. Hides its flags, and that it is several processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from types import FrameType
from urllib.parse import urlsplit

from alignkit.core.errors import EnvironmentProblem
from alignkit.models.config import ModelConfig
from alignkit.models.load import adapter_base
from alignkit.rollout.config import RolloutConfig
from alignkit.rollout.vllm import api_key

GRACE = 30.0
"""Seconds the server may take to end before it is killed."""
LOOK = 0.5
"""Seconds between two looks at whether it is ready."""


def serve(
    model: ModelConfig,
    rollout: RolloutConfig,
    max_length: int,
    *,
    python: str,
    port: int | None,
    flags: Sequence[str],
    ready: Callable[[str], None],
) -> None:
    """Run the server until Ctrl-C or SIGTERM; its log goes to stderr.

    Args:
        model: what it serves, of an adapter the base: the run gives it the weights anyway.
        rollout: under which address and name.
        max_length: tokens of prompt and completion.
        python: of the environment that has vLLM.
        port: instead of the one in `rollout.url`; None = that one.
        flags: more of them, for vLLM.
        ready: told the server's address once it answers.

    Raises:
        EnvironmentProblem: there is no vLLM in that Python, the port is taken, or the server ended by itself.
    """
    address = urlsplit(rollout.url)
    host, number = address.hostname or "127.0.0.1", port or address.port or 80
    url = f"http://{host}:{number}"
    _check_python(python)
    _check_port(host, number)
    path = adapter_base(model.name_or_path) or model.name_or_path
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", path]
    command += ["--served-model-name", rollout.served_name or model.name_or_path, "--host", host, "--port", str(number)]
    command += ["--dtype", model.dtype, "--max-model-len", str(max_length), "--logprobs-mode", "processed_logprobs"]
    command += ["--generation-config", "vllm"]  # else the model's own would shorten completions
    command += ["--revision", model.revision] if model.revision is not None else []
    command += ["--trust-remote-code"] if model.trust_remote_code else []
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}  # without it no new weights are taken
    token = api_key(rollout)
    environment |= {"VLLM_API_KEY": token} if token is not None else {}
    before = signal.signal(signal.SIGTERM, _interrupt)
    # A session of its own: vLLM is several processes, and they end together.
    server = subprocess.Popen([*command, *flags], env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        while server.poll() is None and not _answers(url):
            time.sleep(LOOK)
        if server.poll() is None:
            ready(url)
        code = server.wait()
        raise EnvironmentProblem(f"the vLLM server ended by itself, with exit code {code}; its log is above")
    except KeyboardInterrupt:
        pass
    finally:
        _end(server)
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_python(python: str) -> None:
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    hint = "Install it in an environment of its own, and name its Python: --python PATH/bin/python"
    try:
        code = subprocess.run([python, "-c", look], check=False).returncode
    except OSError as error:
        raise EnvironmentProblem(f"--python {python} cannot be run: {error}. {hint}") from None
    if code:
        raise EnvironmentProblem(f"there is no vLLM in {python}. {hint}")


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise EnvironmentProblem(
            f"{host}:{port} cannot be served: {error}. The host is that of rollout.url, which must be this machine; "
            "--port takes another port"
        ) from None


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=LOOK):
            return True
    except urllib.error.HTTPError:
        return False  # it listens, and is not ready
    except OSError:
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """End every process of the server's session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        try:
            server.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
