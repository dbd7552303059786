"""Trainings as processes of their own: what experiments over many runs are made of.

A finished run leaves `result.json`; one that was stopped goes on when it is started again with the same arguments.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastlm.errors import UserError

TRAINER = ("-m", "fastlm.train")


class Outcome(NamedTuple):
    """What a finished training says of itself; memory is the peak of the process that ended it, in MiB."""

    metrics: dict[str, Any]
    peak_memory: float


def train(arguments: Sequence[str], workdir: Path) -> Outcome | None:
    """Trains, printing into WORKDIR.log (all attempts appended); None if it did not finish, with the reason there."""
    ((_, outcome),) = train_each([(arguments, workdir)])
    return outcome


def train_each(
    trainings: Sequence[tuple[Sequence[str], Path]], at_once: int = 1
) -> Iterator[tuple[int, Outcome | None]]:
    """Trains each of these (arguments, workdir) and yields its place and outcome, as they end.

    `at_once` trainings run side by side, each on its own share of the cores where the system can do that (Linux): small
    models use one core better than two. What a step of theirs takes then says nothing about a machine of their own.
    """
    waiting = list(enumerate(trainings))[::-1]
    free = _shares(at_once)
    running: dict[int, tuple[int, Path, set[int], subprocess.Popen]] = {}
    try:
        while waiting or running:
            while waiting and free:
                place, (arguments, workdir) = waiting.pop()
                cores = free.pop()
                process = _start(arguments, workdir, cores)
                running[process.pid] = place, workdir, cores, process
            pid, status, usage = _first_to_end(running)
            place, workdir, cores, process = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            free.append(cores)
            yield place, _outcome(process, workdir, usage)
    finally:
        for *_, process in running.values():
            process.terminate()  # it saves and ends; the same command resumes
        for *_, process in running.values():
            process.wait()


def _shares(count: int) -> list[set[int]]:
    """So many sets of cores; more trainings than cores share them all."""
    if count < 2 or not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(count)]
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[n::count]) or set(cores) for n in range(count)]


def _start(arguments: Sequence[str], workdir: Path, cores: set[int]) -> subprocess.Popen:
    log_file = log_of(workdir)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *TRAINER, *arguments, f"--workdir={workdir}"]
    mine = os.sched_getaffinity(0) if cores else set()
    with log_file.open("ab") as log:
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # of this thread, and of what it starts
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        finally:
            if cores:
                os.sched_setaffinity(0, mine)


def _first_to_end(pids: Collection[int]) -> tuple[int, int, Any]:
    """Waits; not by `Popen.wait`, for this also says what memory this one child had, which nothing else does."""
    while True:
        for pid in pids:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                return ended, status, usage
        time.sleep(0.1)


def _outcome(process: subprocess.Popen, workdir: Path, usage: Any) -> Outcome | None:
    result = workdir / "result.json"
    if process.returncode or not result.is_file():
        return None
    metrics = json.loads(result.read_text())["metrics"]
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Outcome(metrics, memory)


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
