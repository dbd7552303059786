"""Takes away the system calls of System V IPC, by which a program keeps memory that no limit of a process counts.

What `shmget`, `semget` and `msgget` make belongs to the IPC namespace: a program that lets go of a segment and
makes the next holds gigabytes within a small address space. A seccomp filter (`man 2 seccomp`) answers that
there is no such call. Calls numbered in another way (of 32 bits, x32) are answered so altogether: they would
pass by the numbers below. Standard library only, by path, as all that runs inside.
"""

import ctypes
import errno
import struct

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of a 32-bit word; jumps go to (true, false)
_INSTRUCTION, _SIZE = "=HBBI", 8  # struct sock_filter: code, jumps where true and false, value
_NUMBER, _ARCHITECTURE = 0, 4  # places in struct seccomp_data
_ALLOW, _FAIL = 0x7FFF0000, 0x50000 | errno.ENOSYS
_X32 = 0x40000000
_GENERIC = (186, 190, 194)
# By machine: what the kernel calls it, and its numbers of msgget, semget and shmget.
REFUSED = {
    "x86_64": (0xC000003E, (68, 64, 29)),
    "aarch64": (0xC00000B7, _GENERIC),
    "riscv64": (0xC00000F3, _GENERIC),
}


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def without_ipc(machine: str) -> Program:
    """Returns the filter for a machine as `os.uname` names it, for prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER).

    Raises:
      OSError: the numbers of its calls are not known.
    """
    if machine not in REFUSED:
        raise OSError(errno.ENOSYS, f"seccomp: the numbers of the system calls of {machine} are not known")
    instructions = _instructions(*REFUSED[machine])
    return Program(len(instructions) // _SIZE, instructions)


def _instructions(architecture: int, numbers: tuple[int, ...]) -> bytes:
    checks = [(_AT_LEAST, _X32), *((_EQUAL, number) for number in numbers)]
    lines = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 0, len(checks) + 2, architecture), (_LOAD, 0, 0, _NUMBER)]
    # The last two lines are what a check that holds jumps to, and what none of them leads to.
    lines += [(code, len(checks) - place, 0, value) for place, (code, value) in enumerate(checks)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _FAIL)]
    return b"".join(struct.pack(_INSTRUCTION, *line) for line in lines)
