"""What the C library's allocator does with memory that tensors give back.

By default glibc returns large blocks to the system when they are freed and asks for them again in the next pass, and
the system clears every page anew: with activations of tens of megabytes that was 10 to 40% of a training step on a CPU.
"""

from __future__ import annotations

import ctypes
import os

_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
"""Environment variables by which users set the same."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of ``mallopt``, as glibc's ``malloc.h`` numbers them."""
LARGEST = 1 << 30
"""Bytes; larger blocks go back to the system all the same."""


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors; numbers do not change, only time.

    A process then holds on to the most it ever had in use. It acts on glibc alone (Linux), and not where the
    environment sets the allocator's limits already (``MALLOC_TRIM_THRESHOLD_``, …, ``GLIBC_TUNABLES``). ``bnsharp``'s
    commands call it; a program that uses the package calls it once, before its first tensors.

    Returns:
        Whether it was set.
    """
    if any(name in os.environ for name in _OWN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # other C libraries have mallopt too, and other numbers
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    settings = {_MMAP_THRESHOLD: LARGEST, _TRIM_THRESHOLD: -1, _TOP_PAD: 1 << 26}
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])
