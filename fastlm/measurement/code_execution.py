"""Running generated Python: every program in isolation, several at a time; and whether a text compiles at all.

Each program gets namespaces of its own (users, processes, mounts, network, IPC), no privilege, an empty
environment, the standard library and an empty folder in memory; all else is read-only or not
there. Limits: wall clock, CPU, address space, processes, open files, sizes of files (`sandbox.limits`); no System V
IPC, whose memory those limits would not count (`sandbox.system_calls`).

Defended: the machine's files, processes, network and secrets; endless loops, fork bombs, memory hogs,
floods of output; a pass claimed by leaving early or by replacing or searching functions, frames and modules.
Not defended: holes in the kernel; a program that reads its own raw memory for the token, lies in `__eq__`
or comments out its tests (it shares a process with them). The memory limit holds for each of at most
`limits.PROCESSES` processes, not for their sum nor for memory that the kernel holds behind descriptors:
that would take control groups, which a user usually may not make.
"""

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fastlm.errors import UserError
from fastlm.measurement.sandbox import isolation
from fastlm.measurement.sandbox.execution import IsolationError, Outcome, execute

__all__ = ["Outcome", "compiles", "run_tests"]

MINIMUM_MEMORY = 64 << 20  # below it the interpreter itself has no room
# The compiler recurses in C: from about 400,000 characters on, nested comprehensions overflow a stack of 8 MiB.
_CHARACTERS_IN_PROCESS = 1 << 16
_COMPILE_SECONDS = 10.0
_COMPILE = """
import sys
compile(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"), "<program>", "exec", dont_inherit=True)
"""


def run_tests(
    programs: Sequence[str], *, timeout_seconds: float = 5.0, memory_bytes: int = 1 << 30, workers: int | None = None
) -> list[Outcome]:
    """Runs untrusted programs, each with its tests, each in isolation; returns their outcomes in order.

    A program passes if it runs to its end: tests raise. Starting the isolation counts as wall time.

    Args:
      programs: Python sources.
      timeout_seconds: wall time of each program; a second more of CPU.
      memory_bytes: address space of each process of a program.
      workers: programs at a time; the number of CPUs by default.

    Raises:
      UserError: the machine has no way to isolate (nothing was run then), or no room for another program.
    """
    if timeout_seconds <= 0 or (workers is not None and workers < 1):
        raise UserError(f"timeout_seconds={timeout_seconds} and workers={workers} must be positive")
    if memory_bytes < MINIMUM_MEMORY:
        raise UserError(f"memory_bytes={memory_bytes} is too little for Python: give at least {MINIMUM_MEMORY}")
    if not programs:
        return []
    command = isolation.find()(memory_bytes, math.ceil(timeout_seconds) + 1)
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            return list(pool.map(lambda source: execute(command, source, timeout_seconds), programs))
    except IsolationError as error:
        raise UserError(f"a program could not be isolated ({error}): try again with fewer workers") from None


def compiles(source: str) -> bool:
    """Returns whether the text is valid Python; nothing of it is run.

    Long texts are compiled in a process of their own, because they can crash the compiler or keep it
    busy: such texts, and those that take over ten seconds, do not compile.
    """
    if len(source) > _CHARACTERS_IN_PROCESS:
        return _compiles_apart(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes and the like
            compile(source, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True


def _compiles_apart(source: str) -> bool:
    given = source.encode("utf-8", "surrogatepass")
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _COMPILE]
    try:
        done = subprocess.run(
            command, input=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
