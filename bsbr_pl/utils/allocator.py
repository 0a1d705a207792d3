"""Keeps freed memory in the process: by default the C allocator returns it to the system."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Make the process keep freed memory for the next step; True if the system can.

    Otherwise the kernel maps, zeroes and unmaps activations of a megabyte or more at every step of a training on a CPU.
    In return, resident memory stays at its peak. Only glibc (Linux) has these options.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
