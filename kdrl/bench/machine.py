"""What a measurement was made with, and the peak of memory that the system or the device counts."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdrl.environment import environment

_STATUS = Path("/proc/self/status")
_MARKS = Path("/proc/self/clear_refs")


def machine() -> dict[str, Any]:
    """Processor, GPU, cores, threads and load; package versions; commit."""
    found = environment(Path(__file__).parent)
    gpu = {"gpu": found["device"]["name"]} if found["device"]["type"] == "cuda" else {}
    load = {"load_at_start": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}
    git = found["source_git"] or {}
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **gpu, **load},
        "versions": {
            "python": found["python"],
            "kdrl": found["kdrl"],
            **{name: version for name, version in found["packages"].items() if version is not None},
        },
        "commit": git.get("commit"),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """As the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return named or platform.processor() or platform.machine()


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Put what was found into a JSON file, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def reset_peak(device: str) -> None:
    """Count the peak of memory from now on; on a CPU that is not Linux it counts from the start of the process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _MARKS.exists():
        _MARKS.write_text("5")


def peak_bytes(device: str) -> int | None:
    """The most since `reset_peak`: of the device's tensors on a GPU, of the process's resident memory on a CPU.

    None where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
