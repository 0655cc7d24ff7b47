"""Freed memory is used again without a page fault."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch
from scratch_gpt.compute.malloc import keep_freed_memory

assert sys.argv[1] == "given back" or keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", MEASURE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < given_back / 3  # the first few look for their place
