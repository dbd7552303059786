import errno
import io
import json
import os
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.training import metrics


def records(workdir):
    return [json.loads(line) for line in (workdir / metrics.JSONL_FILE).read_text().splitlines()]


def write(workdir, steps, **options):
    writer = metrics.make(workdir, **{"tensorboard": False, **options})
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def test_lines_have_step_time_and_prefixed_names(tmp_path):
    writer = metrics.make(tmp_path / "new" / "run", tensorboard=False)
    writer.write(10, {"loss": 2.5, "rate": float("nan")})
    writer.write(10, {"loss": 1.5}, prefix="validation")
    first, second = records(tmp_path / "new" / "run")  # already there: each line is flushed
    writer.close()
    assert first["step"] == 10
    assert first["time"] > 1e9
    assert first["train/loss"] == 2.5
    assert first["train/rate"] is None
    assert second["validation/loss"] == 1.5


@settings(max_examples=25, deadline=None)
@given(killed=st.integers(1, 30), saved=st.integers(0, 30), torn=st.integers(0, 20))
def test_a_resumed_log_equals_that_of_a_straight_run(tmp_path_factory, killed, saved, torn):
    saved = min(saved, killed)
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, range(1, killed + 1))
    path = workdir / metrics.JSONL_FILE
    torn_line = '{"step": 31, "time": 17'[:torn] if torn else ""
    path.write_text(path.read_text() + torn_line)
    write(workdir, range(saved + 1, 41), resume_step=saved)
    assert [(r["step"], r["train/loss"]) for r in records(workdir)] == [(s, s / 2) for s in range(1, 41)]
    assert sorted(p.name for p in workdir.iterdir()) == [metrics.JSONL_FILE]


def test_a_fresh_start_drops_what_is_there(tmp_path):
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [0])
    assert [r["step"] for r in records(tmp_path)] == [0]


def test_bytes_that_are_no_text_are_dropped_on_resume(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / metrics.JSONL_FILE
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00\n[1, 2]\n")
    write(tmp_path, [3], resume_step=2)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]


def test_tensorboard_events_hold_the_values_and_the_purge_mark(tmp_path):
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    write(tmp_path, [1, 2], tensorboard=True)
    write(tmp_path, [2], tensorboard=True, resume_step=1)
    events = []
    for path in sorted((tmp_path / metrics.TENSORBOARD_FOLDER).iterdir()):
        events += [proto.Event.FromString(data) for data in tfrecords(path.read_bytes())]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert sorted(scalars) == [(1, "train/loss", 0.5), (2, "train/loss", 1.0), (2, "train/loss", 1.0)]
    starts = [e.step for e in events if e.session_log.status == 1]
    assert sorted(starts) == [0, 2]


def tfrecords(data):
    """Length (8 bytes), checksum (4), payload, checksum (4)."""
    while data:
        size = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + size]
        data = data[16 + size :]


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def define_metric(self, name, step_metric):
        self.step_metric = (name, step_metric)

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_wandb_continues_its_run_after_a_resume(tmp_path, monkeypatch):
    runs = []
    fake = types.SimpleNamespace(init=lambda **options: runs.append(FakeRun(**options)) or runs[-1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(tmp_path, [1, 2], wandb="project", config={"a": 1})
    write(tmp_path, [2, 3], wandb="project", resume_step=1)
    write(tmp_path, [1], wandb="project")
    first, resumed, fresh = runs
    assert first.options["project"] == "project"
    assert first.options["config"] == {"a": 1}
    assert first.options["id"] == resumed.options["id"] != fresh.options["id"]
    assert first.logged == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 1.0}]
    assert first.step_metric == ("*", "step")
    assert all(run.finished for run in runs)


@pytest.mark.parametrize(("package", "options"), [("wandb", {"wandb": "p"}), ("tensorboardX", {"tensorboard": True})])
def test_a_missing_package_is_one_line_and_leaves_the_log_alone(tmp_path, monkeypatch, package, options):
    write(tmp_path, [1])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}") as caught:
        metrics.make(tmp_path, **{"tensorboard": False, **options})
    assert "\n" not in str(caught.value)
    assert [r["step"] for r in records(tmp_path)] == [1]


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
    writer.close()
    monkeypatch.setattr(writer, "_file", FullDisk())
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write metrics \(No space left on device\)"):
        writer.write(1, {"loss": 1.0})


def test_a_workdir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run: cannot write metrics"):
        metrics.make(tmp_path / "run")


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    write(tmp_path / "run", [1, 2])
    assert not (tmp_path / "run").exists()


def test_one_failing_writer_does_not_keep_the_others_open():
    closed = []

    class Good:
        def close(self):
            closed.append(True)

    class Bad:
        def close(self):
            raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        metrics.CombinedWriter([Good(), Bad(), Good()]).close()
    assert closed == [True, True]
