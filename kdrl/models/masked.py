"""Attention of a packed row where `kdrl.models.joined` has no kernel: keys and values copied, and a mask.

Keys and values stand behind those of their prompt, a response a row, and go through `scaled_dot_product_attention`. The
mask grows with the square of the longest text, which `MASK` bounds. Left out: kernels that read a packed row as it is
(varlen flash attention knows no shared prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kdrl.batch import Segment
from kdrl.models.joined import wasteful

# Scores that take about as long as another call.
_CALL = 1 << 15
# Elements of a mask that differs from row to row, and of one that all rows share: 4 and 64 MiB in float32.
_ROWS, MASK = 1 << 20, 1 << 24


@dataclass
class _Block:
    """Consecutive segments that attend in one call, padded to the longest; all have a parent or none has."""

    members: list[Segment] = field(default_factory=list)
    parents: list[Segment] = field(default_factory=list)
    longest: int = 0
    prompt: int = 0
    used: int = 0

    def take(self, segment: Segment, parent: Segment | None) -> bool:
        """Add a segment if that makes little padding; whether it was added."""
        if self.members and bool(self.parents) != (parent is not None):
            return False
        before = 0 if parent is None else parent.length
        longest, prompt = max(self.longest, segment.length), max(self.prompt, before)
        used = self.used + segment.length * (before + segment.length)
        padded = (len(self.members) + 1) * longest * (prompt + longest)
        alike = all(p.length == before for p in self.parents[:1]) and self.prompt in (0, prompt)
        if self.members and (wasteful(padded, used, _CALL) or (not alike and padded > _ROWS)):
            return False
        self.members.append(segment)
        self.parents += [] if parent is None else [parent]
        self.longest, self.prompt, self.used = longest, prompt, used
        return True


def _blocks(segments: Sequence[Segment]) -> list[_Block]:
    blocks: list[_Block] = []
    for segment in segments:
        parent = None if segment.parent is None else segments[segment.parent]
        if not blocks or not blocks[-1].take(segment, parent):
            blocks.append(_Block())
            blocks[-1].take(segment, parent)
    return blocks


class Masked:
    """How a packed row is laid out for attention, and its masks. `shared` heads share keys once it has attended."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.blocks = _blocks(segments)
        self.shared = 0
        shared = segments[: 1 + max((s.parent for s in segments if s.parent is not None), default=-1)]
        self._starts = [s.start for s in shared]
        self._cut = [*(s.length for s in shared), sum(s.length for s in segments[len(shared) :])]
        spread, real = [], []
        for block in self.blocks:
            for s in block.members:
                offset = torch.arange(block.longest)
                spread.append(s.start + offset.clamp(max=s.length - 1))
                real.append(offset < s.length)
        real_S = torch.cat(real)
        self._whole = bool(real_S.all())
        self._spread_S, self._back_N = torch.cat(spread).to(device), real_S.nonzero().squeeze(1).to(device)
        self._empty = (~real_S).nonzero().squeeze(1).to(device)
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def attend(self, query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, scale: float | None) -> Tensor:
        """Attention of every token of the row to those that it may see, `[N, H, d]`."""
        self.shared = query_NHd.shape[1] // key_NKd.shape[1]
        prompts = [dict(zip(self._starts, x.split(self._cut), strict=False)) for x in (key_NKd, value_NKd)]
        sizes = [len(b.members) * b.longest for b in self.blocks]
        spread = [self._spread(x).split(sizes) for x in (query_NHd, key_NKd, value_NKd)]
        out = []
        for number, (block, query, key, value) in enumerate(zip(self.blocks, *spread, strict=True)):
            rows = [x.unflatten(0, (len(block.members), block.longest)) for x in (query, key, value)]
            if block.parents:
                rows[1:] = [_after(block, at, x) for at, x in zip(prompts, rows[1:], strict=True)]
            out.append(_attend(rows[0], rows[1], rows[2], self._mask(number, rows[0], rows[1]), scale).flatten(0, 1))
        return self._back(torch.cat(out) if len(out) > 1 else out[0])

    def _spread(self, x_NHd: Tensor) -> Tensor:
        return x_NHd if self._whole else _Spread.apply(x_NHd, self._spread_S, self._back_N)

    def _back(self, x_SHd: Tensor) -> Tensor:
        return x_SHd if self._whole else _Back.apply(x_SHd, self._spread_S, self._back_N, self._empty)

    def _mask(self, number: int, query_BTHd: Tensor, key_BSKd: Tensor) -> Tensor | None:
        """Additive mask `[1 or B, 1, groups x T, S]` of a block with prompts; without, causal attention needs none."""
        block = self.blocks[number]
        if not block.parents:
            return None
        known = self._masks.get((number, query_BTHd.dtype))
        if known is None:
            prompts = dict.fromkeys(p.length for p in block.parents)
            lengths = list(prompts) if len(prompts) == 1 else [p.length for p in block.parents]
            own = torch.ones(block.longest, block.longest, dtype=torch.bool).tril()
            before = torch.arange(block.prompt) < torch.tensor(lengths)[:, None]
            seen = torch.cat([before[:, None].expand(-1, block.longest, -1), own.expand(len(lengths), -1, -1)], 2)
            seen = seen.repeat(1, query_BTHd.shape[2] // key_BSKd.shape[2], 1)[:, None]
            known = torch.zeros(seen.shape, dtype=query_BTHd.dtype).masked_fill_(~seen, -torch.inf)
            known = self._masks[number, query_BTHd.dtype] = known.to(query_BTHd.device)
        return known


def _after(block: _Block, prompts: dict[int, Tensor], own_BTKd: Tensor) -> Tensor:
    """Keys or values `[B, P + T, K, d]` of a block's rows behind those of their prompts, copied once."""
    first, count = block.parents[0], len(block.parents)
    if all(p.start == first.start for p in block.parents):
        return torch.cat([prompts[first.start].expand(count, -1, -1, -1), own_BTKd], 1)
    lengths = {p.start: p.length for p in block.parents}
    padded = {n: pad(prompts[n], (0, 0, 0, 0, 0, block.prompt - length)) for n, length in lengths.items()}
    pieces = [
        x for p, own_TKd in zip(block.parents, own_BTKd.unbind(0), strict=True) for x in (padded[p.start], own_TKd)
    ]
    return torch.cat(pieces).unflatten(0, (count, -1))


def _attend(
    query_BTHd: Tensor, key_BSKd: Tensor, value_BSKd: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    length, shared = query_BTHd.shape[1], query_BTHd.shape[2] // key_BSKd.shape[2]
    key, value = key_BSKd.transpose(1, 2), value_BSKd.transpose(1, 2)
    if mask is None:
        query = query_BTHd.transpose(1, 2)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared > 1)
        return mixed.transpose(1, 2)
    # Queries of the heads that share keys stand behind each other, so that keys and values are not repeated.
    query = query_BTHd.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return mixed.unflatten(2, (shared, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Spread(torch.autograd.Function):
    """Packed rows to padded ones. Padding is not looked at, so that its gradient is zero: the way back is a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread_S: Tensor, back_N: Tensor) -> Tensor:
        ctx.save_for_backward(back_N)
        return x.index_select(0, spread_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Back(torch.autograd.Function):
    """Padded rows to packed ones; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread_S: Tensor, back_N: Tensor, empty: Tensor) -> Tensor:
        ctx.save_for_backward(spread_S, empty)
        return x.index_select(0, back_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        spread_S, empty = ctx.saved_tensors
        return grads[0].index_select(0, spread_S).index_fill_(0, empty, 0.0), None, None, None
