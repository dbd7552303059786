""".ci/check_skips.py on reports that pytest itself wrote."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / ".ci/check_skips.py"
TESTS = """
import pytest
def test_runs(): pass
@pytest.mark.skip(reason="needs a GPU,\\n  really")
def test_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_expected_to_fail(): assert False
"""
SKIP = "test_some::test_skipped\tneeds a GPU, really\n"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_some.py"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "report.xml"


def check(tmp_path: Path, listed: str, *reports: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "skips.txt").write_text(listed)
    command = [sys.executable, CHECK, tmp_path / "skips.txt", *reports]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_passes_when_the_lists_agree(tmp_path: Path, report: Path):
    result = check(tmp_path, "# comment\n\n" + SKIP, report)
    assert (result.returncode, result.stdout) == (0, "the skips are as listed: 1\n")


@pytest.mark.parametrize(
    ("listed", "part"),
    [
        ("", "skipped, but not in"),
        (SKIP + "test_some::test_runs\tno\n", "but not skipped: test_some::test_runs\tno"),
        (SKIP.replace("GPU", "TPU"), "skipped, but not in"),
    ],
)
def test_fails_when_they_differ(tmp_path: Path, report: Path, listed: str, part: str):
    result = check(tmp_path, listed, report)
    assert result.returncode == 1 and part in result.stdout


def test_fails_without_a_report(tmp_path: Path, report: Path):
    result = check(tmp_path, SKIP, report, tmp_path / "none.xml")
    assert result.returncode == 1 and "none.xml" in result.stdout
