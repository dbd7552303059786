"""launch/local.sh with a stub in place of Python and pip: when it installs, what it installs, what it runs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

# As `python3` it makes a .venv whose python is itself; `pip` fails or waits as told; anything else is "the program".
PYTHON = """
case "$1 $2" in
  "-c import sys;"*) echo "${STUB_VERSION:-3.12}" ;;
  "-m venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip") sleep "${STUB_WAIT:-0}"; [ -z "$STUB_FAIL" ] || { echo "pip: no such package" >&2; exit 1; } ;;
  *) echo "in $PWD on ${JAX_PLATFORMS-unset}:"; printf '<%s>\\n' "$@"; exit "${STUB_EXIT:-0}" ;;
esac
"""


@pytest.fixture
def project(root):
    root.stub("python3", PYTHON)
    (root.path / "requirements.txt").write_text("jax>=1\n")
    return root


def installs(project) -> list[str]:
    return [line for line in project.recorded() if "<pip>" in line]


def test_installs_once_and_passes_arguments_and_status_on(project):
    first = project.run("launch/local.sh", "-m", "x", "a b", "it's", "", STUB_EXIT="7")
    assert first.returncode == 7
    assert first.stdout == f"in {project.path} on cpu:\n<-m>\n<x>\n<a b>\n<it's>\n<>\n"
    assert first.stderr.count("\n") == 1 and "installing" in first.stderr
    second = project.run("launch/local.sh", "-m", "x")
    assert (second.returncode, second.stderr) == (0, "")
    assert installs(project) == [
        "python3 <-m> <pip> <install> <--quiet> <--disable-pip-version-check> <-r> <requirements.txt>"
    ]


def test_runs_in_the_root_from_anywhere(project, tmp_path: Path):
    result = project.run(project.path / "launch/local.sh", "x", cwd=tmp_path)
    assert result.stdout.startswith(f"in {project.path} on")


def test_installs_again_when_requirements_change(project):
    project.run("launch/local.sh", "x")
    (project.path / "requirements.txt").write_text("jax>=2\n")
    project.run("launch/local.sh", "x")
    project.run("launch/local.sh", "x")
    assert len(installs(project)) == 2


@pytest.mark.parametrize(("accelerator", "extra"), [("cuda", "jax[cuda13]"), ("tpu", "jax[tpu]")])
def test_accelerator_picks_the_extra_and_is_remembered(project, accelerator: str, extra: str):
    project.run("launch/local.sh", "x")
    result = project.run("launch/local.sh", "x", FASTLM_ACCELERATOR=accelerator)
    assert "on unset:" in result.stdout
    assert project.run("launch/local.sh", "x").stdout == result.stdout, "unset keeps what .venv has"
    assert [line.endswith(f"<requirements.txt> <{extra}>") for line in installs(project)] == [False, True]
    assert "on cpu:" in project.run("launch/local.sh", "x", FASTLM_ACCELERATOR="cpu").stdout
    assert len(installs(project)) == 3


def test_a_platform_of_the_users_own_is_kept(project):
    assert "on tpu,cpu:" in project.run("launch/local.sh", "x", JAX_PLATFORMS="tpu,cpu").stdout


def test_another_interpreter_means_another_environment(project):
    project.run("launch/local.sh", "x")
    other = project.stub("other", PYTHON)
    project.run("launch/local.sh", "x", FASTLM_PYTHON=str(other))
    assert project.run("launch/local.sh", "x").stderr == "", "unset keeps the interpreter of .venv"
    assert len(installs(project)) == 2


def test_a_relative_interpreter_is_relative_to_the_callers_directory(project):
    project.stub("mine", PYTHON)
    result = project.run(project.path / "launch/local.sh", "x", cwd=project.path.parent, FASTLM_PYTHON="stubs/mine")
    assert result.returncode == 0
    assert (project.path / ".venv/installed.txt").read_text().splitlines()[1] == f"{project.path.parent}/stubs/mine"


def test_errors_are_one_line_before_anything_is_made(project, one_line_error):
    one_line_error(project.run("launch/local.sh", "x", STUB_VERSION="3.10"), "3.10", "3.11 to 3.13", "FASTLM_PYTHON")
    one_line_error(project.run("launch/local.sh", "x", STUB_VERSION="3.14"), "3.14")
    one_line_error(project.run("launch/local.sh", "x", FASTLM_PYTHON="nowhere"), "nowhere", "does not run")
    one_line_error(project.run("launch/local.sh", "x", FASTLM_ACCELERATOR="gpu"), "gpu", "cpu, cuda or tpu")
    assert not (project.path / ".venv").exists()


def test_a_failed_install_shows_pips_words_and_is_redone(project):
    failed = project.run("launch/local.sh", "x", STUB_FAIL="yes")
    assert failed.returncode == 2 and failed.stdout == ""
    assert "pip: no such package" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert project.run("launch/local.sh", "x").returncode == 0
    assert len(installs(project)) == 2


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_install_is_redone(project, blow: signal.Signals):
    process = project.start("launch/local.sh", "x", STUB_WAIT="30")
    wait_until(lambda: installs(project))
    os.killpg(process.pid, blow)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert (project.path / ".venv/bin/python").exists(), "half made"
    again = project.run("launch/local.sh", "x")
    assert again.returncode == 0 and "installing" in again.stderr
    assert len(installs(project)) == 2


def test_two_first_uses_at_once_install_once(project):
    both = [project.start("launch/local.sh", "x", STUB_WAIT="1") for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, out.splitlines()[-1]) == (0, "<x>")
    assert len(installs(project)) == 1


def test_requirements_admit_no_tensorflow_and_bound_everything_on_both_sides():
    text = (Path(__file__).resolve().parents[2] / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) > 15
    for line in lines:
        assert ">=" in line and ",<" in line, line
        assert line.split(">=")[0] not in {"tensorflow", "torch"}


def test_shell_scripts_parse():
    launch = Path(__file__).resolve().parents[2] / "launch"
    for script in sorted(launch.glob("*.sh")):
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, script
