"""What training on a CPU asks of the C library's heap."""

import ctypes
import os
import sys

# numbers of malloc.h of the GNU C library
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_CHOSEN_BY_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_NEVER, _LARGEST = 2**31 - 1, 2**30


def keep_freed_memory() -> bool:
    """Have the GNU C library keep freed blocks for the next step, for the life of the process; whether it does.

    It would hand large ones back to the system, and a step asks for the same blocks as the one before: each of their
    pages is then faulted in and zeroed again, a tenth of a small model's step (docs/log.md). The process keeps its
    highest memory until it ends. What the user has set stays, and other C libraries are left alone.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # older releases allow no more than 32 MiB as the size from which a block is mapped by itself
    return mallopt is not None and bool(
        mallopt(_TRIM_THRESHOLD, _NEVER)
        and (mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_THRESHOLD, 32 * 2**20))
    )
