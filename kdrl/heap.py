"""What glibc does with freed arrays: by default it maps the larger ones anew each time, and gives others back early.

Page faults then take up to two fifths of an update's time. Kept for the next array, they leave gaps, and the peak of an
update of several micro-batches is up to half as high again; a plan that has no room for that gives them back at once.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

# mallopt's names for the free memory at the top of the heap that is kept, and the size from which arrays are mapped.
_TRIM, _MMAP = -1, -3
_MOST_MAPPED = 32 << 20  # glibc takes no larger one


@functools.cache
def _glibc() -> Any:
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "mallopt") else None


def settle(*, tight: bool) -> None:
    """Keep freed arrays for the next, or with `tight` give them back; for the whole process, and glibc alone."""
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP, 1 << 20 if tight else _MOST_MAPPED)
        library.mallopt(_TRIM, 64 << 20 if tight else (1 << 31) - 1)
