"""What runs inside a verifier's worker process. Imports no torch, prints nothing, and ends with its parent."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from io import TextIOBase
from typing import Any

from kdrl.tasks.base import Problem

Outcome = tuple[str, float, bool, str]
"""(status, score, formed, what went wrong, or the verifier's feedback)"""

_state: dict[str, Any] = {}


class _Trap(TextIOBase):
    """Standard output of a verifier: remembers that something was written, keeps nothing."""

    written = False

    def write(self, text: str, /) -> int:
        self.written = self.written or bool(text)
        return len(text)

    def writable(self) -> bool:
        return True


def _trap_descriptor() -> int:
    """Point file descriptor 1 into a pipe that never blocks the writer; returns the reading end."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    os.dup2(writing, 1)
    os.close(writing)
    # Warnings of a verifier's libraries do not judge a response, and must not write over the run's progress.
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    os.close(silent)
    return reading


def _end_with(parent: int) -> None:
    """Leave when the parent is gone, also after kill -9: an orphan would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def start(paths: list[str], scorer: bytes, parent: int) -> None:
    """Load the scorer before the first clock starts; a failure is kept and told with every result."""
    import resource

    # Ignored as in all workers of the pool; it was blocked so far, which what a verifier starts must not inherit.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    sys.path[:] = paths
    _state["trap"], _state["pipe"] = _Trap(), _trap_descriptor()
    sys.stdout = _state["trap"]
    try:
        _state["score"] = pickle.loads(scorer)
        _state["score"].prepare()
    except BaseException as error:
        _state["broken"] = f"{type(error).__name__}: {error}"
    _printed()


def _printed() -> bool:
    trap: _Trap = _state["trap"]
    printed, trap.written = trap.written, False
    try:
        while os.read(_state["pipe"], 65536):
            printed = True
    except BlockingIOError:
        pass
    sys.stdout = trap
    return printed


def verify(payload: bytes) -> Outcome:
    """Score one pickled (response, problem)."""
    if "broken" in _state:
        return "broken", 0.0, False, _state["broken"]
    score: Callable[[str, Problem], tuple[float, bool, str]] = _state["score"]
    try:
        response, problem = pickle.loads(payload)
        value, formed, feedback = score(response, problem)
    except BaseException as error:  # also sys.exit() and KeyboardInterrupt: none may stop the run
        _printed()
        return "crash", 0.0, False, f"{type(error).__name__}: {error}"
    if _printed():
        return "printed", 0.0, False, "it wrote to standard output"
    return "ok", value, formed, feedback
