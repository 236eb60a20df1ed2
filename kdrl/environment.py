"""What a run was made with: code, interpreter, machine and package versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kdrl

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "datasets", "gguf", "numpy",
    "math-verify", "latex2sympy2_extended", "sympy", "reasoning-gym", "pebble", "pydantic", "trl", "vllm",
)  # fmt: skip


def environment(folder: str | Path = ".") -> dict[str, Any]:
    """Git state of `folder` and of kdrl's own source, python, platform, device and package versions, as plain JSON.

    A package that is not installed is None. Left out: environment variables, which may hold secrets.
    """
    return {
        "kdrl": kdrl.__version__,
        "git": git_state(Path(folder)),
        "source_git": _source_git(),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "command": sys.argv,
        "platform": platform.platform(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def write_environment(path: str | Path, folder: str | Path = ".") -> dict[str, Any]:
    """Write `environment(folder)` to `path` as JSON and return it."""
    found = environment(folder)
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit", "branch", "dirty"} of the repository around `folder`; None without git, repository or a commit."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    # A file that git does not know of can change a run as much as an edited one.
    changed = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    return {"commit": commit, "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"), "dirty": bool(changed)}


def _source_git() -> dict[str, Any] | None:
    # An installed package may lie in a virtual environment inside a repository of something else.
    home = Path(kdrl.__file__).parent
    return git_state(home) if _git(home, "ls-files", "--error-unmatch", "__init__.py") else None


def _git(folder: Path, *arguments: str) -> str | None:
    # Optional locks off: asking for the state must not write to the index while another git command runs.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    quiet = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, env=quiet)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device() -> dict[str, Any]:
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        about = torch.cuda.get_device_properties(index)
        return {"type": "cuda", "name": about.name, "bytes": about.total_memory, "cuda": torch.version.cuda}
    return {"type": "cpu", "name": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
