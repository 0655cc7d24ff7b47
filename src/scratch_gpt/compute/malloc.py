"""Memory that stays with the process, on Linux with glibc.

What is larger than 32 MB, glibc's malloc gives back to the system as soon as it is freed and asks for anew, and the system
clears every page of it at the first touch: in a training step on a CPU, which allocates the same large tensors each time,
hundreds of thousands of page faults.
"""

import ctypes
import platform

# The names and numbers of malloc.h, see man 3 mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory for the next allocation until the process ends; False where that cannot be asked for."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
