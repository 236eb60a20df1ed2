"""`kernels` for a GPU: a program for each row, which reads it once. Run by Triton's interpreter in the tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl.objectives.kernels import Pulls, Rows
from kdrl.objectives.logspace import LOG_FLOOR


@triton.jit
def _read(z, top, logs, entropy, width, stride, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # Running maximum, sum of e = exp(z - max) and sum of e (z - max).
    most, total, mean = -1.0e30, 0.0, 0.0
    for start in range(0, width, BLOCK):
        at = start + lane
        value = tl.load(z + row * stride + at, mask=at < width, other=-float("inf"))
        raised = tl.maximum(most, tl.max(value, 0))
        shrink = tl.exp(most - raised)
        e = tl.exp(value - raised)
        mean = shrink * (mean + total * (most - raised)) + tl.sum(e * tl.maximum(value - raised, FLOOR), 0)
        total = shrink * total + tl.sum(e, 0)
        most = raised
    tl.store(top + row, most)
    tl.store(logs + row, tl.log(total))
    tl.store(entropy + row, tl.log(total) - mean / total)


@triton.jit
def _gradient(
    z,
    more,
    top,
    logs,
    entropy,
    flat,
    spread,
    width,
    stride,
    more_stride,
    MORE: tl.constexpr,
    SPREAD: tl.constexpr,
    NORMALISED: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    shift_top, shift_logs, pull = 0.0, 0.0, tl.load(flat + row)
    if not NORMALISED:
        shift_top, shift_logs = tl.load(top + row), tl.load(logs + row)
    for start in range(0, width, BLOCK):
        at = start + lane
        logp = tl.load(z + row * stride + at, mask=at < width, other=-float("inf")) - shift_top - shift_logs
        factor = pull + tl.zeros_like(logp)
        if SPREAD:
            factor += tl.load(spread + row) * (tl.maximum(logp, FLOOR) + tl.load(entropy + row))
        gradient = -tl.exp(logp) * factor
        if MORE:
            gradient += tl.load(more + row * more_stride + at, mask=at < width, other=0.0)
        tl.store(z + row * stride + at, gradient, mask=at < width)


def _block(width: int) -> int:
    return min(8192, triton.next_power_of_2(width))


def read_rows(z_CV: Tensor) -> Rows:
    """See `kernels.read_rows`."""
    rows = Rows(*(z_CV.new_empty(len(z_CV)) for _ in range(3)))
    width = z_CV.shape[1]
    if len(z_CV):
        _read[(len(z_CV),)](  # type: ignore[index]
            z_CV, rows.top_C, rows.logs_C, rows.entropy_C, width, z_CV.stride(0), FLOOR=LOG_FLOOR, BLOCK=_block(width)
        )
    return rows


def gradient_(z_CV: Tensor, rows: Rows, pulls: Pulls, flat_C: Tensor, normalised: bool) -> None:
    """See `kernels.gradient_`; the target's own part is left to the caller."""
    more_CV = z_CV if pulls.more_CV is None else pulls.more_CV.contiguous()
    spread_C = flat_C if pulls.entropy_C is None else pulls.entropy_C.contiguous()
    if len(z_CV):
        _gradient[(len(z_CV),)](  # type: ignore[index]
            z_CV,
            more_CV,
            rows.top_C,
            rows.logs_C,
            rows.entropy_C,
            flat_C.to(torch.float32).contiguous(),
            spread_C,
            z_CV.shape[1],
            z_CV.stride(0),
            more_CV.stride(0),
            MORE=pulls.more_CV is not None,
            SPREAD=pulls.entropy_C is not None,
            NORMALISED=normalised,
            FLOOR=LOG_FLOOR,
            BLOCK=_block(z_CV.shape[1]),
        )
