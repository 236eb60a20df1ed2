"""Which outcomes a divergence sees: the whole vocabulary, or the teacher's top-k and one tail outcome."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl.objectives.divergence import finite


def _tail(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log mass outside `ids`, computed from the outcomes themselves and never as 1 - sum."""
    # Raised off -inf first: a tail in which every outcome is ruled out would have a NaN gradient.
    return finite(logp_NV.scatter(-1, ids_NK, -torch.inf)).logsumexp(-1, keepdim=True)


def bucket(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities of the outcomes `ids` and of all others together: `[N, K+1]` (`[N, K]` when K = V).

    Inside the head and on the total tail mass its KL gradient equals the full one; the tail's shape is untouched.
    """
    head = logp_NV.gather(-1, ids_NK)
    if ids_NK.shape[-1] >= logp_NV.shape[-1]:
        return head
    return torch.cat([head, _tail(logp_NV, ids_NK)], dim=-1)


def teacher_topk(logp_NV: Tensor, k: int) -> Tensor:
    """Ids `[N, K]` of the teacher's k most likely tokens (all of them when k exceeds the vocabulary)."""
    return logp_NV.topk(min(k, logp_NV.shape[-1]), dim=-1).indices
