"""The runs of a sweep: what they are, where each stands, and running them on this machine.

A run is one set of grid values and one seed, in a directory of its own; its log and the record of its last
attempt lie beside it. Where a run stands is read from disk and nowhere else, so any number of machines can
work on one sweep and a sweep can be stopped at any time. Standard library only, like all of launch/.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


class SweepError(Exception):
    """A mistake the user can mend; `str(error)` is one line that says how."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: grid `values`, a `seed`, a `workdir`, and the trainer's arguments after the interpreter."""

    values: tuple[tuple[str, str], ...]
    seed: int
    workdir: Path
    arguments: tuple[str, ...]

    @property
    def log(self) -> Path:
        """All output of every attempt, appended."""
        return self.workdir.with_name(self.workdir.name + ".log")

    @property
    def record(self) -> Path:
        """JSON of the last attempt: its arguments and its exit status (None while it runs)."""
        return self.workdir.with_name(self.workdir.name + ".json")


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a run stands: `word` is finished, failed, interrupted, running or waiting."""

    word: str
    step: int | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""


def directory_name(values: Sequence[tuple[str, str]]) -> str:
    """Names the directory of one grid point: readable, safe in a path, unique."""
    plain = ",".join(f"{key}={value}" for key, value in values) or "base"
    safe = re.sub(r"[^\w.,=+-]+", "_", plain, flags=re.ASCII)
    if safe == plain and len(plain) <= 120:
        return plain
    return f"{safe[:110]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an absent or half-written file reads as {}."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new text, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    partial.write_text(text)
    partial.replace(path)


def status(run: Run) -> Status:
    """Reads from disk where `run` stands."""
    result, record = read_json(run.workdir / "result.json"), read_json(run.record)
    if result.get("status") == "finished":
        return Status("finished", result.get("step"), result.get("metrics", {}))
    if not record:
        return Status("waiting")
    code = record.get("exit")
    if code is None:
        return Status("running")
    if record.get("stopped") or (code == 0 and result):
        return Status("interrupted", result.get("step"), reason=str(result.get("status", "stopped")))
    return Status("failed", reason=_reason(run, code))


def _reason(run: Run, code: int) -> str:
    if code == 0:
        return "ended without a result.json"
    killed = f"killed by signal {-code} after: " if code < 0 else ""
    return killed + last_line(run.log)


def last_line(log: Path) -> str:
    """Returns the last line of a log that says something (jax ends its stack traces with a note about itself)."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    telling = [line for line in lines if line.strip("-^~ ") and not line.startswith("For simplicity, JAX has removed")]
    return telling[-1] if telling else "no output"


def check_same_command(run: Run) -> None:
    """Refuses to take results made by other arguments for those of `run`."""
    made_by = read_json(run.record).get("arguments")
    if made_by is not None and made_by != list(run.arguments):
        raise SweepError(
            f"{run.workdir} was made by other arguments ({shlex.join(made_by)}); give another --out or delete it"
        )


def core_shares(jobs: int) -> list[list[int]]:
    """Splits the cores this process may use into `jobs` shares.

    Raises:
      SweepError: there are fewer cores than jobs.
    """
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = sorted(allowed(0))
    if jobs > len(cores):
        raise SweepError(f"--jobs {jobs} is more than this machine's cores; give at most {len(cores)}")
    return [cores[share::jobs] for share in range(jobs)]


def local_command(run: Run, interpreter: Sequence[str], cores: Sequence[int] | None) -> list[str]:
    """The full command of `run`; `cores` binds it to a share of the machine (XLA sizes its threads by that)."""
    bind = ["taskset", "-c", ",".join(map(str, cores))] if cores and shutil.which("taskset") else []
    return [*bind, *interpreter, *run.arguments]


class LocalRunner:
    """Runs on this machine, `jobs` at a time, each on its own cores; a run that fails does not stop the others."""

    def __init__(self, interpreter: Sequence[str], jobs: int, report: Callable[[Run], None]):
        self._interpreter, self._report = interpreter, report
        shares = core_shares(jobs)
        self._shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for share in shares:
            self._shares.put(share)
        self._jobs = jobs
        self._children: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run_all(self, runs: Sequence[Run]) -> None:
        """Runs everything; on SIGTERM or SIGINT the children are asked to save and end, and no run is started."""
        with self._forwarding_signals(), ThreadPoolExecutor(self._jobs) as pool:
            list(pool.map(self._run, runs))

    def _run(self, run: Run) -> None:
        cores = self._shares.get()
        try:
            if not self.stopped:
                self._attempt(run, cores if self._jobs > 1 else None)
                self._report(run)
        finally:
            self._shares.put(cores)

    def _attempt(self, run: Run, cores: list[int] | None) -> None:
        command = local_command(run, self._interpreter, cores)
        run.workdir.parent.mkdir(parents=True, exist_ok=True)
        with open(run.log, "ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._note(run, None)
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._children.add(child)
            if self.stopped:  # the signal came between the check in _run and here
                child.terminate()
            code = child.wait()
        self._children.discard(child)
        self._note(run, code)

    def _note(self, run: Run, code: int | None) -> None:
        record = {"arguments": list(run.arguments), "exit": code, "stopped": self.stopped}
        write_atomically(run.record, json.dumps(record) + "\n")

    def _stop(self, *_: object) -> None:
        self.stopped = True
        for child in list(self._children):
            child.terminate()

    @contextlib.contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
