"""Freed memory is reused without page faults."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch
from scratch_gpt.compute.malloc import keep_freed_memory

assert sys.argv[1] == "returned" or keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    torch.ones(2**24)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_reused():
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", MEASURE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "returned")
    )
    assert kept < returned / 3  # the first allocations cause some in either case
