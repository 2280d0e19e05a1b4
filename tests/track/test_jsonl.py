import json
import os

import pytest

from alignkit.core.contracts import Sink, Stateful
from alignkit.core.errors import EnvironmentProblem, RunFailed
from alignkit.track.sinks import JsonlSink


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_writes_one_exact_line_per_record(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log({"step": 1, "loss": 0.1 + 0.2, "text": "é"})
    assert (tmp_path / "m.jsonl").read_bytes() == '{"step": 1, "loss": 0.30000000000000004, "text": "é"}\n'.encode()
    assert isinstance(sink, Stateful)
    as_sink: Sink = sink
    as_sink.close()


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    whole = JsonlSink(tmp_path / "whole.jsonl")
    for step in (1, 2, 3):
        whole.log({"step": step})
    first = JsonlSink(path)
    first.log({"step": 1})
    first.log({"step": 2})
    first.sync()
    state = first.state_dict()
    first.log({"step": 3, "lost": True})
    path.open("a").write('{"step": 4, "torn')  # as a kill in the middle of a write would leave it
    second = JsonlSink(path)
    second.load_state_dict(state)
    second.log({"step": 3})
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_state_counts_bytes_already_in_the_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    assert JsonlSink(path).state_dict() == {"offset": 12}


def test_fresh_empties_the_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    sink = JsonlSink(path)
    sink.fresh()
    sink.log({"step": 7})
    assert read(path) == [{"step": 7}]


def test_a_shortened_file_is_refused(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    with pytest.raises(RunFailed, match="holds 0 bytes, but held 40"):
        sink.load_state_dict({"offset": 40})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_refused_by_name(tmp_path, value):
    sink = JsonlSink(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="grad_norm"):
        sink.log({"step": 1, "grad_norm": value})
    with pytest.raises(ValueError, match=r"scores\.valence"):
        sink.log({"step": 1, "scores": {"valence": value}})
    assert (tmp_path / "m.jsonl").read_bytes() == b""


class FullDisk:
    """A raw file that takes seven bytes more and then reports a full disk."""

    def __init__(self, inner):
        self.inner, self.room = inner, 7

    def write(self, data):
        if not self.room:
            raise OSError(28, os.strerror(28))
        taken, self.room = self.room, 0
        return self.inner.write(data[:taken])

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_a_full_disk_is_named_and_leaves_no_half_line(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.log({"step": 1})
    sink._file = FullDisk(sink._file)
    with pytest.raises(EnvironmentProblem, match=r"m\.jsonl.*MiB are free") as caught:
        sink.log({"step": 2, "loss": 1.0})
    assert caught.value.exit_code == 3
    assert read(path) == [{"step": 1}]
    assert sink.state_dict() == {"offset": 12}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_the_kernel_s_full_disk_is_recognised():
    from pathlib import Path

    sink = JsonlSink(Path("/dev/full"))
    sink._file.truncate = lambda size: size  # a device cannot be truncated
    with pytest.raises(EnvironmentProblem, match="no space left"):
        sink.log({"step": 1})
