"""A cache that is opened as a run would open it, and keeps in memory what the run would store.

Left out: whether another process, or another teacher of the same run, is writing the folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor

from kdrl.errors import UserError
from kdrl.teachers.cache_store import CacheStore, expected, index_lines


@dataclass
class Rehearsal(CacheStore):
    """Refuses what `CacheStore.write` refuses, and touches no disk."""

    _head: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def write(cls, folder: Path, content: Mapping[str, Any], head: Mapping[str, Tensor] | None = None) -> Self:
        """Open as if to add to; raises UserError for a folder of other scores, and one that could not be written."""
        home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (home.is_dir() and os.access(home, os.W_OK)):
            raise UserError(f"{folder} could not be written: {home} is no folder that may be written to.")
        manifest = expected(folder, content, None if head is None else save(dict(head)))
        store = cls(folder, manifest, _head=head or {})
        lines = index_lines(folder)[0] if folder.exists() else {}
        for name, entry in lines.items():
            if (folder / name).exists():
                store._register(name, entry)
        return store

    def head(self) -> dict[str, Tensor]:
        """The teacher's head, as it was given."""
        return dict(self._head)

    def add(self, keys: Sequence[bytes], lengths: Sequence[int], tensors: Mapping[str, Tensor]) -> str:
        """Take up whole responses; a name that no shard has."""
        name = f"unwritten-{len(self._loaded)}"
        self._loaded[name] = tensors
        self._place(name, keys, lengths)
        return name
