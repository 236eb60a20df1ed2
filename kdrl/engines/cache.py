"""A key-value cache that is written in place: a step copies its own keys and values, not the whole past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

_ROOM = 64


class RoomyLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of buffers [rows, heads, capacity, width] that grow by halves."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._buffers: list[Tensor] = []

    @property
    def past(self) -> tuple[Tensor, Tensor]:
        """Keys and values written so far; raises RuntimeError before the first."""
        if self.keys is None or self.values is None:
            raise RuntimeError("this layer of the cache is empty")
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [rows, heads, new, width]; returns all of them."""
        if not self.is_initialized:
            # The prefill: its own tensors serve until the rows are repeated for the samples.
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self._buffers = [key_states, value_states]
            return self.keys, self.values
        old = self.past[0].shape[-2]
        new = old + key_states.shape[-2]
        if new > self.capacity:
            self._buffers = [self._with_room(past, new) for past in self.past]
        keys, values = self._buffers
        keys[:, :, old:new] = key_states
        values[:, :, old:new] = value_states
        self.keys, self.values = keys[:, :, :new], values[:, :, :new]
        return self.keys, self.values

    @property
    def capacity(self) -> int:
        """Columns that can be written before the buffers grow."""
        return self._buffers[0].shape[-2]

    @property
    def buffers(self) -> list[Tensor]:
        """Keys and values with the columns that are not written yet."""
        return self._buffers

    def advance(self) -> None:
        """Count a column that was written into the buffers directly; there must be room for it."""
        length = self.past[0].shape[-2] + 1
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that are named, in that order; a row may be named more than once."""
        if self.keys is None or self.values is None:
            return
        length = self.keys.shape[-2]
        self._buffers = [self._with_room(past, length + 1, beam_idx) for past in (self.keys, self.values)]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def forget(self, first: int) -> None:
        """Drop all columns before `first`."""
        length = self.past[0].shape[-2] - first
        self._buffers = [self._with_room(past[:, :, first:], length + 1) for past in self.past]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def take(self, others: Sequence[RoomyLayer]) -> None:
        """Add the rows of other layers of the same length."""
        pasts = [self.past, *(other.past for other in others)]
        self.keys, self.values = self._buffers = [torch.cat(each) for each in zip(*pasts, strict=True)]

    def put(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Let the last columns of `rows` hold keys and values [n, heads, columns, width] of another text."""
        for past, fresh in zip(self.past, (keys, values), strict=True):
            past[rows, :, past.shape[-2] - fresh.shape[-2] :] = fresh.to(past.dtype)

    def _with_room(self, past: Tensor, needed: int, rows: Tensor | None = None) -> Tensor:
        count, heads, length, width = past.shape
        capacity = max(needed, min(self._limit, needed + max(_ROOM, needed // 2)))
        # Zeros, because a static step multiplies what was never written by a weight of 0.
        buffer = past.new_zeros(count if rows is None else rows.shape[0], heads, capacity, width)
        if rows is None:
            buffer[:, :, :length] = past
        else:
            torch.index_select(past, 0, rows, out=buffer[:, :, :length])
        return buffer


def new_cache(config: PretrainedConfig, limit: int, roomy: bool = True) -> DynamicCache:
    """An empty cache for at most `limit` tokens a row; layers of other kinds than full attention stay stock."""
    cache = DynamicCache(config=config)
    if roomy:
        cache.layers = [RoomyLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def joinable(cache: DynamicCache) -> bool:
    """Whether rows of several such caches can be put into one."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of all caches, which are joinable and of equal lengths, in the first of them."""
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True) if len(caches) > 1 else ():
        layer.take(others)  # type: ignore[attr-defined]
    return caches[0]


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep the named rows of every layer: repeats a prompt's cache for its samples, or drops finished rows."""
    for layer in cache.layers:
        layer.reorder_cache(rows)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Encoded:
    """One prompt's keys and values by layer, [heads, P, width], and the hidden state [D] that its last token left."""

    prompt: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]
    hidden_D: Tensor

    @classmethod
    def of(cls, prompt: tuple[int, ...], cache: DynamicCache, row: int, hidden_D: Tensor) -> Encoded:
        """The last columns of a row of roomy layers, copied."""
        pasts = [layer.past for layer in cache.layers]  # type: ignore[attr-defined]
        own = [[x[row, :, -len(prompt) :].clone() for x in past] for past in pasts]
        return cls(prompt, [keys for keys, _ in own], [values for _, values in own], hidden_D.clone())

    def put(self, cache: DynamicCache, rows: Tensor) -> None:
        """Let `rows` of a cache hold this prompt in their last columns."""
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            layer.put(rows, keys[None], values[None])  # type: ignore[attr-defined]
