"""Host memory: how much was held, and on a CPU what a train step frees is kept for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from genret.types import PyTree

# Parameters of glibc's mallopt(3), and the values that it comes to by itself where large blocks are freed:
# setting any of them ends that, and the small values that it begins with would stay.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65_536}
# Bytes a step. A heap can hold several holes of the size that is asked for: ten such should not hurt.
MOST = 256 << 20
_WORTH = 8 << 20


def peak() -> str:
    """In words: the most host memory that this process has held so far, its workers left out."""
    return f"peak host memory {_peak() / 2**30:.2f} GiB"


def _peak() -> int:
    """Bytes. On Linux what getrusage(2) answers may be of the process that started this one."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as f:
            for name, _, value in (line.partition(":") for line in f):
                if name == "VmHWM":
                    return int(value.split()[0]) * 1024
    from resource import RUSAGE_SELF, getrusage  # not on Windows

    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one_heap() -> bool:
    """Has all threads of this process allocate from one heap, so that `kept` reaches them; False where the C
    library is not glibc, or where the environment says how to allocate (MALLOC_*, GLIBC_TUNABLES). To be
    called before JAX starts its threads."""
    return all(_set({_ARENA_MAX: 1}))


@contextlib.contextmanager
def kept() -> Iterator[Callable[[PyTree], None]]:
    """Gives a function to call with the outputs of each step; from the fourth on, memory that a step frees
    may stay with the process, until the end of the context.

    On a CPU, XLA allocates a program's temporaries at every call. Large ones glibc gives back to the system
    at once, which then zeroes and maps every page again: a third of a small step. So the pages that two steps
    fault in are counted, and kept if they are `MOST` bytes a step or fewer. On accelerators nothing is done.
    """
    seen: list[int] = []
    keeping = False

    def look(outputs: PyTree) -> None:
        nonlocal keeping
        if len(seen) < 4 and jax.default_backend() == "cpu" and os.name == "posix":
            jax.block_until_ready(outputs)
            seen.append(_faults())
            if len(seen) == 4 and _WORTH <= (seen[3] - seen[1]) // 2 * os.sysconf("SC_PAGESIZE") <= MOST:
                keeping = all(_set({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}))

    try:
        yield look
    finally:
        if keeping:
            _set(_USUAL)
            ctypes.CDLL(None).malloc_trim(0)


def _faults() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _set(options: dict[int, int]) -> list[Any]:
    """What mallopt answers to each: 1, or 0 where it refuses, or is not there, or is not to be asked."""
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" and not told else None
    return [mallopt(name, value) if mallopt else 0 for name, value in options.items()]
