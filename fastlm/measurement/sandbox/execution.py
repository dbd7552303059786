"""Runs one program through a given isolation, with a deadline, and judges how it ended.

Notable: nothing that a program prints is read at all (it goes to a file of limited size inside). The
only pipe that it could find carries the verdict; of that at most `RESULT_BYTES` are read. A pass is the
run's random token and nothing else on that pipe.
"""

import os
import secrets
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import Literal

from fastlm.measurement.sandbox import limits

RESULT_BYTES = 1 << 16

Status = Literal["passed", "failed", "timed_out", "memory", "crashed"]


class IsolationError(Exception):
    """The isolation could not be set up; nothing of the program was run."""


@dataclass(frozen=True)
class Outcome:
    """How one program ended.

    Attributes:
      status: `passed` (ran to its end), `failed` (an exception, or it left before its end), `timed_out`
        (wall clock or CPU), `memory` (MemoryError) or `crashed` (ended by a signal).
      error: type of the exception or name of the signal, empty where there is none. Written by the
        program's process: something to read, not to trust.
      message: last line of the exception's message, or the line that raised if it had none.
      seconds: wall time, with some hundredths for setting the isolation up.
    """

    status: Status
    error: str
    message: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.status == "passed"


def execute(command: list[str], source: str, timeout_seconds: float) -> Outcome:
    """Runs `source` through `command`, which ends in `supervisor.supervise`.

    Raises:
      IsolationError: the command failed before the program was started.
    """
    token = secrets.token_hex(limits.TOKEN_BYTES // 2).encode()
    started = time.monotonic()
    process = _start(command, token + source.encode("utf-8", "surrogatepass"))
    try:
        result, ended = _read(process.stdout.fileno(), started + timeout_seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its first process ends with it, and with that all others
        process.wait()
        with process.stdout, process.stderr:
            complaint = process.stderr.read().decode("utf-8", "replace")
    seconds = time.monotonic() - started
    if not ended:
        return Outcome("timed_out", "", f"no end after {timeout_seconds:g} s", seconds)
    return Outcome(*_verdict(result, token, process.returncode, complaint), seconds)


def _start(command: list[str], given: bytes) -> subprocess.Popen:
    # A file in memory: a pipe could block on a program that is longer than its buffer.
    with open(os.memfd_create("program"), "r+b", buffering=0) as file:
        file.write(given)
        file.seek(0)
        try:
            return subprocess.Popen(
                command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise IsolationError(str(error)) from None


def _read(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """Returns what came through the pipe, and whether it ended in time."""
    result = b""
    readable = select.poll()
    readable.register(pipe, select.POLLIN)
    while len(result) <= RESULT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not readable.poll(left * 1000):
            return result, False
        chunk = os.read(pipe, RESULT_BYTES)
        if not chunk:
            break
        result += chunk
    return result, True


def _verdict(result: bytes, token: bytes, exit_status: int, complaint: str) -> tuple[Status, str, str]:
    if len(result) > RESULT_BYTES:
        return "failed", "", "wrote where the result belongs"
    number = exit_status - limits.EXITED
    # The program cannot write to the pipe of complaints: what stands there was written before it started.
    if not 0 <= number <= signal.NSIG or (not number and not result and complaint):
        raise IsolationError((complaint.strip().splitlines() or [f"exit status {exit_status}"])[-1])
    if number == signal.SIGXCPU:
        return "timed_out", "SIGXCPU", "used up its CPU time"
    if number:
        return "crashed", _signal_name(number), "ended by a signal"
    if result == token:
        return "passed", "", ""
    if not result:
        return "failed", "", "left before its end"
    error, _, message = result.decode("utf-8", "replace").partition("\n")
    return ("memory" if error == "MemoryError" else "failed"), error, message


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names of their own
        return f"signal {number}"
