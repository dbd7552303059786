"""The loop: resuming is exact, stopping is clean, and what goes wrong is one line that says what is safe."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.training import build, loop, workdir_files


@pytest.fixture(autouse=True)
def one_device(no_mesh):
    """The runs here use the first device of eight."""


@pytest.fixture
def train(tiny_config, tmp_path, monkeypatch):
    """Returns a function that runs `tiny_config` with changes in a named workdir."""
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])

    def run(name="run", **changes):
        config = {k: dict(v) if isinstance(v, dict) else v for k, v in tiny_config.items()}
        for path, value in changes.items():
            section, _, key = path.partition("__")
            config[section][key] = value
        lines = []
        result = loop.run(build.build(config, tmp_path / name), say=lines.append)
        return result, lines

    return run


def same(a, b):
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_behind(train, tmp_path):
    result, lines = train()
    assert (result.status, result.step) == ("finished", 12)
    assert 0 < result.metrics["bits_per_byte"] < 9
    assert result.metrics["bits_per_byte_error"] > 0
    assert any("test:" in line for line in lines)
    folder = tmp_path / "run"
    assert {"checkpoints", "config.json", "model.json", "metrics.jsonl"} <= {p.name for p in folder.iterdir()}
    steps = [row["step"] for row in logged(folder)]
    assert steps == sorted(steps)
    assert {1, 3, 6, 9, 12} <= set(steps)


MEMORY = {"model__attention": "transformer_xl(memory=16)", "data__mode": "stream"}


@pytest.mark.parametrize("changes", [{}, pytest.param(MEMORY, marks=pytest.mark.slow)], ids=["packed", "memory"])
def test_resuming_equals_running_straight_bit_for_bit(train, tmp_path, changes):
    changes = {"training__steps": 9, "training__average_decay": 0.9, "model__dropout": 0.1} | changes
    straight, _ = train("straight", **changes)
    original, calls = loop.StopRequest.now, []

    def stop_at_five(self, step):
        calls.append(step)
        return step == 5 and len(calls) == 5

    loop.StopRequest.now = stop_at_five
    try:
        first, _ = train("twice", **changes)
    finally:
        loop.StopRequest.now = original
    assert (first.status, first.step) == ("interrupted", 5)
    second, lines = train("twice", **changes)
    assert any("resuming" in line and "step 5" in line for line in lines)
    same(straight.state, second.state)
    assert bool(jax.tree.leaves(straight.state.carry)) == (changes.get("data__mode") == "stream")
    assert straight.metrics == second.metrics
    rows = [row["step"] for row in logged(tmp_path / "twice") if "train/loss" in row]
    assert len(rows) == len(set(rows)), "no step is logged twice"


def test_sigterm_saves_the_step_in_hand(train, tmp_path, monkeypatch):
    original = loop.Meter.add

    def add(self, values, batch):
        original(self, values, batch)
        if len(self.pending) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Meter, "add", add)
    result, _ = train()
    assert result.status == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / str(result.step)).is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_host_runs_few_steps_ahead_or_a_sigterm_would_wait_for_a_whole_log_interval():
    waited = []

    class Value:
        def __init__(self, step):
            self.step = step

        def block_until_ready(self):
            waited.append(self.step)

    meter = loop.Meter.__new__(loop.Meter)
    meter.pending = []
    for step in range(5):
        meter.pending.append({"loss": Value(step)})
        meter.wait_for_the_last_but(2)
    assert waited == [0, 1, 2]


def test_a_second_writer_is_refused_until_the_first_is_gone(train, tmp_path):
    held = workdir_files.lock(tmp_path / "run")
    with pytest.raises(UserError, match=rf"run: another process \(process {os.getpid()} on .*\) is training there"):
        train(training__steps=2)
    assert not (tmp_path / "run" / "checkpoints").exists()
    held.close()
    assert train(training__steps=2)[0].status == "finished"


def test_a_finished_run_stays_finished(train):
    one, _ = train()
    two, _ = train()
    same(one.state, two.state)
    assert one.metrics == two.metrics


def test_steps_without_finite_gradients_stop_the_run_and_name_the_last_good_checkpoint(train, monkeypatch):
    original = loop.scoring.to_device
    count = iter(range(100))

    def poison(batch, mesh):
        if next(count) >= 8:
            batch = dict(batch, loss_mask=batch["loss_mask"] * np.float32("inf"))
        return original(batch, mesh)

    monkeypatch.setattr(loop.scoring, "to_device", poison)
    with pytest.raises(UserError, match=r"no finite gradients.*last good checkpoint is .*/8;") as caught:
        train(training__max_skipped=3, evaluation__split="", training__steps=40)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__layers": 2}, "holds a run with model.layers=1, but the config says 2"),
        ({"data__length": 16}, "holds a run with data.length=32"),
        ({"optimizer__name": "sgd"}, "holds a run with optimizer.name='adamw'"),
    ],
)
def test_a_workdir_of_another_run_is_refused(train, change, message):
    train(training__steps=4)
    with pytest.raises(UserError, match=message):
        train(training__steps=4, **change)


def test_a_damaged_checkpoint_is_named_and_the_others_survive(train, tmp_path):
    train()
    folder = tmp_path / "run" / "checkpoints"
    newest = folder / "12" / "model"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * 10)
    with pytest.raises(UserError, match=r"checkpoint .*/12: could not read it .*intact there: \[8\]") as caught:
        train()
    assert "\n" not in str(caught.value)
    assert (folder / "8" / "model").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__batch_size": 6, "training__accumulation": 4}, "4 does not divide the batch of 6 rows"),
        ({"data__length": 65}, "config.data.length: 65 is more than config.model.max_length 64"),
        ({"model__vocab_size": 100}, "config.model.vocab_size: 100 is less than the tokenizer's"),
        ({"task__name": "languag_modeling"}, "did you mean 'language_modeling'"),
        ({"data__batch_size": "8"}, "config.data.batch_size: expected int"),
        ({"training__stops": 1}, "config.training.stops: no such key; did you mean 'steps'"),
        ({"mesh__data": 3}, "config.mesh"),
        ({"mesh__tensr": 1}, "config.mesh.tensr: no such key; did you mean 'tensor'"),
        ({"evaluation__split": "validatoin"}, "validat"),
        ({"data__sources": (("text:/nowhere/*.txt", 1.0),)}, "/nowhere"),
    ],
)
def test_configs_that_cannot_work_fail_before_anything_compiles(train, change, message, monkeypatch):
    monkeypatch.setattr(loop, "Run", lambda *a, **k: pytest.fail("compiled first"))
    with pytest.raises(UserError) as caught:
        train(**change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_sections_are_named(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"config.modle: no such section; did you mean 'model'"):
        build.build(tiny_config | {"modle": {}}, tmp_path)
