"""Runs in processes of their own that are really killed; started by a fork server that has torch loaded already."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOAD = ["kdrl.run", "kdrl.trainer", "kdrl.build", "kdrl.report", "peft", "transformers.models.qwen3.modeling_qwen3"]


def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def attempt(context: ForkServerContext, raw: dict[str, Any], run_dir: Path, die_at: int | None, after_s: float) -> int:
    """Start or resume a run; it kills itself at its `die_at`-th touch of the disk, or is killed after some seconds.

    Returns its exit code: 0 for a finished run, -9 for a killed one.
    """
    process = context.Process(target=work, args=(raw, str(run_dir), die_at))
    process.start()
    process.join(after_s)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def work(raw: dict[str, Any], run_dir: str, die_at: int | None) -> None:
    import torch

    from kdrl.run import resume, train

    torch.set_num_threads(1)
    if die_at is not None:
        _die_at_touch(die_at)
    if (Path(run_dir) / "recipe.yaml").exists():
        resume(run_dir, say=lambda text: None)
    else:
        train(raw, output=run_dir, say=lambda text: None)


def command(arguments: list[str], said: str) -> None:
    """`kdrl ARGUMENTS` in a process group of its own, its output in the file `said`."""
    import sys

    import torch

    from kdrl.cli import main

    torch.set_num_threads(1)  # as `work`, for another number of threads adds up in another order
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(said, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["kdrl", *arguments]
    main()


def _die_at_touch(number: int) -> None:
    """SIGKILL at the n-th sync of a file, before or after it is done: most of them lie within a checkpoint's save."""
    import kdrl.checkpoint
    import kdrl.jsonlines

    seen = [0]

    def wrapped(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            out = function(*args, **kwargs)
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        return call

    kdrl.checkpoint._sync = wrapped(kdrl.checkpoint._sync)
    kdrl.checkpoint.save_file = wrapped(kdrl.checkpoint.save_file)
    kdrl.jsonlines.JsonLines.write = wrapped(kdrl.jsonlines.JsonLines.write)  # type: ignore[method-assign]


def kill_until_done(
    context: ForkServerContext, raw: dict[str, Any], run_dir: Path, seed: int, kills: int
) -> tuple[int, int]:
    """Kill a run `kills` times at random moments, resuming each time, then let it end.

    Returns how often it died, and how often in the middle of a checkpoint's save.
    """
    draw = random.Random(seed)
    died = torn = 0
    for number in range(kills):
        # A step touches the disk about 20 times; the first kill leaves whole checkpoints to go on from.
        code = attempt(context, raw, run_dir, draw.randrange(2 if number else 45, 60), 60.0)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        died += 1
        torn += any((run_dir / "checkpoints").glob(".part-*"))
    assert attempt(context, raw, run_dir, None, 60.0) == 0
    return died, torn
