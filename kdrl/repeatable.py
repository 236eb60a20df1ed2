"""Kernels that give the same numbers every time, so that a resumed run is the run that was not stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, PyTorch takes deterministic kernels, and warns where there is none; what held before is restored."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # PyTorch would fill every new array with NaN, against code that reads what it has not written: a twelfth of an
    # update's time, and the memory of large arrays is touched that would never be.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        memory.fill_uninitialized_memory = filled
