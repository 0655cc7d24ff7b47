"""Keep freed memory in the process, on Linux with glibc.

glibc's malloc returns blocks of more than 32 MB to the system as soon as they are freed and requests them anew, and the
system clears every page at its first use. A training step on a CPU, which allocates the same large tensors each time, then
pays for hundreds of thousands of page faults.
"""

import ctypes
import platform

# Names and values from malloc.h; see man 3 mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory for later allocations until the process ends; return False where it cannot."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
