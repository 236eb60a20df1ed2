"""`kdrl serve-teacher`: the command line that it becomes, and what stops it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdrl.cli import main
from kdrl.recipe import load_recipe

Kdrl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kdrl(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Kdrl:
    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdrl", "serve-teacher", *map(str, arguments)])
        try:
            main()
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return call


def test_a_dry_run_prints_the_command_and_recipe_lines_that_fit_together(kdrl: Kdrl, world: Path):
    options = ["--port", 8765, "--top-k", 64, "--max-length", 100, "--gpu-memory", 0.5, "--key-env", "MY_KEY"]
    status, out, _ = kdrl(world / "teacher", "--dry-run", *options, "--", "--seed", "3")
    assert status == 0
    command, lines = out.split("# in the recipe:\n")
    for words in (
        "VLLM_API_KEY=$MY_KEY ",
        "-m vllm.entrypoints.openai.api_server",
        "--served-model-name teacher",
        "--port 8765",
        "--max-logprobs 64",
        "--no-enable-prefix-caching",
        "--max-model-len 101",
        "--gpu-memory-utilization 0.5",
        "--generation-config vllm",
    ):
        assert words in command
    assert command.strip().endswith("--seed 3")
    raw = yaml.safe_load(lines) | {"method": "kdrl", "student": {"model": "x"}, "task": {"path": "y"}}
    teacher = load_recipe(raw).teacher
    assert teacher is not None
    assert teacher.served is not None
    assert teacher.served.urls == ("http://127.0.0.1:8765",)
    assert teacher.served.key_env == "MY_KEY"
    assert teacher.model == str(world / "teacher")


def test_without_vllm_it_says_how_to_get_it(kdrl: Kdrl, world: Path):
    status, out, err = kdrl(world / "teacher", "--python", sys.executable)
    assert (status, out) == (2, "")
    assert "pip install vllm" in err
    assert "--python PATH/bin/python" in err


def test_mistakes_have_their_sentence(kdrl: Kdrl, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "there is no such folder" in kdrl(tmp_path / "none")[2]
    assert "there is no such program" in kdrl(world / "teacher", "--python", tmp_path / "none")[2]
    monkeypatch.delenv("MY_KEY", raising=False)
    assert "MY_KEY, which is not set" in kdrl(world / "teacher", "--key-env", "MY_KEY")[2]
    (tmp_path / "python").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "python").chmod(0o755)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = kdrl(world / "teacher", "--port", port, "--python", tmp_path / "python")
    assert status == 2
    assert f"127.0.0.1:{port} cannot be used" in err


def test_it_becomes_the_server_and_hands_the_key_on_unseen(world: Path, tmp_path: Path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "key=$VLLM_API_KEY" "$@"\n')
    stub.chmod(0o755)
    command = [sys.executable, "-m", "kdrl", "serve-teacher", str(world / "teacher"), "--key-env", "MY_KEY"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command += ["--python", str(stub), "--port", str(port)]
    done = subprocess.run(command, env=os.environ | {"MY_KEY": "s3cret"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.strip().splitlines()
    assert last.startswith("key=s3cret -m vllm.entrypoints.openai.api_server --model")
    assert "s3cret" not in "".join(said)
    assert "s3cret" not in last.removeprefix("key=s3cret")


def test_a_dry_run_too_needs_a_model_that_is_there(
    kdrl: Kdrl, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("models/nope", "./nope", str(tmp_path / "nope")):
        status, out, err = kdrl(path, "--dry-run")
        assert (status, out) == (2, "")
        assert path in err
    assert kdrl("Qwen/Qwen3-8B", "--dry-run", "--max-length", "4096")[0] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "99999"], "--port"),
        (["--gpu-memory", "5"], "--gpu-memory"),
        (["--max-length", "0"], "--max-length"),
        (["--max-length", "100000"], "reads: 128 tokens, of which the server must write one; give --max-length 127 or"),
        (["--max-length", "128"], "--max-length 128 is beyond"),
        (["--dtype", "fp32"], "--dtype fp32 is not known; it is one of auto, float32, bfloat16, float16"),
        (["--", "--port=9"], "--port=9 after -- is said before it: --port"),
        (["--", "--max_logprobs", "9"], "--max_logprobs after -- is said before it: --top-k"),
        (["--", "--enable-prefix-caching"], "leaves cached prompt tokens without log-probs"),
    ],
    ids=str,
)
def test_flags_that_mean_nothing_or_undo_others_are_refused(kdrl: Kdrl, world: Path, words: list[str], told: str):
    status, out, err = kdrl(world / "teacher", "--dry-run", *words)
    assert (status, out) == (2, "")
    assert told in err
