"""Append-only JSON lines that survive a kill: flushed per line, cut back on resume, read with the bad lines named."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl.errors import UserError


class JsonLines:
    """A file of one JSON object a line, flushed after each; OSError (a full disk) becomes a UserError naming the file.

    `offset` cuts an existing file back to that many bytes first; without it the file must be new or empty, so that two
    runs never share one.
    """

    def __init__(self, path: str | Path, offset: int | None = None) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if offset is not None:
                cut_back(self.path, offset)
            elif self.path.exists() and self.path.stat().st_size:
                raise UserError(f"{self.path} already holds another run's lines; choose another output or resume it")
            self._file = open(self.path, "ab")  # noqa: SIM115
        except OSError as error:
            raise UserError(_cannot_write(self.path, error)) from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object; non-finite numbers become null, tensor and numpy scalars plain numbers."""
        line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        try:
            self._file.write(line.encode("utf-8", errors="replace"))
            self._file.flush()
        except OSError as error:
            raise UserError(_cannot_write(self.path, error)) from error

    def offset(self) -> int:
        """Bytes written so far, safe on disk: what a checkpoint stores for `cut_back`."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(_cannot_write(self.path, error)) from error
        return self._file.tell()

    def close(self) -> None:
        """Close the file; what could not be written was already reported by `write`."""
        try:
            self._file.close()
        except OSError:
            self._file.raw.close()


def cut_back(path: str | Path, byte_offset: int) -> None:
    """Drop everything after `byte_offset`, and the unfinished line before it if it ends in one.

    A file shorter than the offset (its end was lost or edited) is kept up to its last whole line, with a warning.
    """
    path = Path(path)
    try:
        data = path.read_bytes() if path.exists() else b""
        kept = data[:byte_offset]
        kept = kept[: kept.rfind(b"\n") + 1]
        if len(kept) < byte_offset:
            warnings.warn(
                f"a checkpoint was saved when {path} had {byte_offset} bytes, but whole lines end at byte {len(kept)}; "
                "the lines between are lost and the run goes on without them",
                stacklevel=2,
            )
        if len(kept) < len(data):
            os.truncate(path, len(kept))
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error


def read_lines(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All whole objects of the file, and a sentence for each thing that is wrong with it (empty for a sound file)."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], [f"{path.name} does not exist"]
    except OSError as error:
        return [], [f"{path} cannot be read: {error.strerror or error}"]
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _object(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            bad.append(number)
    notes = []
    if bad and bad[-1] == len(lines):
        notes.append(f"the last line of {path.name} is unfinished, as a kill leaves it; it is left out")
        bad.pop()
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        notes.append(
            f"{len(bad)} of {len(lines) - 1} lines of {path.name} are no JSON objects and are left out: {shown}"
        )
    return rows, notes


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # also UnicodeDecodeError
        return None
    return row if isinstance(row, dict) else None


def plain(value: Any) -> Any:
    """The value as JSON can hold it: scalars of torch and numpy as numbers, nan and inf as None, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return plain(value.item())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def _cannot_write(path: Path, error: OSError) -> str:
    why = error.strerror or error
    return f"{path} could not be written: {why}; free some space or mend the folder, then resume the run"
