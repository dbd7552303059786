"""A copy of launch/ in an empty root, and stub programs that record what they were called with."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


class Root:
    """A repository root of its own with a folder of stub programs that come first on PATH."""

    def __init__(self, path: Path):
        self.path, self.stubs, self.calls = path / "root", path / "stubs", path / "calls"
        shutil.copytree(REPOSITORY / "launch", self.path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        self.stubs.mkdir()
        # No variable of the machine that runs the tests may reach the scripts.
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FASTLM_", "TPU_", "SLURM_", "JAX_PLATFORMS"))
        }
        self.environment |= {"PATH": f"{self.stubs}:{os.environ['PATH']}", "CALLS": str(self.calls)}

    def stub(self, name: str, body: str = "") -> Path:
        """Makes a program that appends its name and arguments to `calls`, a line each call, then does `body`."""
        program = self.stubs / name
        record = f'printf \'%s\' \'{name}\' >>"$CALLS"; printf \' <%s>\' "$@" >>"$CALLS"; echo >>"$CALLS"\n'
        program.write_text(f"#!/usr/bin/env bash\n{record}{body}\n")
        program.chmod(0o755)
        return program

    def recorded(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def start(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd or self.path,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*command, cwd=cwd, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def assert_one_line_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.fixture
def one_line_error():
    return assert_one_line_error
