"""launch/tpu_pod.sh: the printed plan word for word, that the plan is what happens, and a run on a pretended worker."""

import sys

import pytest

POD = {"TPU_NAME": "pod", "TPU_ZONE": "eu-4"}
TRAIN = ("--", "-m", "fastlm.train", "--config", "configs/x.py", "--workdir", "gs://b/w")

# `describe` fails until `create` was called; copies and commands happen in a folder that plays the worker's home.
GCLOUD = """
case "$3 $4" in
  "queued-resources describe") [ -e "$CALLS.pod" ] || exit 1; echo ACTIVE ;;
  "queued-resources create") touch "$CALLS.pod" ;;
  "tpu-vm scp") mkdir -p "$CALLS.home"; cp "$5" "$CALLS.home/${6#*:}" ;;
  "tpu-vm ssh") cd "$CALLS.home" && exec bash -c "$9" ;;
esac
"""


@pytest.fixture
def pod(root):
    root.stub("gcloud", GCLOUD)
    root.environment |= POD
    return root


def test_dry_run_prints_the_plan(pod):
    options = ("--dry-run", "--spot", "--type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite")
    result = pod.run("launch/tpu_pod.sh", "up", *options, *TRAIN)
    assert result.stdout.splitlines() == [
        "gcloud compute tpus queued-resources describe pod --format 'value(state.state)' --zone eu-4",
        "gcloud compute tpus queued-resources create pod --node-id pod --accelerator-type v5litepod-16 "
        "--runtime-version v2-alpha-tpuv5-lite --spot --zone eu-4",
        "gcloud compute tpus queued-resources describe pod --format 'value(state.state)' --zone eu-4",
        "mkdir -p runs",
        "tar -czf runs/code.tar.gz --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./data "
        "--exclude=__pycache__ .",
        "gcloud compute tpus tpu-vm scp runs/code.tar.gz pod:code.tar.gz --worker all --zone eu-4",
        "gcloud compute tpus tpu-vm ssh pod --worker all --command 'mkdir -p fastlm/.run && cd fastlm && "
        'if [ -f .run/pid ] && kill -0 "$(cat .run/pid)" 2>/dev/null; then echo "still running: follow or stop it"; '
        "else rm -f .run/status && tar -xzf ../code.tar.gz && { python3.11 -c '\\''import ensurepip'\\'' || "
        "{ sudo apt-get -qq update && sudo apt-get -qqy install python3.11 python3.11-venv; }; } && "
        "{ setsid nohup bash -c '\\''trap : TERM; env FASTLM_ACCELERATOR=tpu FASTLM_PYTHON=python3.11 "
        "FASTLM_MULTIHOST=1 launch/local.sh -m fastlm.train --config configs/x.py --workdir gs://b/w ; "
        "echo $? >.run/status'\\'' >.run/log 2>&1 </dev/null & echo $! >.run/pid; }; fi' --zone eu-4",
        "gcloud compute tpus tpu-vm ssh pod --worker 0 --command 'cd fastlm && "
        'tail -n +1 --pid="$(cat .run/pid)" -F .run/log; exit "$(cat .run/status)"\' --zone eu-4',
    ]
    assert (result.returncode, result.stderr) == (0, "")
    assert pod.recorded() == []
    assert not (pod.path / "runs").exists()


def test_other_commands_in_dry_run(pod):
    def plan(*words: str) -> list[str]:
        return pod.run("launch/tpu_pod.sh", words[0], "--dry-run", *words[1:]).stdout.splitlines()

    ssh = "gcloud compute tpus tpu-vm ssh pod --worker"
    assert plan("stop") == [f"""{ssh} all --command 'kill -TERM -- "-$(cat fastlm/.run/pid)"' --zone eu-4"""]
    assert plan("delete", "--zone", "us-1") == [
        "gcloud compute tpus queued-resources delete pod --force --quiet --zone us-1"
    ]
    assert plan("fetch", "--workers", "2", "--", "runs/my sweep") == [
        "mkdir -p runs",
        "gcloud compute tpus tpu-vm scp --recurse 'pod:fastlm/runs/my sweep' runs --worker 0 --zone eu-4",
        "gcloud compute tpus tpu-vm scp --recurse 'pod:fastlm/runs/my sweep' runs --worker 1 --zone eu-4",
    ]
    assert "MULTIHOST" not in plan("run", "--alone", "--worker", "3", *TRAIN)[-1]


@pytest.fixture
def worker(pod):
    """The pod, with a launch/local.sh that shows its arguments and what it was told by the environment."""
    pod.stub("sudo")
    (pod.path / "launch/local.sh").unlink()
    body = """
trap 'echo saved; kill $! 2>/dev/null; exit 5' TERM  # the group's signal may have ended sleep
echo "$FASTLM_ACCELERATOR ${FASTLM_MULTIHOST:-alone} ${TPU_PROCESS_BOUNDS:-all}"
printf '<%s>\\n' "$@"
sleep "${RUN_SECONDS:-0}" & wait $!
exit 3
"""
    pod.stub("local.sh", body).rename(pod.path / "launch/local.sh")
    return pod


def test_the_plan_is_what_happens_and_arguments_survive_two_shells(worker):
    options = ("--type", "v4-8", "--version", "v2", "--python", sys.executable, "--", "it's", "a  b", "$HOME;", "")
    result = worker.run(worker.path / "launch/tpu_pod.sh", "up", *options, cwd=worker.path.parent)
    assert result.returncode == 3, result.stderr
    assert result.stdout.splitlines() == ["tpu 1 all", "<it's>", "<a  b>", "<$HOME;>", "<>"]
    real = [line for line in worker.recorded() if line.startswith("gcloud")]
    for leftover in (worker.calls, worker.calls.with_name("calls.pod")):
        leftover.unlink()
    plan = worker.run("launch/tpu_pod.sh", "up", "--dry-run", *options).stdout
    worker.run("bash", "-c", plan)
    assert [line for line in worker.recorded() if line.startswith("gcloud")] == real


def test_a_pod_that_exists_is_reused(pod):
    pod.calls.with_name("calls.pod").touch()
    assert pod.run("launch/tpu_pod.sh", "create", "--type", "v4-8", "--version", "v2").returncode == 0
    assert not [line for line in pod.recorded() if "<create>" in line]


def test_a_second_run_leaves_the_first_alone_and_stop_lets_it_save(worker):
    def pod(*words: str, **variables: str):
        return worker.run("launch/tpu_pod.sh", words[0], "--python", sys.executable, *words[1:], **variables)

    pod("run", "--alone", "--", "x", RUN_SECONDS="30")
    second = pod("run", "--", "y", RUN_SECONDS="30")
    assert second.stdout == "still running: follow or stop it\n"
    followed = worker.start("launch/tpu_pod.sh", "follow")
    assert [followed.stdout.readline() for _ in range(2)] == ["tpu alone 1,1,1\n", "<x>\n"]
    assert pod("stop").returncode == 0
    out, _ = followed.communicate(timeout=20)
    assert (followed.returncode, out) == (5, "saved\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "needs a command"),
        (["fly"], "'fly'"),
        (["run"], "nothing to run"),
        (["up", "--type", "v4-8", "--version", "v2"], "nothing to run"),
        (["create"], "--type and --version"),
        (["run", "-m", "x"], "'-m'"),
        (["follow", "--worker", "one"], "'one'"),
        (["fetch", "--workers", "0", "--", "x"], "at least 1"),
        (["fetch"], "one path"),
        (["stop", "--name", ""], "--name and --zone"),
    ],
)
def test_bad_arguments(pod, one_line_error, arguments: list[str], part: str):
    one_line_error(pod.run("launch/tpu_pod.sh", *arguments), "tpu_pod.sh", part)
    assert pod.recorded() == []
