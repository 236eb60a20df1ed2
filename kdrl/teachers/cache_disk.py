"""Files of a cache on the disk: written so that a kill leaves them whole or absent, one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdrl.errors import UserError

LOCK = ".lock"
_HELD: set[Path] = set()


def claim(folder: Path) -> int:
    """An open lock that makes this process the folder's only writer; raises UserError when another one is."""
    # A record lock does not keep a process from itself.
    if folder.resolve() in _HELD:
        raise UserError(f"two teachers of this run would write {folder}; give each a folder of its own.")
    with room_for(folder / LOCK):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # A record lock: it ends with the process and is not inherited by verifier workers.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Other errors mean a file system without locks: go on without.
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(lock)
            raise UserError(f"another process is writing {folder}; wait until it ends, or choose another.") from None
    _HELD.add(folder.resolve())
    return lock


def release(folder: Path, lock: int) -> None:
    """Let other writers in again."""
    _HELD.discard(folder.resolve())
    os.close(lock)


def replace_file(path: Path, raw: bytes) -> None:
    """Give a file these bytes by one rename; raises UserError when the disk is full."""
    part = path.with_name(f".part-{path.name}")
    with room_for(path, len(raw)):
        try:
            _write_synced(part, raw)
            part.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def append_line(path: Path, raw: bytes) -> None:
    """Add bytes to the end of a file, all or none of them; raises UserError when the disk is full."""
    before = path.stat().st_size if path.exists() else 0
    with room_for(path, len(raw)):
        try:
            with path.open("ab") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if path.exists():
                os.truncate(path, before)
            raise


def _write_synced(path: Path, raw: bytes) -> None:
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def room_for(path: Path, need: int = 0) -> Iterator[None]:
    """Turn a failing disk into a sentence that says where, how much, and what to do."""
    try:
        yield
    except OSError as error:
        home = next((p for p in path.parents if p.is_dir()), Path())
        free = shutil.disk_usage(home).free
        more = f": it needs {need:,} bytes, {free:,} are free" if need else ""
        raise UserError(
            f"{path} could not be written{more} ({error.strerror or error}). What was written before is whole; make "
            "room, then go on with the same command."
        ) from error
