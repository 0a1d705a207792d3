"""The C allocator's habit of handing memory back to the system, and how to break it."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees, so that the next step finds it mapped; True where that is possible.

    Activations of a megabyte and more are otherwise mapped, zeroed and unmapped by the kernel at every step of a CPU
    training. The price is that resident memory stays at its peak. Only glibc (Linux) has these switches.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
