"""A key-value cache that is written in place: a step copies its own keys and values, not the whole past."""

from __future__ import annotations

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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [rows, heads, new, width]; returns all of them."""
        if not self.is_initialized:
            # The prefill: its own tensors serve until the rows are repeated for the samples.
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self._buffers = [key_states, value_states]
            return self.keys, self.values
        assert self.keys is not None
        assert self.values is not None
        old = self.keys.shape[-2]
        new = old + key_states.shape[-2]
        if new > self._buffers[0].shape[-2]:
            self._buffers = [self._with_room(past, new) for past in (self.keys, self.values)]
        keys, values = self._buffers
        keys[:, :, old:new] = key_states
        values[:, :, old:new] = value_states
        self.keys, self.values = keys[:, :, :new], values[:, :, :new]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that are named, in that order; a row may be named more than once."""
        if self.keys is None or self.values is None:
            return
        length = self.keys.shape[-2]
        self._buffers = [self._with_room(past, length + 1, beam_idx) for past in (self.keys, self.values)]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _with_room(self, past: Tensor, needed: int, rows: Tensor | None = None) -> Tensor:
        count, heads, length, width = past.shape
        capacity = max(needed, min(self._limit, needed + max(_ROOM, needed // 2)))
        buffer = past.new_empty(count if rows is None else rows.shape[0], heads, capacity, width)
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


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep the named rows of every layer: repeats a prompt's cache for its samples, or drops finished rows."""
    for layer in cache.layers:
        layer.reorder_cache(rows)  # type: ignore[arg-type]
