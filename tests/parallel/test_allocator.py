"""Freed memory stays with the process, where the C library can be told to keep it."""

import platform
import subprocess
import sys

PROGRAM = """
import resource
import numpy as np
from fastlm.parallel.allocator import keep_freed_memory
took = keep_freed_memory() if {keep} else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(4_000_000)
before = faults()
for _ in range(10):
    np.ones(4_000_000)
print(took, faults() - before)
"""


def page_faults(keep: bool) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True)
    took, faults = done.stdout.split()
    return took, int(faults)


def test_large_arrays_are_not_faulted_in_anew():
    took, faults = page_faults(keep=True)
    glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    assert took == str(glibc)
    if glibc:
        assert faults < page_faults(keep=False)[1] / 2
