"""Arithmetic on log-probabilities that stays finite where a probability is zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# An outcome that one side rules out entirely counts as this log-probability, so that every divergence stays finite.
LOG_FLOOR = -1.0e4
# Elements that are worked on at a time on the CPU: 2 MiB in float32, about what a core's cache holds.
_CACHED = 1 << 19


def finite(logp: Tensor) -> Tensor:
    """Log-probabilities with -inf raised to LOG_FLOOR, where they have no gradient and no mass."""
    return logp.clamp(min=LOG_FLOOR)


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats over the last axis; outcomes of no probability count zero."""
    return -(logp.exp() * finite(logp)).sum(-1)


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of the first of two axes that fit a core's cache; all rows at once on a GPU."""
    count = len(rows)
    size = max(1, _CACHED // max(1, rows.shape[-1])) if rows.device.type == "cpu" else max(1, count)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def refuse_second_derivatives() -> None:
    """Raise NotImplementedError in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise NotImplementedError("the chunked head and relative entropy have no second derivative (create_graph)")


class _RelativeEntropy(torch.autograd.Function):
    """sum x (log x - log y) with one array made in the backward pass for each side that wants one."""

    @staticmethod
    def forward(ctx: Any, logx_RV: Tensor, logy_RV: Tensor) -> Tensor:
        ctx.save_for_backward(logx_RV, logy_RV)
        out_R = logx_RV.new_empty(len(logx_RV))
        for part in row_blocks(logx_RV):
            x, difference = finite(logx_RV[part]), finite(logy_RV[part])
            torch.sub(x, difference, out=difference)
            out_R[part] = x.exp_().mul_(difference).sum(-1)
        return out_R

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivatives()
        logx_RV, logy_RV = ctx.saved_tensors
        of_x, of_y = (torch.empty_like(logx_RV) if need else None for need in ctx.needs_input_grad)
        for part in row_blocks(logx_RV):
            logx, logy = logx_RV[part], logy_RV[part]
            pull = logx.exp().mul_(upstream[0][part, None])
            if of_x is not None:
                of_x[part] = finite(logx).sub_(finite(logy)).add_(1.0).mul_(pull)
            if of_y is not None:
                of_y[part] = pull.neg_().masked_fill_(logy < LOG_FLOOR, 0.0)
        return of_x, of_y


def relative_entropy(logx: Tensor, logy: Tensor) -> Tensor:
    """KL(X||Y) as bare sum x log(x/y) over the last axis `[..., V]` to `[...]`; differentiable once."""
    wide = torch.promote_types(logx.dtype, logy.dtype)
    logx, logy = torch.broadcast_tensors(logx.to(wide), logy.to(wide))
    flat = (side.reshape(-1, side.shape[-1]) for side in (logx, logy))
    return _RelativeEntropy.apply(*flat).reshape(logx.shape[:-1])  # type: ignore[no-any-return]
