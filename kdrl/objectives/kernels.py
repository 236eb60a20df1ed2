"""What the chunked head does to rows of logits: one reading for log-prob and entropy, one for their gradient in place.

Plain PyTorch goes a few rows at a time, so that what it works on stays in the cache and no second array of all rows is
made; on a GPU with Triton each is one kernel. Both give the same numbers to rounding.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kdrl.objectives.logspace import LOG_FLOOR, row_blocks


@dataclass(frozen=True)
class Rows:
    """Of each row of logits z: max z, log sum exp(z - max z), and the entropy of softmax z."""

    top_C: Tensor
    logs_C: Tensor
    entropy_C: Tensor

    def logp(self, z_CV: Tensor, target_C: Tensor) -> Tensor:
        """Log-probs of the targets."""
        return z_CV.gather(-1, target_C[:, None]).squeeze(-1) - self.top_C - self.logs_C

    def normalise_(self, z_CV: Tensor) -> Tensor:
        """Logits to log-probs in place."""
        return z_CV.sub_(self.top_C[:, None]).sub_(self.logs_C[:, None])

    def logits(self, logp_CV: Tensor) -> Tensor:
        """Log-probs back to logits, in a new tensor."""
        return logp_CV + (self.top_C + self.logs_C)[:, None]


def read_rows(z_CV: Tensor) -> Rows:
    """The numbers of `Rows`; logits of -inf count nothing."""
    if _fused(z_CV):
        return _triton().read_rows(z_CV)
    found = [_read(z_CV[part]) for part in row_blocks(z_CV)] or [_read(z_CV)]
    return Rows(*map(torch.cat, zip(*found, strict=True)))


def _read(z_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top_R1 = z_RV.amax(-1, keepdim=True)
    below_RV = z_RV - top_R1
    e_RV = below_RV.exp()
    sum_R = e_RV.sum(-1)
    mean_R = e_RV.mul_(below_RV.clamp_(min=LOG_FLOOR)).sum(-1) / sum_R
    logs_R = sum_R.log()
    return top_R1[:, 0], logs_R, logs_R - mean_R


def log_softmax_(z_CV: Tensor) -> Tensor:
    """Logits to log-probs in place, a few rows at a time."""
    for part in row_blocks(z_CV):
        z_CV[part] = z_CV[part].log_softmax(-1)
    return z_CV


@dataclass(frozen=True)
class Pulls:
    """Upstream gradients of a chunk: of the targets' log-probs, of entropies, and of log-probs `[C, V]`."""

    target_C: Tensor
    logp_C: Tensor | None = None
    entropy_C: Tensor | None = None
    more_CV: Tensor | None = None


def gradient_(z_CV: Tensor, rows: Rows, pulls: Pulls, *, normalised: bool = False) -> Tensor:
    """The gradient of logits in place of them (or of their log-probs, if `normalised`).

    With l = log softmax z, p = exp l, H its entropy: more - p (sum more + g + h (l + H)) + g at the target, for the
    upstream g of the target's log-prob, h of the entropy, and `more` of all log-probs.
    """
    flat_C = z_CV.new_zeros(len(z_CV))
    if pulls.logp_C is not None:
        flat_C = flat_C + pulls.logp_C
    if pulls.more_CV is not None:
        flat_C = flat_C + pulls.more_CV.sum(-1)
    if _fused(z_CV):
        _triton().gradient_(z_CV, rows, pulls, flat_C, normalised)
    else:
        for part in row_blocks(z_CV):
            _gradient_(z_CV[part], part, rows, pulls, flat_C[part], normalised)
    if pulls.logp_C is not None:
        z_CV.scatter_add_(-1, pulls.target_C[:, None], pulls.logp_C.to(z_CV.dtype)[:, None])
    return z_CV


def _gradient_(z_RV: Tensor, part: slice, rows: Rows, pulls: Pulls, flat_R: Tensor, normalised: bool) -> None:
    if not normalised:
        z_RV.sub_(rows.top_C[part, None]).sub_(rows.logs_C[part, None])
    p_RV = z_RV.exp()
    if pulls.entropy_C is None:
        p_RV.mul_(flat_R[:, None])
    else:
        h_R = pulls.entropy_C[part]
        z_RV.clamp_(min=LOG_FLOOR).mul_(h_R[:, None]).add_((flat_R + h_R * rows.entropy_C[part])[:, None])
        p_RV.mul_(z_RV)
    if pulls.more_CV is None:
        torch.neg(p_RV, out=z_RV)
    else:
        torch.sub(pulls.more_CV[part], p_RV, out=z_RV)


def _fused(z_CV: Tensor) -> bool:
    return z_CV.is_cuda and z_CV.dtype == torch.float32 and z_CV.is_contiguous() and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton() -> Any:
    from kdrl.objectives import kernels_triton

    return kernels_triton
