"""What a process may use, on file systems made by hand: machine, nested groups of both versions, its own limit."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from kdrl.available import available_bytes
from kdrl.errors import UserError

CPU = torch.device("cpu")
GB = 1 << 30
HELD = 100 << 20


def system(folder: Path, groups: str, **limits: tuple[str, int, int]) -> Path:
    """A machine of 8 GiB free; `limits` are (limit, usage, inactive file cache) by the group's folder."""
    files = {
        "proc/meminfo": f"MemTotal: {16 * GB // 1024} kB\nMemAvailable: {8 * GB // 1024} kB\n",
        "proc/self/status": f"VmSize: {GB // 1024} kB\nVmRSS: {HELD // 1024} kB\n",
        "proc/self/cgroup": groups,
    }
    for place, (limit, usage, cached) in limits.items():
        first = "memory" in place.split("/")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        key = "total_inactive_file" if first else "inactive_file"
        files |= {f"sys/fs/cgroup/{place}/{n}": str(v) for n, v in zip(names, (limit, usage), strict=True)}
        files[f"sys/fs/cgroup/{place}/memory.stat"] = f"anon 5\n{key} {cached}\n"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_machine_without_groups(tmp_path: Path) -> None:
    assert available_bytes(CPU, system(tmp_path, "")) == 8 * GB + HELD


@pytest.mark.parametrize(
    ("groups", "limits", "room"),
    [
        ("0::/\n", {".": (str(4 * GB), GB, 0)}, 3 * GB),
        ("0::/\n", {".": (str(4 * GB), GB, GB // 2)}, 3 * GB + GB // 2),
        ("0::/\n", {".": ("max", GB, 0)}, 8 * GB),
        ("0::/a/b\n", {"a/b": ("max", GB, 0), "a": (str(2 * GB), GB, 0)}, GB),
        ("0::/a/b\n", {"a/b": (str(GB), 0, 0), "a": (str(2 * GB), 0, 0)}, GB),
        ("5:cpu:/x\n4:memory:/job\n0::/\n", {"memory/job": (str(3 * GB), GB, 0)}, 2 * GB),
        ("4:memory:/elsewhere/job\n", {"memory": (str(3 * GB), GB, 0)}, 2 * GB),
        ("4:memory:/job\n", {"memory/job": (str(2**63 - 4096), GB, 0)}, 8 * GB),
    ],
    ids=["root", "cache is free", "no limit", "outer", "inner", "version 1", "a root of its own", "version 1, none"],
)
def test_the_tightest_group_counts(groups: str, limits: dict[str, tuple[str, int, int]], room: int, tmp_path: Path):
    assert available_bytes(CPU, system(tmp_path, groups, **limits)) == room + HELD


def test_the_process_own_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2 * GB, resource.RLIM_INFINITY))
    assert available_bytes(CPU, system(tmp_path, "")) == GB + HELD


def test_here_it_is_between_nothing_and_the_machine() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes(CPU) <= whole * 1.05
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device: cpu"):
            available_bytes(torch.device("cuda"))
