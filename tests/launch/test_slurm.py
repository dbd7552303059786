"""launch/slurm.sh: the printed plan word for word, that the plan is what happens, and the job's signals."""

import os
import signal
import time

import pytest

ARGUMENTS = ("-m", "fastlm.train", "--config", "my configs/x.py", "--workdir", "it's $HOME")


def test_dry_run_prints_the_plan(root):
    result = root.run(
        "launch/slurm.sh", "--dry-run", "--nodes", "2", "--gpus", "4", "--partition", "a100", "--", *ARGUMENTS
    )
    assert result.stdout.splitlines() == [
        "mkdir -p runs/slurm",
        "env FASTLM_ACCELERATOR=cuda sbatch --job-name=fastlm --nodes=2 --ntasks-per-node=4 --cpus-per-task=8 "
        "--time=24:00:00 --requeue --open-mode=append --signal=B:USR1@120 --output=runs/slurm/%x-%j.out "
        "--partition=a100 --gpus-per-node=4 launch/slurm.sh job -m fastlm.train "
        "--config 'my configs/x.py' --workdir 'it'\\''s $HOME'",
    ]
    assert (result.returncode, result.stderr) == (0, "")
    assert not (root.path / "runs").exists()


def test_the_plan_is_what_happens(root):
    root.stub("sbatch")
    options = (
        "--gpus",
        "0",
        "--array",
        "0-3%2",
        "--name",
        "a b",
        "--account",
        "me",
        "--time",
        "1:00",
        "--",
        *ARGUMENTS,
    )
    plan = root.run("launch/slurm.sh", "--dry-run", *options).stdout
    assert root.recorded() == []
    assert root.run(root.path / "launch/slurm.sh", *options, cwd=root.path.parent).returncode == 0
    assert root.run("bash", "-c", plan).returncode == 0
    real, planned = root.recorded()
    assert real == planned
    assert real.endswith("<job> <-m> <fastlm.train> <--config> <my configs/x.py> <--workdir> <it's $HOME>")
    assert "gpus" not in real and "<--ntasks-per-node=1>" in real
    assert (root.path / "runs/slurm").is_dir()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpus", "1"], "nothing to run"),
        (["--gpus", "1", "--"], "nothing to run"),
        (["-m", "fastlm.train"], "'-m'"),
        (["--nodes"], "--nodes needs a value"),
        (["--nodes", "two", "--", "x"], "'two'"),
        (["--nodes", "0", "--", "x"], "at least 1"),
    ],
)
def test_bad_arguments(root, one_line_error, arguments: list[str], part: str):
    root.stub("sbatch")
    one_line_error(root.run("launch/slurm.sh", *arguments), "slurm.sh", part)
    assert root.recorded() == []


# srun drops its own options and becomes the program; the program reports the signal it gets, as a trainer would.
SRUN = 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'
LOCAL = """
[ "$1" != -c ] || exit 0
trap 'echo saved; kill $!; exit 0' TERM
echo started
sleep "${RUN_SECONDS:-30}" & wait $!
exit "${RUN_EXIT:-0}"
"""


@pytest.fixture
def inside(root):
    root.stub("srun", SRUN)
    root.stub("scontrol")
    (root.path / "launch/local.sh").unlink()
    root.stub("local.sh", LOCAL).rename(root.path / "launch/local.sh")
    root.environment["SLURM_JOB_ID"] = "77"
    return root


def test_the_job_ends_with_the_runs_status(inside):
    result = inside.run("launch/slurm.sh", "job", "-m", "a b", RUN_SECONDS="0", RUN_EXIT="3", SLURM_CPUS_PER_TASK="4")
    assert result.returncode == 3
    assert inside.recorded() == [
        "local.sh <-c> <>",
        "srun <--cpus-per-task=4> <--kill-on-bad-exit=1> <launch/local.sh> <-m> <a b>",
        "local.sh <-m> <a b>",
    ]


@pytest.mark.parametrize(
    ("number", "array", "requeued"),
    [
        (signal.SIGUSR1, {}, ["scontrol <requeue> <77>"]),
        (signal.SIGUSR1, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "5"}, ["scontrol <requeue> <70_5>"]),
        (signal.SIGTERM, {}, []),
    ],
)
def test_signals_let_the_run_save_and_only_the_time_limit_requeues(inside, number, array: dict, requeued: list):
    job = inside.start("launch/slurm.sh", "job", "x", **array)
    assert job.stdout.readline() == "started\n"
    time.sleep(0.2)  # the trap is set right after the run starts
    os.kill(job.pid, number)
    out, _ = job.communicate(timeout=20)
    assert (job.returncode, out) == (0, "saved\n")
    assert [line for line in inside.recorded() if line.startswith("scontrol")] == requeued
