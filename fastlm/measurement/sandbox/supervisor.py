"""Inside the isolation: limits one program, runs it, and says how it ended. Standard library only.

Runs as process 1 of the new pid namespace, by path and not as part of the package (what runs here
sees the standard library and nothing else). The program runs in a forked child without any
privilege; when process 1 ends, the kernel ends whatever the child left behind.

Descriptor 0 holds a token of `limits.TOKEN_BYTES` and then the program; descriptor 1 takes the token back if
the program ran to its end, else a report. The token is never given a name: while the program runs it
waits on the interpreter's value stack, which neither frames nor the garbage collector show, and the
function that will write it has been looked up already; an exception drops it. So neither leaving early nor
replacing functions nor searching frames and modules makes a pass. A program that reads its own raw
memory, or has a tracer jump over lines, can still forge one: it shares a process with its tests, which
no token can mend.
"""

import ctypes
import os
import resource
import signal
import sys
import types
from typing import NoReturn

import limits
import system_calls

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Calls a C function that returns 0, else raises `OSError` with the function's name."""
    if getattr(_libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends."""
    call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def supervise(memory_bytes: int, cpu_seconds: int) -> NoReturn:
    """Runs the program of descriptor 0 in a child and exits as `limits.EXITED` says."""
    die_with_parent()
    call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program cannot trace this process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which process 1 does not get from its own namespace
    os.chdir(limits.FOLDER)
    program = os.fork()
    if program == 0:
        _drop_privileges()
        _limit(memory_bytes, cpu_seconds)
        _run()
    ended, status = os.wait()
    while ended != program:  # orphans come to process 1
        ended, status = os.wait()
    os._exit(limits.EXITED + max(0, -os.waitstatus_to_exitcode(status)))


def _drop_privileges() -> None:
    os.setresgid(limits.NOBODY, limits.NOBODY, limits.NOBODY)
    os.setresuid(limits.NOBODY, limits.NOBODY, limits.NOBODY)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    calls = system_calls.without_ipc(os.uname().machine)
    call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(calls), 0, 0)
    die_with_parent()  # a change of user had cancelled it


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    most = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_NPROC: limits.PROCESSES,
        resource.RLIMIT_FSIZE: limits.FILE_BYTES,
        resource.RLIMIT_NOFILE: limits.OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in most.items():
        _set_limit(limit, value, value)
    # At the soft limit comes SIGXCPU, which tells running out of time from being killed.
    _set_limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)


def _set_limit(limit: int, soft: int, hard: int) -> None:
    allowed = resource.getrlimit(limit)[1]
    if allowed != resource.RLIM_INFINITY:
        soft, hard = min(soft, allowed), min(hard, allowed)
    resource.setrlimit(limit, (soft, hard))


def _run() -> NoReturn:
    result = os.dup(1)
    source = _source()
    try:
        os.write(result, os.pread(0, limits.TOKEN_BYTES, 0) + _execute(source))
    except MemoryError:
        os.write(result, b"MemoryError")  # there may be no memory left to describe it
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures too
        os.write(result, _described(error, source))
    os._exit(0)


def _source() -> str:
    os.lseek(0, limits.TOKEN_BYTES, os.SEEK_SET)
    with open(0, "rb", buffering=0, closefd=False) as given:
        return given.readall().decode("utf-8", "surrogatepass")


def _execute(source: str) -> bytes:
    """Runs the program to its end and returns nothing."""
    nothing = os.open("/dev/null", os.O_RDONLY)
    printed = os.memfd_create("printed")  # a file, so that the limit of a file's size holds for output
    for target, descriptor in ((0, nothing), (1, printed), (2, printed)):
        os.dup2(descriptor, target)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv, sys.path = ["program"], sys.path[1:]
    os.environ.clear()
    exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    return b""


def _described(error: BaseException, source: str) -> bytes:
    lines = str(error).strip().splitlines() or [_failing_line(error, source)]
    text = f"{type(error).__name__}\n{lines[-1][: limits.SHOWN_CHARACTERS]}"
    return text.encode("utf-8", "backslashreplace")


def _failing_line(error: BaseException, source: str) -> str:
    """Returns the program's line that raised, which says more than an assertion without a message."""
    number, traceback = 0, error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == "<program>":
            number = traceback.tb_lineno
        traceback = traceback.tb_next
    return source.split("\n")[number - 1].strip() if number else ""


def main(arguments: list[str]) -> NoReturn:
    """Entry point under bubblewrap, which has made the namespaces: bytes of memory, seconds of CPU."""
    memory_bytes, cpu_seconds = arguments
    supervise(int(memory_bytes), int(cpu_seconds))
