"""Weights & Biases. A missing key or network costs the live page, never the run: records stay in the run folder."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from alignkit.core.errors import EnvironmentProblem
from alignkit.track.config import WandbConfig
from alignkit.track.text import tracker_names

if TYPE_CHECKING:
    from rich.console import Console

Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = ("online", "offline", "disabled")
INIT_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 60
STEP = "train/global_step"


class WandbSink:
    """Logs under `train/` and `eval/` against `train/global_step`; a resumed run keeps its id.

    What the recipe leaves at its default, WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY, WANDB_TAGS and WANDB_MODE may say.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, console: Console) -> None:
        self.config, self.run_dir, self.console = config, run_dir, console
        self._run: Any = None

    def start(self, facts: Mapping[str, Any]) -> None:
        """Open the run; offline, with a printed line, when the service does not answer.

        Raises: EnvironmentProblem when wandb is not installed or WANDB_MODE is not a mode.
        """
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(
                "the recipe asks for track.wandb, but the package wandb is not installed. "
                "Run: pip install 'alignkit[wandb]', or remove track.wandb from the recipe."
            ) from error
        mode = choose_mode(self.config)
        try:
            self._run = self._open(mode, facts)
        except wandb.Error as error:
            if mode != "online":
                raise
            reason = str(error).splitlines()[0]
            self._say(f"wandb: cannot log online ({reason}); logging offline instead")
            mode = "offline"
            wandb.teardown()  # the failed attempt holds on to the run's id until its process ends
            self._run = self._open(mode, facts)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        if mode == "online":
            self._say(f"wandb: {self._run.url}")
        elif mode == "offline":
            folder = Path(self._run.dir).parent
            self._say(f"wandb: offline; upload later with: wandb sync {folder}")

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand the record to wandb's own process, which retries the network without holding up the run."""
        self._run.log({STEP: record["step"], **tracker_names(record)})

    def close(self) -> None:
        """Finish the run; gives up on a slow upload after a minute, the local copy stays."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self, mode: Mode, facts: Mapping[str, Any]) -> Any:
        import wandb

        config, environment = self.config, os.environ
        project_is_default = config.project == WandbConfig.model_fields["project"].default
        return wandb.init(
            mode=mode,
            id=facts["run_id"],
            # Started over, the run replaces what an earlier attempt logged under this id.
            resume="allow" if facts["resumed"] else None,
            project=environment.get("WANDB_PROJECT", config.project) if project_is_default else config.project,
            name=config.name or environment.get("WANDB_NAME") or self.run_dir.resolve().name,
            entity=config.entity,  # None: wandb reads WANDB_ENTITY, and WANDB_TAGS likewise
            tags=config.tags or None,
            dir=str(self.run_dir),
            # A recipe's env block may hold secrets.
            config={name: value for name, value in facts["recipe"].items() if name != "env"},
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_S,
                login_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=False,
            ),
        )

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)


def choose_mode(config: WandbConfig) -> Mode:
    """The recipe's mode, else WANDB_MODE, else online where a key is at hand and offline where none is.

    Raises: EnvironmentProblem when WANDB_MODE is none of the three modes.
    """
    if config.mode is not None:
        return config.mode
    wanted = os.environ.get("WANDB_MODE", "")
    for mode in MODES:
        if wanted == mode:
            return mode
    if wanted:
        raise EnvironmentProblem(f"WANDB_MODE is {wanted!r}; expected one of {', '.join(MODES)}. Correct or unset it.")
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Whether WANDB_API_KEY or the netrc file of `wandb login` offers a key for the service."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not path.is_file():
        return False
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return host in netrc.netrc(str(path)).hosts
    except netrc.NetrcParseError as error:
        raise EnvironmentProblem(
            f"{path} cannot be read as a netrc file: {error}. Correct it, or set WANDB_API_KEY."
        ) from None
