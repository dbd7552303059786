"""launch/sweep.py with a trainer of a few lines: grids, seeds, resuming, failures, the table, the other machines."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

# Loss = layers + seed / 10. With --hold it waits for SIGTERM and leaves as a trainer that saved; a run whose
# layers are named by FAIL fails as long as that variable is set. Every start is noted.
TRAINER = """
import json, os, pathlib, signal, sys
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv if word.startswith("--config."))
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
workdir.mkdir(parents=True, exist_ok=True)
layers, seed = int(flags["config.model.layers"]), int(flags["config.seed"])
starts = workdir / "starts"
starts.write_text((starts.read_text() if starts.exists() else "") + "x")
print("cores", len(os.sched_getaffinity(0)), flush=True)
def result(status):
    (workdir / "result.json").write_text(json.dumps(
        {"status": status, "step": 5, "metrics": {"loss": layers + seed / 10, "accuracy": layers}}))
if "--hold" in sys.argv and os.environ.get("HOLD"):
    signal.signal(signal.SIGTERM, lambda *_: (result("interrupted"), sys.exit(0)))
    signal.pause()
if str(layers) in os.environ.get("FAIL", "").split():
    print("about to fail"); sys.exit("error: no | such dataset\\n")
result("finished")
"""


@pytest.fixture
def sweep(root, tmp_path: Path):
    (tmp_path / "trainer.py").write_text(TRAINER)

    def words(*more: str) -> list[str]:
        command = f"--command={tmp_path}/trainer.py"
        common = ["--config", "configs/x.py", "--out", str(tmp_path / "out"), "--metric", "loss", command]
        return [sys.executable, "launch/sweep.py", *common, *more]

    root.sweep = lambda *more, **variables: root.run(*words(*more), **variables)
    root.start_sweep = lambda *more, **variables: root.start(*words(*more), **variables)
    root.out = tmp_path / "out"
    return root


def starts(sweep) -> dict[str, int]:
    return {str(path.parent.relative_to(sweep.out)): len(path.read_text()) for path in sweep.out.rglob("starts")}


def test_dry_run_prints_each_command(sweep, tmp_path: Path):
    result = sweep.sweep("--dry-run", "--grid", "model.layers=2,1", "--seeds=2", "--", "--config.x=it's y")
    line = (
        f"{sys.executable} {tmp_path}/trainer.py --config configs/x.py "
        f"--workdir {tmp_path}/out/model.layers={{0}}/seed{{1}}"
        """ '--config.x=it'"'"'s y' --config.model.layers={0} --config.seed={1}"""
    )
    assert result.stdout.splitlines() == [line.format(layers, seed) for layers in (2, 1) for seed in (0, 1)]
    assert not sweep.out.exists()


def test_the_table_has_mean_and_standard_error_sorted(sweep):
    result = sweep.sweep("--grid", "model.layers=4,2", "--seeds", "3")
    assert result.returncode == 0, result.stderr
    table = (
        "| model.layers | loss | ± standard error | seeds | note |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| 2 | 2.1 | 0.058 | 3/3 |  |\n"
        "| 4 | 4.1 | 0.058 | 3/3 |  |\n"
    )
    assert result.stdout.endswith(table)
    assert (sweep.out / "results.md").read_text() == table
    best = json.loads((sweep.out / "results.json").read_text())[0]
    assert best["by_seed"] == {"0": 2.0, "1": 2.1, "2": 2.2}
    assert best["standard_error"] == pytest.approx(0.1 / 3**0.5)
    with open(sweep.out / "results.csv", newline="") as lines:
        assert [row["model.layers"] for row in csv.DictReader(lines)] == ["2", "4"]


def test_maximize_puts_the_largest_first_and_finished_runs_are_not_run_again(sweep):
    arguments = ("--grid", "model.layers=2,4", "--metric=accuracy", "--maximize")
    sweep.sweep(*arguments)
    again = sweep.sweep(*arguments)
    assert [line.split(" | ")[0] for line in again.stdout.splitlines()[2:]] == ["| 4", "| 2"]
    assert starts(sweep) == {"model.layers=2/seed0": 1, "model.layers=4/seed0": 1}


def test_a_failed_run_is_isolated_shown_and_tried_again(sweep):
    arguments = ("--grid", "model.layers=1,2,3")
    failed = sweep.sweep(*arguments, FAIL="1")
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[-1] == "| 1 |  |  | 0/1 | seed 0 failed: error: no \\| such dataset |"
    assert "about to fail" in (sweep.out / "model.layers=1/seed0.log").read_text()
    assert sweep.sweep(*arguments).returncode == 0
    assert starts(sweep) == {"model.layers=1/seed0": 2, "model.layers=2/seed0": 1, "model.layers=3/seed0": 1}


def test_sigterm_lets_runs_save_starts_no_more_and_the_next_call_resumes(sweep):
    arguments = ("--grid", "model.layers=1,2", "--", "--hold")
    process = sweep.start_sweep(*arguments, HOLD="1")
    end = time.monotonic() + 20
    while not starts(sweep) or "cores" not in (sweep.out / "model.layers=1/seed0.log").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)  # until the trainer has set its handler
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143, err
    assert "seed 0 interrupted: interrupted" in out and "seed 0 waiting" in out
    assert sweep.sweep(*arguments).returncode == 0
    assert starts(sweep) == {"model.layers=1/seed0": 2, "model.layers=2/seed0": 1}


def test_a_metric_that_is_not_there_is_a_failure_that_names_those_that_are(sweep):
    result = sweep.sweep("--grid", "model.layers=1", "--metric=bits")
    assert "failed: result.json has no number 'bits', only accuracy, loss" in result.stdout


def test_results_of_other_arguments_are_not_taken_over(sweep, one_line_error):
    sweep.sweep("--grid", "model.layers=1")
    result = sweep.sweep("--grid", "model.layers=1", "--", "--config.steps=9")
    one_line_error(result, "other arguments", "--out")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_jobs_share_the_cores(sweep):
    assert sweep.sweep("--grid", "model.layers=1,2,3", "--jobs", "2").returncode == 0
    cores = len(os.sched_getaffinity(0))
    for log in sweep.out.rglob("seed0.log"):
        assert f"cores {cores // 2}" in log.read_text() or f"cores {cores - cores // 2}" in log.read_text()


def test_shards_are_disjoint_and_complete(sweep):
    arguments = ("--grid", "model.layers=1,2,3", "--seeds", "2")
    sweep.sweep(*arguments, "--shard", "0/2")
    assert len(starts(sweep)) == 3
    result = sweep.sweep(*arguments, "--shard", "TASK/2", TASK="1")
    assert result.returncode == 0 and set(starts(sweep).values()) == {1} and len(starts(sweep)) == 6
    assert "0/2" not in result.stdout, "a shard's table holds what the others have finished"


def test_slurm_gets_an_array_of_what_is_not_finished(sweep, tmp_path: Path):
    arguments = ("--grid", "model.layers=1,2,3", "--seeds", "2")
    sweep.sweep(*arguments, FAIL="2")
    slurm = ("--where", "slurm", "--jobs", "4", "--options=--partition gpu", "--dry-run")
    line = sweep.sweep(*arguments, *slurm).stdout
    assert line == (
        "launch/slurm.sh --name out --array 2,3%4 --partition gpu -- launch/sweep.py --config=configs/x.py "
        f"--out={tmp_path}/out --grid=model.layers=1,2,3 --seeds=2 --metric=loss --command={tmp_path}/trainer.py "
        "--shard=SLURM_ARRAY_TASK_ID/6\n"
    )
    sweep.stub("sbatch")
    submitted = sweep.sweep(*arguments, *slurm[:-1])
    assert submitted.returncode == 0 and "0/2" in submitted.stdout
    (call,) = sweep.recorded()
    assert "<--array=2,3%4>" in call and "<--partition=gpu>" in call and "<launch/sweep.py>" in call


def test_tpu_workers_take_every_nth_run(sweep, tmp_path: Path):
    tpu = ("--where=tpu", "--workers=2", "--options=--name p --zone z", "--grid=model.layers=1,2", "--dry-run")
    lines = sweep.sweep("--out=runs/s", *tpu).stdout.splitlines()
    flags = (
        "--config=configs/x.py --out=runs/s --grid=model.layers=1,2 --seeds=1 --metric=loss "
        f"--command={tmp_path}/trainer.py"
    )
    run = "launch/tpu_pod.sh run --name p --zone z --worker {0} --alone -- launch/sweep.py {1} --shard={0}/2"
    follow = "launch/tpu_pod.sh follow --name p --zone z --worker {0}"
    assert lines == [
        *(text.format(worker, flags) for worker in (0, 1) for text in (run, follow)),
        "launch/tpu_pod.sh fetch --name p --zone z --workers 2 -- runs/s",
    ]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--grid", "model.layers"], "key=value1,value2"),
        (["--grid", "model.layers=1,,2"], "key=value1,value2"),
        (["--grid", "a=(1,2"], "key=value1,value2"),
        (["--grid", "a=1,1"], "twice"),
        (["--grid", "a=1", "--grid", "config.a=2"], "'a' twice"),
        (["--grid", "seed=1,2"], "--seeds"),
        (["--seeds", "0"], "at least 1"),
        (["--jobs", "4096"], "--jobs 4096"),
        (["--where", "cloud"], "cloud"),
        (["--where", "tpu"], "--workers"),
        (["--where", "tpu", "--workers", "2"], "relative"),
        (["--shard", "2/2"], "0 to N-1"),
        (["--what"], "--what"),
    ],
)
def test_bad_arguments(sweep, one_line_error, arguments: list[str], part: str):
    result = sweep.sweep("--grid", "model.layers=1", *arguments, "--dry-run")
    result.stderr = result.stderr[result.stderr.index("error: ") :]
    one_line_error(result, "sweep.py", part)
    assert starts(sweep) == {}


@pytest.fixture(scope="module")
def module():
    """sweep.py as a module; it imports its neighbours by their bare names, as a script does."""
    sys.path.insert(0, str(LAUNCH))
    try:
        import sweep as loaded
        import sweep_runs

        yield loaded, sweep_runs
    finally:
        sys.path.remove(str(LAUNCH))


plain = st.text(
    st.characters(codec="ascii", exclude_characters=",()[]{}'\"\n\r", exclude_categories=["Cc"]), min_size=1
)


@given(st.lists(plain | plain.map(lambda text: f"({text},{text})"), min_size=1, unique=True))
def test_grid_values_are_read_back(module, values: list[str]):
    assert module[0].grid_axis("key=" + ",".join(values)) == [("key", value) for value in values]


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True))
def test_directory_names_are_unique_and_one_level_deep(module, values: list[str]):
    names = [module[1].directory_name([("key", value)]) for value in values]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) <= 120 for name in names)


def test_the_telling_line_of_a_jax_stack_trace(module, tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("ValueError: shapes\n--------------------\nFor simplicity, JAX has removed its internal frames\n\n")
    assert module[1].last_line(log) == "ValueError: shapes"


def test_it_starts_without_anything_installed():
    check = "import sys; sys.path.insert(0, sys.argv[1]); import sweep; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-S", "-c", check, str(LAUNCH)], check=False).returncode == 0
