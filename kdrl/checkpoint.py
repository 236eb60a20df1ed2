"""Checkpoints that survive kill -9, a full disk and a flipped bit; what resuming needs, without pickle.

A run keeps `checkpoints/step-000010/` holding one safetensors file per group of tensors, `state.json`, and
`manifest.json` with the SHA-256 of each. The manifest is written last and the folder gets its name by one rename, so a
folder with a name is whole unless the disk damaged it later. Not done: sharded saves of several processes, Windows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdrl.config import Config
from kdrl.errors import UserError
from kdrl.optimizer_state import flatten_optimizer as flatten_optimizer
from kdrl.optimizer_state import restore_optimizer as restore_optimizer

log = logging.getLogger("kdrl.checkpoint")

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
LOCK = ".lock"
_STEP = re.compile(r"step-(\d{6,})")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointConfig(Config):
    """When to save and what to keep."""

    every: int = Field(default=50, ge=0)
    """Save after every n optimizer steps; 0 saves only at the end and on Ctrl-C."""
    keep: int = Field(default=2, ge=1)
    """Keep the newest n checkpoints; older ones are removed once a newer one is whole."""
    keep_best: bool = True
    """Keep also the checkpoint with the best development score, however old (needs `evaluate.every` > 0)."""


@dataclass(frozen=True)
class Loaded:
    """A whole checkpoint, every hash verified. Tensors are on the CPU and mapped from the files: copy, never change."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    score: float | None


class TornError(Exception):
    """A checkpoint that is not whole; the text says what is wrong with it."""


class Checkpoints:
    """The checkpoints of one run directory; `skipped` says, one sentence each, which ones `latest` passed over."""

    def __init__(self, run_dir: str | Path, config: CheckpointConfig) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self.config = config
        self.skipped: list[str] = []
        self._torn: set[int] = set()
        self._lock: int | None = None

    def claim(self) -> None:
        """Make this process the only writer here until `close`; raises UserError when another process is one."""
        if self._lock is not None:
            return
        with _room_for(self.folder / LOCK, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A record lock: it ends with the process and, unlike flock, is not inherited by verifier workers.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Other errors mean a file system without locks: go on without.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.close()
                raise UserError(
                    f"another process is training in {self.folder.parent}; "
                    "wait until it ends, stop it, or choose another --output."
                ) from None
        self._clean()

    def close(self) -> None:
        """Let other processes write here again."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        score: float | None = None,
    ) -> Path:
        """Write one checkpoint atomically, then prune; returns its folder.

        `tensors` maps a file name to its tensors, e.g. {"student": ..., "optimizer": ...}; `state` is plain JSON;
        `score` is the development score at this step, higher is better. Raises UserError when the disk is full; then
        and on any other exception nothing saved earlier is touched.
        """
        if score is not None and not math.isfinite(score):
            raise ValueError(f"checkpoint score must be finite, not {score}")
        text = _json(_plain(state, "state"))
        self.claim()
        final = self.folder / f"step-{step:06d}"
        part = self.folder / f".part-{final.name}"
        groups = {name: _packed(group) for name, group in tensors.items()}
        need = len(text) + sum(t.numel() * t.element_size() for kept, _ in groups.values() for t in kept.values())
        try:
            with _room_for(final, need):
                part.mkdir()
                _write(part, step, groups, text, score)
                self._put(part, final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        self._torn.discard(step)
        self._prune(step)
        return final

    def latest(self) -> Loaded | None:
        """The newest whole checkpoint, or None when there is none at all; damaged ones are named in a warning.

        Claims the run. Raises UserError when there are checkpoints and none is whole, or another process is training.
        """
        if not self.folder.is_dir():
            return None
        self.claim()
        self.skipped, self._torn = [], set()
        for step, path in reversed(self._named()):
            try:
                return load(path)
            except TornError as torn:
                self._torn.add(step)
                self.skipped.append(f"checkpoint {path} is not whole and was skipped: {torn}")
                log.warning(self.skipped[-1])
        if self.skipped:
            raise UserError(
                "no checkpoint is whole, so there is nothing to resume from:\n  "
                + "\n  ".join(self.skipped)
                + "\nStart again with a new --output, or put a copy of one of these folders back."
            )
        return None

    def best(self) -> Path | None:
        """The folder with the highest development score (of equals the newest), or None; hashes are not verified."""
        scored = [(s, step, path) for step, path in self._named() if (s := self._score(step, path)) is not None]
        return max(scored)[2] if scored else None

    def _named(self) -> list[tuple[int, Path]]:
        """Steps and folders, oldest first."""
        if not self.folder.is_dir():
            return []
        found = ((_STEP.fullmatch(p.name), p) for p in self.folder.iterdir())
        return sorted((int(m[1]), p) for m, p in found if m)

    def _score(self, step: int, path: Path) -> float | None:
        with contextlib.suppress(TornError):
            if step not in self._torn:
                return read_manifest(path)["score"]
        return None

    def _put(self, part: Path, final: Path) -> None:
        """Give a finished folder its name; one that is there already (a step saved twice) is set aside meanwhile."""
        aside = self.folder / f".old-{final.name}"
        if final.exists():
            final.rename(aside)
        part.rename(final)
        _sync(self.folder)
        shutil.rmtree(aside, ignore_errors=True)

    def _prune(self, saved: int) -> None:
        """Remove what is neither the newest n, nor the best, nor the one just saved."""
        named = [(step, path) for step, path in self._named() if step not in self._torn]
        kept = {saved} | {step for step, _ in named[-self.config.keep :]}
        best = self.best() if self.config.keep_best else None
        for step, path in self._named():
            if step not in kept and path != best:
                # Renamed first: a kill in the middle of removing must not leave a folder that looks torn.
                gone = path.rename(self.folder / f".gone-{path.name}")
                shutil.rmtree(gone, ignore_errors=True)

    def _clean(self) -> None:
        """Finish or undo what a killed process left half done; unfinished saves are named in a warning."""
        for aside in self.folder.glob(".old-step-*"):
            home = self.folder / aside.name.removeprefix(".old-")
            if not home.exists():
                aside.rename(home)
        for left in [p for kind in ("part", "old", "gone") for p in self.folder.glob(f".{kind}-step-*")]:
            if left.name.startswith(".part-"):
                log.warning("removed %s: a save that was cut off before it was whole", left)
            shutil.rmtree(left, ignore_errors=True)


def load(path: str | Path) -> Loaded:
    """Read one checkpoint folder; raises TornError, saying what is wrong, unless every file is as it was saved."""
    path = Path(path)
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        _verify(path / name, entry)
    tensors = {}
    for name, entry in manifest["files"].items():
        if name != STATE:
            group = load_file(path / name)
            tensors[Path(name).stem] = group | {alias: group[of] for alias, of in entry["aliases"].items()}
    state = json.loads((path / STATE).read_bytes())
    return Loaded(manifest["step"], path, tensors, state, manifest["score"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, itself verified; raises TornError."""
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        sealed = isinstance(manifest, dict) and _sealed(manifest) == raw
    except OSError as error:
        raise TornError(f"{MANIFEST}: {error.strerror}") from None
    except ValueError:
        raise TornError(f"{MANIFEST} is damaged") from None
    if not sealed:
        raise TornError(f"{MANIFEST} is damaged")
    if manifest["format"] != FORMAT:
        raise TornError(f"it has format {manifest['format']}, and this version of kdrl reads {FORMAT}")
    if path.name != f"step-{manifest['step']:06d}":
        raise TornError(f"the folder has been renamed: its manifest says step {manifest['step']}")
    return manifest


def _write(part: Path, step: int, groups: dict[str, Any], state: bytes, score: float | None) -> None:
    """Fill a folder: tensors, state, then the manifest that vouches for them."""
    files: dict[str, Any] = {}
    for name, (kept, aliases) in groups.items():
        file = part / f"{name}.safetensors"
        save_file(kept, file)
        files[file.name] = _sync(file) | {"aliases": aliases}
    (part / STATE).write_bytes(state)
    files[STATE] = _sync(part / STATE)
    (part / MANIFEST).write_bytes(_sealed({"format": FORMAT, "step": step, "score": score, "files": files}))
    _sync(part / MANIFEST)
    _sync(part)


def _sealed(manifest: dict[str, Any]) -> bytes:
    """Canonical bytes of a manifest with the hash of its own content inside, so that any flipped bit shows."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return _json(body | {"sha256": hashlib.sha256(_json(body)).hexdigest()})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _sync(path: Path) -> dict[str, Any]:
    """Force a file or folder to the disk; for a file, its size and hash."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return {} if path.is_dir() else {"bytes": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(file: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise TornError(f"{file.name} has {size:,} of {entry['bytes']:,} bytes")
        if _hash(file) != entry["sha256"]:
            raise TornError(f"{file.name} is damaged (its SHA-256 is not the one it was saved with)")
    except OSError as error:
        raise TornError(f"{file.name}: {error.strerror}") from None


def _packed(group: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors wants them: contiguous, none sharing memory. Tied ones are stored once, with aliases."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        view = (storage.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        whole = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        kept[name] = tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)
    return kept, aliases


def _plain(value: Any, where: str) -> Any:
    """`value` unchanged if JSON gives back the same thing; else TypeError naming the place."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if type(key) is not str]:
            raise TypeError(f"{where} has the key {wrong[0]!r}; checkpoint state is JSON, so keys are strings")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if type(value) is list:
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(
        f"{where} is a {type(value).__name__}; checkpoint state is JSON: dict, list, str, int, float, bool, None"
    )


@contextlib.contextmanager
def _room_for(path: Path, need: int) -> Iterator[None]:
    """Turn "no space left" in any of its forms into a sentence that says where and how much."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = re.search(r"os error (\d+)", str(error))  # safetensors has no errno of its own
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if number not in _NO_ROOM:
            raise
        home = next(p for p in path.parents if p.is_dir())
        raise UserError(
            f"no room for the checkpoint {path}: it needs {need:,} bytes, {shutil.disk_usage(home).free:,} are free "
            f"({os.strerror(number)}). Checkpoints saved earlier are untouched. Make room or lower checkpoint.keep, "
            f"then go on with: kdrl train --resume {path.parent.parent}"
        ) from error
