"""Trainings as processes of their own: what experiments over many runs are made of.

A finished run leaves `result.json`; one that was stopped goes on when it is started again with the same arguments.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastlm.errors import UserError

TRAINER = ("-m", "fastlm.train")


class Outcome(NamedTuple):
    """What a finished training says of itself; memory is the peak of the process that ended it, in MiB."""

    metrics: dict[str, Any]
    step_seconds: float
    peak_memory: float


def train(arguments: Sequence[str], workdir: Path) -> Outcome | None:
    """Trains, printing into WORKDIR.log (all attempts appended); None if it did not finish, with the reason there."""
    log_file = log_of(workdir)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        command = [sys.executable, *TRAINER, *arguments, f"--workdir={workdir}"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            # Not `wait`: this also says what memory this one child had, of which no other way remains at its end.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()  # it saves and ends; the same command resumes
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    result = workdir / "result.json"
    if process.returncode or not result.is_file():
        return None
    metrics = json.loads(result.read_text())["metrics"]
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Outcome(metrics, median_step(workdir / "metrics.jsonl"), memory)


def seed(text: str) -> int:
    """Returns one of `--seeds`.

    Raises:
      UserError: not a whole number.
    """
    if not text.isdecimal():
        raise UserError(f"--seeds: '{text}' is no whole number")
    return int(text)


def log_of(workdir: Path) -> Path:
    """Returns the file that a run prints into."""
    return workdir.with_name(workdir.name + ".log")


def median_step(path: Path) -> float:
    """Returns the median seconds of a step over log intervals; the first one compiles and does not count."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    seconds = [row["train/step_seconds"] for row in rows if "train/step_seconds" in row]
    return statistics.median(seconds[1:] or seconds)
