"""Memory that was freed on the host: returned to the system, or kept.

Both are calls of glibc's; with other C libraries, and on Windows, they do nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def return_freed() -> None:
    """Return freed memory to the system; glibc keeps up to a third of all that was read."""
    if (trim := _function("malloc_trim")) is not None:
        trim(ctypes.c_size_t(0))


def keep_freed() -> None:
    """Keep freed memory in this process, where JAX computes on CPUs.

    glibc returns large blocks to the system, and every step pays for the page faults of its
    temporaries: a fifth of the processor time of training a small T5 (docs/log.md). This is for the
    process of a training run: it then holds the largest amount that it ever used. A process that
    compiles many programs, such as that of the tests, grows to gigabytes. Call it after
    `runtime.join`.
    """
    import jax

    if jax.default_backend() == "cpu" and (mallopt := _function("mallopt")) is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap, too
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_TOP_PAD, 256 << 20)


def _function(name: str) -> Any:
    """Return a function of the C library; None if it has none of that name."""
    return getattr(_c_library(), name, None)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if os.name == "posix" else None
