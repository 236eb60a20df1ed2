"""Matrix products that sum in float32 or better whatever the formats, a block of the vocabulary at a time.

On the CPU float32 goes through oneDNN, which is at least as fast as the BLAS behind `@` (twice on AMD processors, where
that is MKL); low-precision weights are widened a block at a time, never whole. On a GPU low-precision factors are
multiplied as they are and summed in float32. Without autograd: these are for inside a pass with its own gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of the vocabulary whose copies are held at once: 8 MiB in float32 at a width of 512.
_BLOCK = {"cpu": 1 << 12, "cuda": 1 << 15}
# Below so many multiplications oneDNN's own overhead is the larger part.
_WORTH_ONEDNN = 1 << 20


def wide_of(*tensors: Tensor) -> torch.dtype:
    """The widest format among the tensors, and at least float32."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def rows_by_columns(x_CD: Tensor, w_VD: Tensor) -> Tensor:
    """x w^T `[C, V]`."""
    wide = wide_of(x_CD, w_VD)
    if _natively(x_CD, w_VD):
        return torch.mm(x_CD, w_VD.T, out_dtype=torch.float32)
    x_CD = x_CD.to(wide)
    if w_VD.dtype == wide:
        return product(x_CD, w_VD)
    out_CV = x_CD.new_empty(len(x_CD), len(w_VD))
    for part in _blocks(w_VD):
        out_CV[:, part] = product(x_CD, w_VD[part].to(wide))
    return out_CV


def rows_by_rows(z_CV: Tensor, w_VD: Tensor) -> Tensor:
    """z w `[C, D]`; on a GPU z is rounded to the format of low-precision weights."""
    wide = wide_of(z_CV, w_VD)
    if z_CV.is_cuda and w_VD.dtype != wide:
        return torch.mm(z_CV.to(w_VD.dtype), w_VD, out_dtype=torch.float32)
    if w_VD.dtype == wide:
        return product(z_CV, w_VD.T)
    out_CD = z_CV.new_zeros(len(z_CV), w_VD.shape[1])
    for part in _blocks(w_VD):
        out_CD += product(z_CV[:, part], w_VD[part].to(wide).T)
    return out_CD


def add_columns_by_rows(sum_VD: Tensor, z_CV: Tensor, x_CD: Tensor) -> None:
    """Adds z^T x to the first V rows of `sum_VD` in place; on a GPU z is rounded to the format of x."""
    low = z_CV.is_cuda and x_CD.dtype != sum_VD.dtype
    if not low:
        x_CD = x_CD.to(sum_VD.dtype)
    columns_DC = x_CD.T.contiguous()
    for part in _blocks(z_CV.T):
        block_CV = z_CV[:, part]
        if low:
            sum_VD[part] += torch.mm(block_CV.T.to(x_CD.dtype), x_CD, out_dtype=torch.float32)
        else:
            sum_VD[part] += product(block_CV.T, columns_DC)


def _natively(x: Tensor, w: Tensor) -> bool:
    return x.is_cuda and x.dtype == w.dtype and x.dtype in (torch.bfloat16, torch.float16)


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = _BLOCK.get(rows.device.type, len(rows))
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size or 1))


def packed(y_NK: Tensor, rows: int) -> Tensor:
    """A copy of y as oneDNN lays it out, of use to `product` alone; y itself where there is no such layout.

    With as many rows of x, 64 or 8, a product takes 0.9 or 0.5 of the time; packing costs about as much as one product.
    """
    known = y_NK.dtype == torch.float32 or (y_NK.dtype == torch.bfloat16 and _BFLOAT16)
    if _ONEDNN is None or _PACK is None or not known or y_NK.device.type != "cpu":
        return y_NK
    return _PACK(y_NK.contiguous(), rows)


def product(x_MK: Tensor, y_NK: Tensor) -> Tensor:
    """x y^T `[M, N]` of one format; y may be packed."""
    if y_NK.is_mkldnn and _ONEDNN is not None:
        return _ONEDNN(x_MK, y_NK, None, "none", [], "")
    worth = len(x_MK) * y_NK.numel() >= _WORTH_ONEDNN
    if worth and x_MK.dtype == torch.float32 and x_MK.device.type == "cpu" and _ONEDNN is not None:
        return _ONEDNN(x_MK, y_NK, None, "none", [], "")
    return x_MK @ y_NK.T


_HAS = torch.backends.mkldnn.is_available()
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _HAS else None
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if _HAS else None
_BFLOAT16 = _HAS and torch.ops.mkldnn._is_mkldnn_bf16_supported()
