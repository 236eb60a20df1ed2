"""One copy of a prompt's keys and values for all rows that continue it: a step reads it once a prompt, not once a row.

Rows of a prompt stand side by side as more queries of one product, and their scores join those of the rows' own tokens
before the softmax, so that the result is attention over both. Left out: GPUs, where rows share their columns otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from kdrl.engines.cache import RoomyLayer


class SharedPrompts:
    """Keys and values of P prompts, [P, heads, L, W] by layer, padded on the left, and which row continues which."""

    def __init__(self, cache: DynamicCache, parent_B: Tensor) -> None:
        pasts: Sequence[tuple[Tensor, Tensor]] = [_past(layer) for layer in cache.layers]
        self._keys = [keys.contiguous() for keys, _ in pasts]
        self._values = [values.contiguous() for _, values in pasts]
        self._parent_B = parent_B
        self._arrange()

    def keep(self, keep_B: Tensor) -> None:
        """Drop all rows but the named ones, and the prompts that no row continues."""
        left_P, self._parent_B = self._parent_B[keep_B].unique(return_inverse=True)
        if len(left_P) < len(self._keys[0]):
            self._keys, self._values = ([x[left_P] for x in held] for held in (self._keys, self._values))
        self._arrange()

    def _arrange(self) -> None:
        """Places of rows in a grid [P, S] of prompts and as many rows as the most continued one has."""
        count_P = self._parent_B.bincount(minlength=len(self._keys[0]))
        self._prompts, self._slots = len(count_P), int(count_P.max())
        rows = torch.arange(len(self._parent_B), device=self._parent_B.device)
        order_B = self._parent_B.argsort(stable=True)
        slot_B = torch.empty_like(rows)
        slot_B[order_B] = rows - (count_P.cumsum(0) - count_P)[self._parent_B[order_B]]
        place_B = self._parent_B * self._slots + slot_B
        whole = self._prompts * self._slots == len(rows) and bool((place_B == rows).all())
        self._place_B = None if whole else place_B
        # Empty places are filled by some row: what is computed there is not looked at.
        self._row_G = None if whole else torch.zeros_like(count_P).repeat(self._slots).index_put((place_B,), rows)

    def _to_grid(self, x_BHGX: Tensor) -> Tensor:
        """`[P x H, S x G, X]`."""
        x = x_BHGX if self._row_G is None else x_BHGX[self._row_G]
        _, heads, each, width = x.shape
        grid = x.view(self._prompts, self._slots, heads, each, width).transpose(1, 2)
        return grid.reshape(self._prompts * heads, self._slots * each, width)

    def _to_rows(self, x: Tensor, heads: int) -> Tensor:
        """Back to `[B, H, G, X]`."""
        grid = x.view(self._prompts, heads, self._slots, -1, x.shape[-1]).transpose(1, 2)
        if self._place_B is None:
            return grid.reshape(-1, heads, *grid.shape[3:])
        return grid.flatten(0, 1)[self._place_B]

    def scores(self, query_BHGW: Tensor, layer: int) -> Tensor:
        """Products `[B, H, G, L]` of scaled queries, G to a key head, with the prompts' keys."""
        keys = self._keys[layer].flatten(0, 1)
        return self._to_rows(torch.bmm(self._to_grid(query_BHGW), keys.transpose(1, 2)), query_BHGW.shape[1])

    def mixed(self, weight_BHGL: Tensor, layer: int) -> Tensor:
        """Sums `[B, H, G, W]` of the prompts' values by weights."""
        values = self._values[layer].flatten(0, 1)
        return self._to_rows(torch.bmm(self._to_grid(weight_BHGL), values), weight_BHGL.shape[1])


def _past(layer: object) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, RoomyLayer):
        raise TypeError("prompts are shared in layers that are written in place")
    return layer.past
