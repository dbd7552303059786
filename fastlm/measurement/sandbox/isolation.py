"""Finds a way of isolation that truly works on this machine: bubblewrap, or namespaces made by `namespaces`.

Each is tried once with a program that attacks what the isolation promises (`PROBE`), so that a kernel or
container that takes away one of the promises is found out before generated code is run: nothing then
runs at all. Bubblewrap comes first because some distributions let only it make namespaces; for root it
does not hold back a fork bomb (it maps one user, and root's processes are not limited), which the
probe notices.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from fastlm.errors import UserError
from fastlm.measurement.sandbox import limits
from fastlm.measurement.sandbox.execution import IsolationError, Outcome, execute

PROBE_SECONDS = 20.0
PROBE_MEMORY = 512 << 20
# What an interpreter and its libraries need, where there is such a path.
SYSTEM_PATHS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
PROBE = f"""
import ctypes, json, os, signal, socket, tempfile
assert not os.environ, "the environment is not empty"
for folder in ("/", "/usr", os.path.dirname(os.__file__)):
    try:
        open(os.path.join(folder, "fastlm-probe"), "w")
    except OSError:
        continue
    raise AssertionError(folder + " can be written to")
with tempfile.TemporaryFile() as file:
    file.write(json.dumps([1]).encode())
try:
    socket.create_connection(("192.0.2.1", 9), timeout=0.1)
except TimeoutError:
    raise AssertionError("the network can be reached") from None
except OSError:
    pass
libc = ctypes.CDLL(None)
assert libc.unshare(0x10000000) != 0, "further user namespaces can be made"
for made in (libc.shmget(0, 1, 0o1600), libc.semget(0, 1, 0o1600), libc.msgget(0, 0o1600)):
    assert made < 0, "memory can be kept that is not limited (System V IPC)"
for _ in range({limits.PROCESSES} + 1):
    try:
        if os.fork() == 0:
            while True:
                signal.pause()
    except OSError:
        break
else:
    raise AssertionError("the number of processes is not limited")
"""

_HERE = Path(__file__).parent
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import {0}; {0}.main(sys.argv[2:])"
Isolation = Callable[[int, int], list[str]]


def through_bubblewrap(memory_bytes: int, cpu_seconds: int) -> list[str]:
    """Returns the command that isolates by bubblewrap (`bwrap`, at least 0.8).

    Raises:
      IsolationError: it is not on PATH.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise IsolationError("bwrap is not on PATH")
    user = str(limits.NOBODY)
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", user, "--gid", user]
    options += ["--cap-drop", "ALL", "--die-with-parent", "--as-pid-1"]
    options += ["--size", str(limits.FOLDER_BYTES), "--perms", "1777", "--tmpfs", limits.FOLDER]
    for path in visible_paths():
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for device in limits.DEVICES:
        options += ["--dev-bind", device, device]
    options += ["--ro-bind", str(_HERE), "/.fastlm", "--remount-ro", "/"]
    return [program, *options, *_python("supervisor", "/.fastlm"), str(memory_bytes), str(cpu_seconds)]


def through_namespaces(memory_bytes: int, cpu_seconds: int) -> list[str]:
    """Returns the command that isolates by namespaces, without any other program."""
    return [*_python("namespaces", str(_HERE)), str(memory_bytes), str(cpu_seconds), *visible_paths()]


ISOLATIONS: dict[str, Isolation] = {"bubblewrap": through_bubblewrap, "namespaces": through_namespaces}


def visible_paths() -> list[str]:
    """Returns what a program can see of this machine's file system, read-only: system folders and Python's own."""
    paths = [path for path in SYSTEM_PATHS if os.path.exists(path)]
    prefix = os.path.realpath(sys.base_prefix)
    if not any(Path(prefix).is_relative_to(path) for path in paths):
        paths.append(prefix)
    return paths


def _python(module: str, folder: str) -> list[str]:
    # The interpreter under a virtual environment, without site packages, variables or the working folder.
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return [python, "-I", "-S", "-c", _BOOT.format(module), folder]


def probe(isolation: Isolation) -> None:
    """Checks that the isolation works and keeps its promises.

    Raises:
      IsolationError: it does not; says why.
    """
    outcome = execute(isolation(PROBE_MEMORY, int(PROBE_SECONDS)), PROBE, PROBE_SECONDS)
    if not outcome.passed:
        raise IsolationError(_reason(outcome))


def _reason(outcome: Outcome) -> str:
    return " ".join(part for part in (outcome.status, outcome.error, outcome.message) if part)


@functools.cache
def find() -> Isolation:
    """Returns the first isolation that works here; tried once in a process.

    Raises:
      UserError: none works: says why each did not, and what to install.
    """
    if sys.platform != "linux":
        raise UserError(f"generated code is run on Linux only (this is {sys.platform}): score it without running it")
    reasons = []
    for name, isolation in ISOLATIONS.items():
        try:
            probe(isolation)
        except IsolationError as error:
            reasons.append(f"{name}: {error}")
        else:
            return isolation
    raise UserError(
        f"generated code cannot be isolated on this machine ({'; '.join(reasons)}), so it is not run: "
        "install bubblewrap 0.8 or newer (apt install bubblewrap), let users make namespaces, or score without running"
    )
