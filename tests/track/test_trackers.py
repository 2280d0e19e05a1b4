import builtins
import io
import json
import struct

import pytest
from rich.console import Console

from alignkit.core.errors import EnvironmentProblem
from alignkit.track.config import TensorboardConfig, TrackConfig, WandbConfig
from alignkit.track.sinks import ConsoleSink, TensorboardSink, WandbSink, make_sinks
from alignkit.track.wandb_sink import choose_mode
from tests.track.fake_run import eval_record, train_record


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("API_KEY", "MODE", "PROJECT", "NAME", "ENTITY", "TAGS", "BASE_URL", "DIR", "RUN_ID"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def console():
    return Console(file=io.StringIO(), width=80)


def wandb_records(path):
    """The records of a wandb run file: a LevelDB-style log of 32 KiB blocks after a seven-byte file header."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, offset, pending = path.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        if 32768 - offset % 32768 < 7:  # too little left of this block for a header
            offset += 32768 - offset % 32768
            continue
        _, length, piece = struct.unpack_from("<IHB", content, offset)
        pending += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if piece in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def history(path):
    rows = (record.history.item for record in wandb_records(path) if record.WhichOneof("record_type") == "history")
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def test_wandb_offline_history_can_be_read_back(tmp_path, facts, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "from-environment")
    sink = WandbSink(WandbConfig(tags=["test"]), tmp_path, console())
    sink.start(facts)
    sink.log(train_record(3))
    sink.log(eval_record(10))
    sink.close()
    wandb.teardown()  # finish() may return before wandb's process has written the file; this waits, as exiting does
    assert "wandb: offline; upload later with: wandb sync" in sink.console.file.getvalue()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-abc123.wandb")
    training, evaluation = history(path)
    assert training["train/global_step"] == 3
    assert training["train/rewards/margins"] == train_record(3)["rewards/margins"]
    assert evaluation["train/global_step"] == 10
    assert evaluation["eval/win_rate"] == eval_record(10)["eval_win_rate"]
    assert "eval/eval_win_rate" not in evaluation
    run = next(record.run for record in wandb_records(path) if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == ("abc123", "from-environment", tmp_path.name)
    assert list(run.tags) == ["test"]
    assert b"hush" not in path.read_bytes(), "the recipe's env block was uploaded"


@pytest.mark.parametrize("resumed", [False, True])
def test_wandb_falls_back_to_offline_without_a_network(tmp_path, facts, monkeypatch, resumed):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr("alignkit.track.wandb_sink.INIT_TIMEOUT_S", 1)
    sink = WandbSink(WandbConfig(), tmp_path, console())
    sink.start({**facts, "resumed": resumed})
    sink.log(train_record(1))
    sink.close()
    wandb.teardown()
    assert "wandb: cannot log online (" in sink.console.file.getvalue()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-abc123.wandb")
    assert [row["train/global_step"] for row in history(path)] == [1]


def test_choose_mode(monkeypatch, tmp_path):
    assert choose_mode(WandbConfig()) == "offline"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert choose_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert choose_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(WandbConfig()) == "disabled"
    assert choose_mode(WandbConfig(mode="online")) == "online"
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(EnvironmentProblem, match="'ofline'; expected one of online, offline, disabled"):
        choose_mode(WandbConfig())


def test_tensorboard_events_can_be_read_back(tmp_path, facts):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorboardSink(TensorboardConfig(), tmp_path)
    sink.start(facts)
    sink.log(train_record(3))
    sink.log(eval_record(10))
    sink.close()
    events = EventAccumulator(str(sink.directory))
    events.Reload()
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (3, pytest.approx(train_record(3)["loss"]))
    assert events.Scalars("eval/win_rate")[0].step == 10


def test_tensorboard_resume_drops_the_steps_after_the_checkpoint(tmp_path, facts):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, last in ((0, 5), (3, 4)):
        sink = TensorboardSink(TensorboardConfig(), tmp_path)
        sink.start({**facts, "start_step": start, "resumed": start > 0})
        for step in range(start + 1, last + 1):
            sink.log({"step": step, "loss": float(start)})
        sink.close()
    events = EventAccumulator(str(sink.directory))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0), (2, 0), (3, 0), (4, 3)]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("wandb", lambda path: WandbSink(WandbConfig(), path, console())),
        ("torch.utils.tensorboard", lambda path: TensorboardSink(TensorboardConfig(), path)),
    ],
)
def test_a_missing_package_names_its_extra(tmp_path, facts, monkeypatch, package, make):
    real = builtins.__import__

    def without(name, *arguments):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    extra = package.rsplit(".", 1)[-1]
    with pytest.raises(EnvironmentProblem, match=rf"pip install 'alignkit\[{extra}\]'"):
        make(tmp_path).start(facts)


def test_make_sinks_follows_the_recipe(tmp_path):
    assert [type(s) for s in make_sinks(TrackConfig(), tmp_path, console(), quiet=True)] == [ConsoleSink]
    track = TrackConfig(wandb=WandbConfig(), tensorboard=TensorboardConfig())
    sinks = make_sinks(track, tmp_path, console(), quiet=False)
    assert [type(s) for s in sinks] == [ConsoleSink, WandbSink, TensorboardSink]
