"""Caches of toy teachers, and evidence with a vocabulary of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.models import LoadedModel, head_of
from kdrl.objectives.head import Head
from kdrl.teachers import LocalTeacher
from kdrl.teachers.base import Evidence
from kdrl.teachers.cache_codec import Scored, head_tensors
from kdrl.teachers.cache_config import Stored
from kdrl.teachers.cache_identity import identity
from kdrl.teachers.cache_store import CacheStore, key_of
from kdrl.teachers.cached import CachedTeacher, WritingTeacher

KINDS = {
    "topk": Stored(kind="topk", k=9),
    "draws": Stored(kind="draws", draws=12),
    "hidden": Stored(kind="hidden"),
}


def writing(
    loaded: LoadedModel, folder: Path, stored: Stored, *, temperature: float = 1.0, seed: int = 0, budget: int = 4096
) -> WritingTeacher:
    """A teacher that stores what a toy model scores."""
    content = identity(loaded.config, loaded, loaded, stored.settings(), temperature, seed)
    head = None
    if stored.kind == "hidden":
        head, content["head"] = head_tensors(head_of(loaded))
    return WritingTeacher(LocalTeacher(loaded, budget), CacheStore.write(folder, content, head))


def fill(
    loaded: LoadedModel, folder: Path, stored: Stored, responses: list[Response], shard: int = 3, **more: Any
) -> CachedTeacher:
    """A cache of these responses, `shard` to a file, opened to be read."""
    teacher = writing(loaded, folder, stored, **more)
    with teacher.store:
        for start in range(0, len(responses), shard):
            teacher.put(keyed(responses[start : start + shard]), "cpu")
    return CachedTeacher(CacheStore.read(folder))


def keyed(responses: list[Response]) -> dict[bytes, Response]:
    return {key_of(r.prompt_ids, r.token_ids): r for r in responses}


def evidence_of(logits_NV: Tensor, tokens_N: Tensor | None = None) -> Evidence:
    """Evidence whose distribution has these logits: hidden states are rows of the identity."""
    count = len(logits_NV)
    head = Head(logits_NV.T.contiguous())
    logp_NV = logits_NV.log_softmax(-1)
    tokens_N = logp_NV.argmax(-1) if tokens_N is None else tokens_N
    logp_N = logp_NV.gather(-1, tokens_N[:, None]).squeeze(-1)
    return Evidence(logp_N, torch.arange(count), 1, torch.eye(count, dtype=logits_NV.dtype), head)


def scored(logits_NV: Tensor, number: int = 0) -> Scored:
    return Scored(evidence_of(logits_NV), (len(logits_NV),), (number.to_bytes(16, "little"),))


def all_of(rollouts: Rollouts) -> Tensor:
    return torch.ones_like(rollouts.trained_N)


def work(raw: dict[str, Any], folder: str, options: dict[str, Any], die_at: int | None) -> None:
    """Fill a cache in a process of its own, which kills itself at its `die_at`-th touch of the disk."""
    from kdrl.recipe import load_recipe
    from kdrl.teachers.cache_command import cache_teacher

    torch.set_num_threads(1)
    if die_at is not None:
        _die_at_touch(die_at)
    stored = Stored(**options)
    cache_teacher(load_recipe(raw), Path(folder), stored, shard_tokens=30, say=lambda text: None)


def _die_at_touch(number: int) -> None:
    """SIGKILL at the n-th touch: a file half written or whole, renamed, its folder synced, a line half added."""
    import os
    import signal

    from kdrl.teachers import cache_disk, cache_store

    seen = [0]

    def touch() -> None:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    real_write, real_sync, real_append = cache_disk._write_synced, cache_disk._sync_folder, cache_disk.append_line

    def write(path: Path, raw: bytes) -> None:
        path.write_bytes(raw[: len(raw) // 2])
        touch()
        real_write(path, raw)
        touch()

    def sync(folder: Path) -> None:
        touch()
        real_sync(folder)
        touch()

    def append(path: Path, raw: bytes) -> None:
        seen[0] += 1
        if seen[0] == number:
            with path.open("ab") as file:
                file.write(raw[: len(raw) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real_append(path, raw)
        touch()

    cache_disk._write_synced, cache_disk._sync_folder = write, sync
    cache_store.append_line = append
