"""Where a run's records go: the metrics file, the terminal, Weights & Biases, TensorBoard. Rank 0 only.

Records are flat mappings from metric name to number; `step` counts optimizer steps. Names that begin with `eval_` are
measurements on held-out rows. Only the metrics file is state; the others may be lost without changing the run.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.contracts import Sink
from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.track.config import TensorboardConfig, TrackConfig
from alignkit.track.console import ConsoleSink
from alignkit.track.text import tracker_names
from alignkit.track.wandb_sink import WandbSink

if TYPE_CHECKING:
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["ConsoleSink", "JsonlSink", "TensorboardSink", "WandbSink", "make_sinks"]


def make_sinks(track: TrackConfig, run_dir: Path, console: Console, *, quiet: bool) -> list[Sink]:
    """The console and the trackers the recipe names. The metrics file is not among them: it is state."""
    sinks: list[Sink] = [ConsoleSink(console, quiet=quiet)]
    if track.wandb is not None:
        sinks.append(WandbSink(track.wandb, run_dir, console))
    if track.tensorboard is not None:
        sinks.append(TensorboardSink(track.tensorboard, run_dir))
    return sinks


class JsonlSink:
    """One JSON object a line, each written in one piece. Stateful: a resumed run's file equals an unbroken one's.

    The file is created when missing and appended to otherwise; `fresh` empties it for a run that starts over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: after a failed write no half line may wait in a buffer for close() to write it.
        self._file = path.open("ab", buffering=0)

    def start(self, facts: Mapping[str, Any]) -> None:
        """Nothing to do: the file is open since construction, so that it can be restored before the start."""
        del facts

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line. Raises ValueError on nan or infinity, EnvironmentProblem on a full disk."""
        bad = _first_non_finite(record)
        if bad is not None:
            raise ValueError(
                f"{self.path}: {bad} is not finite; JSON has no word for it, and a run stops before it logs it"
            )
        line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        start = self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(start)
            self._file.seek(start)
            raise self._explained(error) from error

    def sync(self) -> None:
        """Make everything logged so far survive a power cut; called before a checkpoint counts on it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._explained(error) from error

    def fresh(self) -> None:
        """Empty the file."""
        self._cut(0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def state_dict(self) -> dict[str, Any]:
        """`offset`: bytes written so far."""
        return {"offset": self._file.tell()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drop what was logged after the checkpoint. Raises RunFailed when the file is shorter than it was then."""
        size = os.fstat(self._file.fileno()).st_size
        if size < state["offset"]:
            raise RunFailed(
                f"{self.path} holds {size} bytes, but held {state['offset']} when the checkpoint was written: it was "
                "changed or removed since. Put the file back, or start a new run in another output_dir."
            )
        self._cut(state["offset"])

    def _cut(self, offset: int) -> None:
        self._file.truncate(offset)
        self._file.seek(offset)

    def _explained(self, error: OSError) -> Exception:
        """The error to raise: a full disk in our words, anything else as it came."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        free = shutil.disk_usage(self.path.parent).free
        return EnvironmentProblem(
            f"no space left to write {self.path}: {free / 2**20:.1f} MiB are free there. Free some space, or lower "
            "train.save_total_limit, then `alignkit resume` the run: it continues from its last checkpoint."
        )


def _first_non_finite(record: Mapping[str, Any], prefix: str = "") -> str | None:
    """'name = nan' of the first value that is nan or infinite, nested mappings included."""
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{prefix}{name} = {value}"
        if isinstance(value, Mapping) and (inner := _first_non_finite(value, f"{prefix}{name}.")) is not None:
            return inner
    return None


class TensorboardSink:
    """Event files under `runs/<host>` of the run folder; a resumed run hides what its predecessor logged too much."""

    def __init__(self, config: TensorboardConfig, run_dir: Path) -> None:
        del config  # has no keys yet
        self.directory = run_dir / "runs" / os.uname().nodename
        self._writer: SummaryWriter | None = None

    def start(self, facts: Mapping[str, Any]) -> None:
        """Open the event file. Raises EnvironmentProblem when tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentProblem(
                "the recipe asks for track.tensorboard, but the package tensorboard is not installed. "
                "Run: pip install 'alignkit[tensorboard]', or remove track.tensorboard from the recipe."
            ) from error
        first = facts["start_step"] + 1
        self._writer = SummaryWriter(str(self.directory), purge_step=first if facts["resumed"] else None)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write every number of the record at its step."""
        assert self._writer is not None, "start() comes first"
        for name, value in tracker_names(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
