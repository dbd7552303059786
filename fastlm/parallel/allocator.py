"""Keeps freed host memory for the next step instead of handing it back to the kernel.

Notable: on CPU, XLA allocates every large temporary with malloc, and glibc gives buffers above a threshold
back at once: each step then faults all its pages in anew, which costs more than any one operation
of a small model. The settings are those of MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_ and
MALLOC_ARENA_MAX (man mallopt), made at run time so that nobody has to know them.
Left out: other C libraries (macOS, musl), where nothing is changed.
"""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # <malloc.h>


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; call before the first large array. Returns whether it took effect."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
