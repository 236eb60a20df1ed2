"""How many bytes this process may use: of the machine, of the containers around it, and of its own limits."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from pathlib import Path

import torch

from kdrl.errors import UserError

# Version 2 has one tree of groups; in version 1 memory has a tree of its own. The files say the same things.
_FILES = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def available_bytes(device: torch.device, system: Path = Path("/")) -> int:
    """Bytes this process may use on a device, what it holds already included; raises UserError without the device.

    `system` is where /proc and /sys lie. Left out: swap, which a training step would crawl in.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device: cuda was asked for and torch sees no CUDA device; set device: cpu.")
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = _kibibytes(system / "proc/meminfo", "MemAvailable:")
    held = _kibibytes(system / "proc/self/status", "VmRSS:")
    if free is None or held is None:  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free + held, *(room + held for room in _groups(system)), *_own_limits(system, held)])


def _kibibytes(file: Path, key: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def _groups(system: Path) -> Iterable[int]:
    """What the control groups around this process leave, from its own up to the root, file caches counted as free."""
    for version, root, inside in _trees(system):
        limit, usage = _FILES[version]
        for folder in (inside, *inside.parents):
            place = root / str(folder).lstrip("/")
            try:
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                # In version 1 the plain key leaves out the groups within, which the limit and the usage count.
                cached = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
                yield int((place / limit).read_text()) - int((place / usage).read_text()) + int(cached)
            except (OSError, ValueError):  # no such file, or "max"
                continue


def _trees(system: Path) -> Iterable[tuple[int, Path, Path]]:
    """Version, mount and the group of this process there; a container may show its own group as the root."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines or ["0::/"]:
        _, kinds, inside = line.split(":", 2)
        if not kinds:
            yield 2, system / "sys/fs/cgroup", Path(inside)
            yield 2, system / "sys/fs/cgroup/unified", Path(inside)
        elif "memory" in kinds.split(","):
            yield 1, system / "sys/fs/cgroup/memory", Path(inside)


def _own_limits(system: Path, held: int) -> Iterable[int]:
    """What `ulimit -v` leaves; address space that is taken but not used is gone too."""
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    taken = _kibibytes(system / "proc/self/status", "VmSize:")
    if soft != resource.RLIM_INFINITY and taken is not None:
        yield soft - taken + held
