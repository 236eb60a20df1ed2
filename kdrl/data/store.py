"""A file of traces that grows batch by batch and goes on after a kill where its last whole batch ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kdrl.errors import UserError
from kdrl.jsonlines import JsonLines, plain

Counts = dict[str, int]


def state_path(path: Path) -> Path:
    """Where the state of a file of traces lies: beside it."""
    return path.with_name(path.name + ".state.json")


def read_state(path: Path) -> dict[str, Any] | None:
    """The stored state of a file of traces, None where there is none; raises UserError for a broken one."""
    where = state_path(path)
    try:
        state = json.loads(where.read_text(encoding="utf-8"))
        return {"settings": dict(state["settings"]), **{key: state[key] for key in ("problems", "bytes", "counts")}}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} cannot be read ({error!r}); remove it and {path} to start anew.") from None


class TraceFile:
    """JSON lines plus a state file (`NAME.state.json`) with the settings, whole problems, bytes and counts.

    The state is replaced after every batch, when its lines are safe on disk, so what a kill leaves behind it is cut
    off: the file of a resumed job has the bytes of an undisturbed one. A context manager. Raises UserError for a file
    of other settings, one without a state, one that is too short, and one that another process is writing.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(plain(settings)))
        if not path.parent.is_dir():
            raise UserError(f"--output {path}: there is no folder {path.parent}.")
        if path.is_dir():
            raise UserError(f"--output {path} is a folder; give a file.")
        self.problems, self.counts, self._bytes = 0, Counts(), 0
        self._lines: JsonLines | None = None
        self._lock: int | None = None
        self._claim()
        try:
            self._find(say)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            self._lines.close()
        self._release()

    def write(self, rows: Sequence[Mapping[str, Any]], problems: int, counts: Counts) -> None:
        """Append the rows of a batch; `problems` are then done. `counts` are added to those of earlier batches."""
        if self._lines is None:
            self._save()
            self._lines = JsonLines(self.path, self._bytes if self.path.exists() else None)
        for row in rows:
            self._lines.write(row)
        self._bytes, self.problems = self._lines.offset(), problems
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self._save()

    def _find(self, say: Callable[[str], None]) -> None:
        """Where an earlier process got to; nothing is written yet."""
        state, size = read_state(self.path), self.path.stat().st_size if self.path.exists() else 0
        if state is None:
            if size:
                raise UserError(
                    f"{self.path} exists and has no {state_path(self.path).name}, so it cannot be gone on with; choose "
                    "another --output."
                )
            return
        self._check(state["settings"])
        if size < state["bytes"]:
            raise UserError(
                f"{self.path} has {size} bytes, but {state['bytes']} were written; it was cut or changed. Put it back, "
                f"or remove it and {state_path(self.path).name} to start anew."
            )
        self.problems, self.counts, self._bytes = int(state["problems"]), Counts(state["counts"]), int(state["bytes"])
        if size > self._bytes:
            say(f"{self.path}: an unfinished batch of {size - self._bytes} bytes is taken off and written again")

    def _check(self, stored: Mapping[str, Any]) -> None:
        then, now = _flat(stored), _flat(self.settings)
        for key in dict.fromkeys([*now, *then]):
            if now.get(key) != then.get(key):
                raise UserError(
                    f"{self.path} was begun with other settings: {key} was {_short(then.get(key))} and is "
                    f"{_short(now.get(key))} now; give the same options to go on, or another --output."
                )

    def _claim(self) -> None:
        # As a run's folder: the lock ends with the process, and verifier workers do not inherit it.
        path = state_path(self.path).with_suffix(".lock")
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(self._lock)
                raise UserError(f"another process is writing {self.path}; wait until it ends, or stop it.") from None

    def _release(self) -> None:
        if self._lock is not None:
            state_path(self.path).with_suffix(".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _save(self) -> None:
        state = {"settings": self.settings, "problems": self.problems, "bytes": self._bytes, "counts": self.counts}
        target = state_path(self.path)
        part = target.with_suffix(".part")
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(json.dumps(state, ensure_ascii=False, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            raise UserError(
                f"{target} could not be written: {error.strerror or error}; free some space, then give the same "
                "command again."
            ) from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
