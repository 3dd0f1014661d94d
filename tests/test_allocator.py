"""Freed memory is kept where the C library is glibc, and left to users who set its limits themselves."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
PROGRAM = """
import resource, sys, torch
from bnsharp.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def work():
    return sum(torch.ones(n).sum() for n in (12_000_000, 20_000_000, 50_000))  # 48 and 80 MB: above every default
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **environment: str) -> tuple[str, int]:
    """What :func:`keep_freed_memory` returned, and the pages that the system had to provide in five rounds."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], env=clean | environment, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, count = done.stdout.split()
    return kept, int(count)


@glibc
def test_memory_is_asked_for_once():
    """Five rounds of 128 MB take 150 000 new pages by default; kept memory may still grow by a block."""
    default, kept = faults("leave"), faults("keep")
    assert default[1] > 1000
    assert kept[0] == "True"
    assert kept[1] < default[1] / 5


@glibc
@pytest.mark.parametrize("own", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}])
def test_what_the_environment_sets_is_left(own):
    assert faults("keep", **own)[0] == "False"
