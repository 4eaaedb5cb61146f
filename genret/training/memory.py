"""Host memory: what a step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets this process keep the memory it frees; False where the C library is not glibc, or where the
    environment already says how it should allocate (MALLOC_*, GLIBC_TUNABLES).

    On a CPU, XLA allocates a program's temporaries at every call. Large ones glibc gives back to the system
    at once, which then zeroes and maps every page again: a third of a small train step. The price is that
    the process stays as large as it was at its largest. To be called before JAX starts its threads, each of
    which would otherwise have a heap of its own, of 64 MiB at most.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if told or mallopt is None:
        return False
    # All, in this order, and no and: musl's and other stand-ins refuse.
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
