"""A folder of stored teacher scores that survives kill -9, a full disk and a flipped bit.

`manifest.json` says whose scores they are, `index.jsonl` has a sealed line a shard, `shard-000000.safetensors` holds
the scores of whole responses with their keys. A shard gets its name by one rename when it is safe on disk and carries
a digest of its own, so a kill loses at most the shard that was not written yet. Left out: several writers at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from kdrl.errors import UserError
from kdrl.teachers.cache_disk import append_line, claim, release, replace_file, room_for

FORMAT = 1
MANIFEST, INDEX, HEAD = "manifest.json", "index.jsonl", "head.safetensors"
KEY_BYTES = 16
_SHARD = re.compile(r"shard-(\d{6,})\.safetensors")
_AGAIN = "give the same `kdrl cache-teacher` command again"


def key_of(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> bytes:
    """The 128 bits that a response is found by: a hash of its prompt's and its own token ids."""
    words = [len(prompt_ids), *prompt_ids, *token_ids]
    return hashlib.sha256(b"".join(word.to_bytes(4, "little") for word in words)).digest()[:KEY_BYTES]


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with the hash of its own JSON inside."""
    body = {name: value for name, value in content.items() if name != "sha256"}
    return body | {"sha256": hashlib.sha256(_json(body)).hexdigest()}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sealed(raw: bytes) -> dict[str, Any] | None:
    """What the bytes say, None unless they are as they were sealed."""
    try:
        content = json.loads(raw)
        return content if isinstance(content, dict) and _json(seal(content)) == raw.rstrip(b"\n") else None
    except ValueError:
        return None


@dataclass(frozen=True)
class Place:
    """Where a response's tokens lie."""

    shard: str
    first: int
    length: int


@dataclass
class CacheStore:
    """An open cache: read by keys, and where it was opened to write, `add`ed to. A context manager."""

    folder: Path
    manifest: dict[str, Any]
    places: dict[bytes, Place] = field(default_factory=dict, repr=False)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)
    _loaded: dict[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    _lock: int | None = field(default=None, repr=False)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Open to read; raises UserError when there is none, or it is damaged or was left in the middle of a write."""
        store = cls(folder, read_manifest(folder))
        lines, torn = index_lines(folder)
        if torn or any(name not in lines for name in _shards(folder)):
            raise UserError(f"{folder}: its writing was cut off; {_AGAIN}, which loses nothing that was written.")
        for name, entry in lines.items():
            store._register(name, entry)
        return store

    @classmethod
    def write(cls, folder: Path, content: Mapping[str, Any], head: Mapping[str, Tensor] | None = None) -> Self:
        """Open to add to, made where there is none; heals what a kill left behind.

        Raises UserError for a cache of another teacher or other settings, one that another process writes, and a full
        disk.
        """
        with room_for(folder / MANIFEST):
            folder.mkdir(parents=True, exist_ok=True)
        lock = claim(folder)
        try:
            store = cls(folder, _begin(folder, content, head), _lock=lock)
            store._heal()
        except BaseException:
            release(folder, lock)
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write here again."""
        if self._lock is not None:
            release(self.folder, self._lock)
            self._lock = None

    @property
    def identity(self) -> str:
        """What every line and shard of this cache carries."""
        return str(self.manifest["sha256"])

    @property
    def tokens(self) -> int:
        """Tokens stored."""
        return sum(entry["tokens"] for entry in self.entries.values())

    @property
    def bytes(self) -> int:
        """Bytes of all shards and the index."""
        index = self.folder / INDEX
        return sum(entry["bytes"] for entry in self.entries.values()) + (index.stat().st_size if index.exists() else 0)

    def head(self) -> dict[str, Tensor]:
        """The teacher's head, verified."""
        return _verified(self.folder / HEAD, self.manifest["head"]["sha256"])

    def tensors(self, shard: str) -> Mapping[str, Tensor]:
        """The tensors of a shard, whose SHA-256 is compared the first time; raises UserError for a damaged one."""
        if shard not in self._loaded:
            self._loaded[shard] = _verified(self.folder / shard, self.entries[shard]["file"])
        return self._loaded[shard]

    def add(self, keys: Sequence[bytes], lengths: Sequence[int], tensors: Mapping[str, Tensor]) -> str:
        """Write one shard of whole responses; its name, when it is safe on disk. Raises UserError for a full disk."""
        names = [int(match[1]) for name in self.entries if (match := _SHARD.fullmatch(name))]
        name = f"shard-{max(names, default=-1) + 1:06d}.safetensors"
        packed = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
        whole = dict(tensors) | {"keys": packed, "lengths": torch.tensor(lengths, dtype=torch.int32)}
        said = json.dumps({"cache": self.identity, "digest": _digest(whole)}, sort_keys=True)
        raw = save(whole, {"kdrl": said})
        replace_file(self.folder / name, raw)
        self._append(name, self._entry(whole, raw))
        return name

    def _entry(self, whole: Mapping[str, Tensor], raw: bytes) -> dict[str, Any]:
        return {
            "bytes": len(raw),
            "file": hashlib.sha256(raw).hexdigest(),
            "keys": _digest({name: whole[name] for name in ("keys", "lengths")}),
            "responses": len(whole["lengths"]),
            "tokens": int(whole["lengths"].sum()),
        }

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        line = seal({"shard": name, "cache": self.identity, **entry})
        append_line(self.folder / INDEX, _json(line) + b"\n")
        self._register(name, line)

    def _register(self, name: str, entry: dict[str, Any]) -> None:
        """Take up a shard's responses, its size and keys verified."""
        path = self.folder / name
        if entry["cache"] != self.identity:
            raise UserError(
                f"{self.folder / INDEX}: its line of {name} is of another cache (another teacher or other settings); "
                f"move {name} to the folder that it came from, remove the index, and {_AGAIN}."
            )
        try:
            size = path.stat().st_size
        except OSError:
            raise _damaged(path, "is missing") from None
        if size != entry["bytes"]:
            raise _damaged(path, f"has {size:,} of {entry['bytes']:,} bytes")
        try:
            with safe_open(path, framework="pt") as file:
                listed = {name: file.get_tensor(name) for name in ("keys", "lengths")}
        except (SafetensorError, OSError, ValueError):
            raise _damaged(path, "is damaged (its header cannot be read)") from None
        if _digest(listed) != entry["keys"]:
            raise _damaged(path, "is damaged (its keys are not the ones it was saved with)")
        self.entries[name] = entry
        self._place(name, [key.tobytes() for key in listed["keys"].numpy()], listed["lengths"].tolist())

    def _place(self, name: str, keys: Sequence[bytes], lengths: Sequence[int]) -> None:
        first = 0
        for key, length in zip(keys, lengths, strict=True):
            self.places.setdefault(key, Place(name, first, length))
            first += length

    def _heal(self) -> None:
        """Drop a torn line, forget shards that were removed, and take up those that no line names yet."""
        for left in self.folder.glob(".part-*"):
            left.unlink(missing_ok=True)
        lines, torn = index_lines(self.folder)
        kept = {name: entry for name, entry in lines.items() if (self.folder / name).exists()}
        if torn or len(kept) < len(lines):
            replace_file(self.folder / INDEX, b"".join(_json(entry) + b"\n" for entry in kept.values()))
        self.notes += [f"{name} was removed; what it held is scored again" for name in lines if name not in kept]
        for name, entry in kept.items():
            self._register(name, entry)
        for name in _shards(self.folder):
            if name not in kept:
                self._adopt(name)

    def _adopt(self, name: str) -> None:
        """Take up a shard whose line was never written."""
        path = self.folder / name
        try:
            raw = path.read_bytes()
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {})["kdrl"])
            whole = load(raw)
        except (SafetensorError, OSError, ValueError, KeyError):
            raise _damaged(path, "is damaged (its header cannot be read)") from None
        if said["cache"] != self.identity:
            raise UserError(f"{path} is of another cache (another teacher or other settings); move it out of here.")
        if said["digest"] != _digest(whole):
            raise _damaged(path, "is damaged (its digest is not the one it was saved with)")
        self._append(name, self._entry(whole, raw))
        self.notes.append(f"{name} was whole but not in the index yet, and is now")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Whose scores a folder holds, verified; raises UserError."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no teacher cache: it has no {MANIFEST}; write one with `kdrl cache-teacher`."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    manifest = _sealed(raw)
    if manifest is None:
        raise UserError(f"{path} is damaged; put a copy of it back, or remove {folder} and write it again.")
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} has format {manifest['format']}, and this version of kdrl reads {FORMAT}.")
    return manifest


def _begin(folder: Path, content: Mapping[str, Any], head: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """The manifest of a folder, made where there is none, which must say the same."""
    raw_head = None if head is None else save(dict(head))
    manifest = expected(folder, content, raw_head)
    if not (folder / MANIFEST).exists():
        if raw_head is not None:
            replace_file(folder / HEAD, raw_head)
        replace_file(folder / MANIFEST, _json(manifest) + b"\n")
    return manifest


def expected(folder: Path, content: Mapping[str, Any], raw_head: bytes | None) -> dict[str, Any]:
    """The manifest that a folder has or is to get; raises UserError where it says something else."""
    wanted = dict(json.loads(_json({"format": FORMAT, **content})))
    if raw_head is not None:
        wanted["head"] = wanted["head"] | {"sha256": hashlib.sha256(raw_head).hexdigest()}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _compare(folder, manifest, wanted)
        return manifest
    if any(folder.glob("shard-*")) or (folder / INDEX).exists():
        raise UserError(f"{folder} holds shards but no {MANIFEST}; put it back, or choose another --output.")
    return seal(wanted)


_WORDS = {
    "teacher.weights": "another teacher (its configuration or weights differ)",
    "tokenizer": "another tokenizer",
    "temperature": "another temperature",
}


def _compare(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    then, now = _flat(stored), _flat(wanted)
    for key in dict.fromkeys(["kind", *now, *then]):
        if key not in ("sha256", "teacher.model", "seed") and then.get(key) != now.get(key):
            was, here = (str(x.get(key))[:16] for x in (then, now))
            raise UserError(
                f"{folder} holds scores of {_WORDS.get(key, 'other settings')}: {key} was {was} and is {here} now; "
                "choose another folder, or what it was begun with."
            )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in content.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def index_lines(folder: Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """Lines by shard, and whether the last was cut off; raises UserError for any other that is not as it was sealed."""
    path = folder / INDEX
    try:
        *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        entry = _sealed(line)
        if entry is None:
            raise UserError(f"{path}, line {number} is damaged; remove {path.name}, and {_AGAIN}: the shards are kept.")
        found[str(entry["shard"])] = entry
    return found, bool(last)


def _shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _verified(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise _damaged(path, "is damaged (its SHA-256 is not the one it was saved with)")
        return load_file(path)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror or error})") from None


def _damaged(path: Path, what: str) -> UserError:
    if path.name == HEAD:
        return UserError(f"{path} {what}; put a copy of it back, or remove {path.parent} and write it again.")
    return UserError(f"{path} {what}; put a copy of it back, or remove it and {_AGAIN}: what it held is scored anew.")
