"""Runs as real processes: several of them, killed, asked to stop, out of disk. What they leave behind is compared."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
TIMED = ("time", "train/tokens_per_second", "train/step_seconds", "train/utilisation")

CONFIG = """
from configs import base

def get_config():
    config = base.get_config()
    config.tokenizer.kind = "bytes"
    config.model.update(layers=1, width=16, heads=2, max_length=64, dropout=0.1)
    config.compute.dtype = "float32"
    config.data.update(sources=(("SOURCE", 1.0),), length=32, batch_size=8)
    config.training.update(steps=8, average_decay=0.9)
    config.schedule.update(name="constant", warmup=0)
    config.evaluation.update(every=4, batches=2)
    config.checkpoint.update(every=4, keep=2)
    config.logging.update(every=1, tensorboard=False)
    return config
"""
# Long enough to be killed in the middle, and saving all the time.
LONG = ("--config.training.steps=150", "--config.checkpoint.every=5", "--config.evaluation.every=50")


@pytest.fixture(scope="module")
def config_file(corpus, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(CONFIG.replace("SOURCE", corpus))
    return file


@pytest.fixture(scope="module")
def start(config_file):
    """Returns a function that starts `fastlm.train` as processes, and ends those a failed test leaves."""
    started = []

    def start(workdir, *overrides, processes=1, devices=1):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        for index in range(processes):
            if processes > 1:
                environment |= {"FASTLM_COORDINATOR": f"localhost:{port}", "FASTLM_PROCESSES": str(processes)}
                environment |= {"FASTLM_PROCESS": str(index)}
            command = [sys.executable, "-u", "-m", "fastlm.train", "--config", config_file, "--workdir", workdir]
            output = subprocess.PIPE if index == 0 else subprocess.DEVNULL
            started.append(
                subprocess.Popen(
                    [*map(str, command), *overrides],
                    env=environment,
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            )
        return started[-processes:]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(processes, status=0):
    """Waits for all; asserts how they ended; returns what the first one printed."""
    out, _ = processes[0].communicate(timeout=240)
    assert [process.wait(60) for process in processes] == [status] * len(processes), out
    return out


def read_until(process, text):
    """Reads the output of a process up to the line with `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process ended with {process.wait()} before printing {text!r}")


def rows(workdir, prefix="train"):
    """What metrics.jsonl holds for each step, without what depends on the clock."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = {name: value for name, value in json.loads(line).items() if name not in TIMED}
        if f"{prefix}/loss" in row:
            assert row["step"] not in found, "a step is there twice"
            found[row["step"]] = row
    return found


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def arrays(workdir, step):
    """All arrays of a checkpoint, by path."""
    found = {}
    for item in ("model", "average", "training"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / item)
        found |= {f"{item}/{path}": np.asarray(leaf) for path, leaf in flatten(tree)}
    return found


def flatten(tree, path=""):
    if isinstance(tree, dict):
        return [pair for name, child in tree.items() for pair in flatten(child, f"{path}/{name}")]
    if isinstance(tree, (list, tuple)):
        return [pair for i, child in enumerate(tree) for pair in flatten(child, f"{path}/{i}")]
    return [] if tree is None else [(path, tree)]


def assert_same_run(one, two, step):
    assert rows(one) == rows(two)
    assert rows(one, "validation") == rows(two, "validation")
    left, right = arrays(one, step), arrays(two, step)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def assert_close_run(one, two):
    for prefix in ("train", "validation", "test"):
        left, right = rows(one, prefix), rows(two, prefix)
        assert left.keys() == right.keys()
        assert left, prefix
        for step, row in left.items():
            for name, value in row.items():
                assert right[step][name] == pytest.approx(value, rel=2e-4, abs=1e-5), (step, name)


# --- several processes and devices -----------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """Eight steps in one process on one device."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(start(workdir))
    assert sorted(rows(workdir)) == list(range(1, 9))
    return workdir


@pytest.fixture(scope="module")
def two(start, tmp_path_factory):
    """The same in two processes of four devices, 2 x 2 x 2."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    out = finish(start(workdir, *MESH, "--config.sample.prompts=('ab', 'cd')", processes=2, devices=4))
    assert out.count("--- sample ---") == 2, "samples are made by both and printed by one"
    return workdir


def test_two_processes_equal_one(straight, two):
    assert_close_run(straight, two)
    assert steps(straight) == steps(two) == [4, 8]
    assert json.loads((two / "result.json").read_text())["status"] == "finished"


def without_the_last_checkpoint(workdir, to):
    copy = shutil.copytree(workdir, to)
    shutil.rmtree(copy / "checkpoints" / "8")
    (copy / "result.json").unlink()
    return copy


def test_a_run_of_two_processes_goes_on_in_one(straight, two, start, tmp_path):
    run = without_the_last_checkpoint(two, tmp_path / "run")
    assert "resuming" in finish(start(run))
    assert_close_run(straight, run)


def test_a_run_of_one_process_goes_on_in_two(straight, start, tmp_path):
    run = without_the_last_checkpoint(straight, tmp_path / "run")
    assert "resuming" in finish(start(run, *MESH, processes=2, devices=4))
    assert_close_run(straight, run)
    assert steps(run) == [4, 8]


def test_eight_devices_equal_one(straight, start, tmp_path):
    finish(start(tmp_path / "run", *MESH, devices=8))
    assert_close_run(straight, tmp_path / "run")


def test_a_mesh_that_leaves_a_process_no_rows_of_its_own_is_refused(start, tmp_path):
    mesh = ("--config.mesh.data=1", "--config.mesh.tensor=8")
    out = finish(start(tmp_path / "run", *mesh, processes=2, devices=4), status=2)
    assert "error: config.mesh: data x fsdp" in out
    assert "Traceback" not in out


# --- killed and asked to stop ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(start, tmp_path_factory):
    """A longer run in one go."""
    workdir = tmp_path_factory.mktemp("long") / "run"
    finish(start(workdir, *LONG))
    assert sorted(rows(workdir)) == list(range(1, 151))
    return workdir


def kill_while_saving(process, workdir, chance):
    """Kills at the moment when a half-written checkpoint is on disk; `chance` says how many are let pass."""
    folder, seen = workdir / "checkpoints", set()
    while process.poll() is None:
        seen |= {path.name for path in folder.glob("*tmp*")}
        if len(seen) > chance:
            break
    process.kill()


def kill_after_a_while(process, workdir, chance):
    time.sleep(chance / 10)
    process.kill()


def test_a_run_killed_again_and_again_equals_the_straight_run_bit_for_bit(long, start, tmp_path):
    chances, run = random.Random(11), tmp_path / "run"
    killed = 0
    for kill in (kill_while_saving, kill_after_a_while, kill_while_saving, kill_after_a_while):
        (process,) = start(run, *LONG)
        read_until(process, "step=")
        kill(process, run, chances.randrange(5))
        process.stdout.read()
        killed += process.wait() == -signal.SIGKILL
        assert not [path for path in steps_on_disk(run) if not (run / "checkpoints" / path / "model").is_dir()]
    assert killed >= 2, "the runs were too short to be killed"
    finish(start(run, *LONG))
    assert sorted(rows(run)) == list(range(1, 151))
    assert_same_run(long, run, 150)
    assert not list((run / "checkpoints").glob("*tmp*")), "half-written checkpoints are cleared away"


def steps_on_disk(workdir):
    return [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]


def test_sigterm_saves_exits_cleanly_and_the_same_command_goes_on(long, start, tmp_path):
    run = tmp_path / "run"
    (process,) = start(run, *LONG)
    read_until(process, "step=23/")
    process.send_signal(signal.SIGTERM)
    out = finish([process])
    assert "asked to stop: saved step" in out
    assert "the same command resumes" in out
    assert not (run / "result.json").exists()
    finish(start(run, *LONG))
    assert_same_run(long, run, 150)


def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(start, tmp_path):
    run = tmp_path / "run"
    endless = ("--config.training.steps=100000", "--config.checkpoint.every=100000", "--config.evaluation.every=0")
    processes = start(run, *MESH, *endless, processes=2, devices=4)
    read_until(processes[0], "step=5/")
    processes[1].send_signal(signal.SIGTERM)
    out = finish(processes)
    (step,) = steps(run)
    assert f"asked to stop: saved step {step}; the same command resumes" in out
    assert not (run / "result.json").exists()


# --- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 2 MB; skips where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_costs_no_checkpoint(small_disk, start, config_file):
    run = small_disk / "run"
    finish(start(run))
    before = arrays(run, 8)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * (free - 20_000))
    more = ("--config.training.steps=40", "--config.logging.tensorboard=True")
    out = finish(start(run, *more), status=2)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, out
    assert "space" in errors[0]
    assert "Traceback" not in out
    assert {4, 8} & set(map(int, steps_on_disk(run)))
    for path, value in arrays(run, 8).items():
        np.testing.assert_array_equal(value, before[path])
    (small_disk / "filler").unlink()
    assert "resuming" in finish(start(run, *more))
    assert sorted(rows(run)) == list(range(1, 41))


def test_a_workdir_that_cannot_be_written(small_disk, start):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    out = finish(start(small_disk / "run"), status=2)
    assert "Read-only file system" in out
    assert len([line for line in out.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in out
