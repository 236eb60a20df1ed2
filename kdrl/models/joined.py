"""Attention of a packed row on a CPU without a mask: two parts, joined by their log-sum-exps (arXiv:2402.05099).

Segments see themselves by causal attention; all that follow a prompt see it in one call, its keys and values as they
are. A part's backward pass is given the joined output and log-sum-exp, which makes its share of the gradient exact.
Left out: devices other than a CPU, whose kernels keep log-sum-exps in other forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Segment

_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
_forward, _backward = (getattr(torch.ops.aten, name, None) for name in (_KERNEL, f"{_KERNEL}_backward"))
_FORMATS = (torch.float32, torch.float64, torch.bfloat16)
# Padding of one call may be a third of its tokens' scores, or as many as another call costs the time of.
_WASTE, _CALL = 3, 1 << 12


def joins(query_NHd: Tensor, value_NKd: Tensor) -> bool:
    """Whether there is a kernel for parts of this device, format and width."""
    alike = query_NHd.shape[-1] == value_NKd.shape[-1] and query_NHd.dtype in _FORMATS
    return alike and query_NHd.device.type == "cpu" and None not in (_forward, _backward)


def wasteful(padded: int, used: int, call: int) -> bool:
    """Whether so much padding makes a call of attention slower than another `call` would be; all three in scores."""
    return padded - used > max(used // _WASTE, call)


class _Rows:
    """Consecutive segments that attend to themselves in one call, padded to the longest with their last tokens."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.count, self.size = len(lengths), sum(lengths)
        self._whole = min(lengths) == max(lengths)
        if not self._whole:
            lengths_B1, offset_T = torch.tensor(lengths)[:, None], torch.arange(max(lengths))
            start_B1, real_S = lengths_B1.cumsum(0) - lengths_B1, (offset_T < lengths_B1).flatten()
            self._spread_S = (start_B1 + offset_T.minimum(lengths_B1 - 1)).flatten()
            self._back_n, self._empty = real_S.nonzero().squeeze(1), (~real_S).nonzero().squeeze(1)

    def rows(self, x_nHd: Tensor, zero: bool = False) -> Tensor:
        """`[B, H, T, d]` of these tokens; `zero` where padded, as a gradient is."""
        if not self._whole:
            x_nHd = x_nHd.index_select(0, self._spread_S)
            x_nHd = x_nHd.index_fill_(0, self._empty, 0.0) if zero else x_nHd
        return x_nHd.unflatten(0, (self.count, -1)).transpose(1, 2)

    def tokens(self, x_BHTd: Tensor) -> Tensor:
        """The way back."""
        x_SHd = x_BHTd.transpose(1, 2).flatten(0, 1)
        return x_SHd if self._whole else x_SHd.index_select(0, self._back_n)


def _calls(lengths: Sequence[int]) -> list[list[int]]:
    """Cut lengths of segments into runs that make little padding."""
    runs: list[list[int]] = []
    used = longest = 0
    for length in lengths:
        more, tallest = used + length**2, max(longest, length)
        if not runs or wasteful((len(runs[-1]) + 1) * tallest**2, more, _CALL):
            runs.append([])
            more, tallest = length**2, length
        runs[-1].append(length)
        used, longest = more, tallest
    return runs


class Parts:
    """How a packed row is cut: into rows that see themselves, and into prompts and what follows each of them."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.rows = [_Rows(lengths) for lengths in _calls([s.length for s in segments])]
        self.sizes: list[int] = []
        self.prompts: list[tuple[int, int]] = []
        last = None
        for s in segments:
            if s.parent is None or s.parent != last:
                self.prompts += [] if s.parent is None else [(s.parent, len(self.sizes))]
                self.sizes.append(0)
            self.sizes[-1] += s.length
            last = s.parent

    def attend(self, query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, scale: float | None) -> Tensor:
        """Attention of every token of the row to those that it may see, `[N, H, d]`."""
        given = (x if x.stride(-1) == 1 else x.contiguous() for x in (query_NHd, key_NKd, value_NKd))
        return _Joined.apply(*given, self, scale)  # type: ignore[no-any-return]

    def in_rows(self, x_NHd: Tensor) -> tuple[Tensor, ...]:
        """The tokens of each of `rows`, `[n, H, d]`."""
        return x_NHd.split([r.size for r in self.rows])

    def in_pieces(self, x_NHd: Tensor) -> tuple[Tensor, ...]:
        """Prompts and what follows them, each `[1, H, n, d]`, as `prompts` names them."""
        return x_NHd.transpose(0, 1)[None].split(self.sizes, 2)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float | None) -> Tensor:
        assert _forward is not None
        wide = torch.promote_types(query.dtype, torch.float32)
        out_NHd, lse_NH = query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide)
        in_rows = zip(*map(parts.in_rows, (query, key, value, out_NHd, lse_NH)), strict=True)
        for rows, (q, k, v, *held) in zip(parts.rows, in_rows, strict=True):
            found = _forward(*map(rows.rows, (q, k, v)), 0.0, True, scale=scale)
            for whole, x in zip(held, found, strict=True):
                whole.copy_(rows.tokens(x))
        q, k, v, out, lse = map(parts.in_pieces, (query, key, value, out_NHd, lse_NH))
        for prompt, after in parts.prompts:
            more, more_lse = _forward(q[after], k[prompt], v[prompt], scale=scale)
            out[after].lerp_(more, (more_lse - lse[after]).sigmoid_().to(more.dtype)[..., None])
            torch.logaddexp(lse[after], more_lse, out=lse[after])
        ctx.save_for_backward(query, key, value, out_NHd, lse_NH)
        ctx.parts, ctx.scale = parts, scale
        return out_NHd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert _backward is not None
        parts, known = ctx.parts, (grads[0].contiguous(), *ctx.saved_tensors)
        run = partial(_backward, dropout_p=0.0, scale=ctx.scale)
        totals = [x.new_empty(x.shape) for x in known[1:4]]
        in_rows = zip(*map(parts.in_rows, known), strict=True)
        for rows, (grad, *given), *parts_of in zip(parts.rows, in_rows, *map(parts.in_rows, totals), strict=True):
            found = run(rows.rows(grad, zero=True), *map(rows.rows, given), is_causal=True)
            for total, x in zip(parts_of, found, strict=True):
                total.copy_(rows.tokens(x))
        grad, q, k, v, out, lse = map(parts.in_pieces, known)
        of_q, of_k, of_v = map(parts.in_pieces, totals)
        for prompt, after in parts.prompts:
            found = run(grad[after], q[after], k[prompt], v[prompt], out[after], lse[after], is_causal=False)
            for total, x in zip((of_q[after], of_k[prompt], of_v[prompt]), found, strict=True):
                total += x
        return *totals, None, None
