"""Taking turns: things that are compared run one after the other, in an order that swaps, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch


def turns(names: Sequence[str], count: int, budget_s: float | None = None, least: int = 2) -> Iterator[tuple[int, str]]:
    """(turn, name) of `count` turns, each turn in the other order; no new turn after `budget_s` and `least` turns."""
    start = time.perf_counter()
    for turn in range(count):
        spent = time.perf_counter() - start
        # A turn that would end beyond the budget is not begun.
        if budget_s is not None and turn >= min(least, count) and spent * (turn + 1) / turn > budget_s:
            return
        for name in names if turn % 2 == 0 else reversed(names):
            yield turn, name


def in_turns(
    sides: Mapping[str, Callable[[], object]], count: int, *, budget_s: float | None = None, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call of each side; the first `warm` calls of a side are not counted."""
    for side in sides.values():
        for _ in range(warm):
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _, name in turns(list(sides), count, budget_s):
        seconds[name].append(seconds_of(sides[name]))
    return seconds


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of a call, a GPU's queued work included."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def summary(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and greatest, to so many significant digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in numbers.items()}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Summary of the quotients of the same turns."""
    return summary([a / b for a, b in zip(over, under, strict=True)])
