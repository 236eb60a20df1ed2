"""What is written beside a run is true: the commit, whether it was clean, and the versions."""

from __future__ import annotations

import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from kdrl.environment import environment, git_state, write_environment


def git(folder: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{field}": "a@b" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | who).stdout.strip()


def test_git_state_follows_the_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path / "missing") is None
    git(tmp_path, "init", "-b", "trunk")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "one")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "branch": "trunk", "dirty": False}
    assert git_state(tmp_path) == clean
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == clean | {"dirty": True}
    (tmp_path / "a").write_text("1")
    (tmp_path / "new").write_text("")
    assert git_state(tmp_path) == clean | {"dirty": True}


def test_no_git_command_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(tmp_path)["git"] is None


def test_written_environment_is_json_with_true_versions(tmp_path: Path) -> None:
    written = write_environment(tmp_path / "environment.json", tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text()) == written
    for name in ("torch", "transformers", "reasoning-gym"):
        assert written["packages"][name] == metadata.version(name)
    assert written["device"]["type"] in ("cpu", "cuda")
