"""Sampled-token estimates of a KL and the gradient each one gives.

R = log p(y) - log q(y) for the sampled token y, teacher p, student q. On samples of q:
k1 as a score-function advantage and k2 as a loss both have the gradient of the token-local KL(q||p);
k3 as a loss has the gradient of KL(p||q). Pairs that cannot teach are refused in `specs.refuse_untaught`.
The clamp c bounds R inside the gradient's coefficient: a token beyond it keeps gradient c, never zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl.objectives.logspace import finite
from kdrl.objectives.support_specs import Support


def _clamp(ratio: Tensor, bound: float | None) -> Tensor:
    return ratio if bound is None else ratio.clamp(-bound, bound)


def _surrogate(value: Tensor, coefficient: Tensor, logq: Tensor) -> Tensor:
    """A tensor of the given value whose gradient is `coefficient` times that of log q."""
    return value.detach() + coefficient.detach() * (logq - logq.detach())


def token_loss(support: Support, logq: Tensor, logp: Tensor, clamp: float | None, rho: Tensor | None = None) -> Tensor:
    """Per-token loss of any one shape from student and teacher log-probs of the sampled tokens.

    `rho` is the importance ratio pi_theta/pi_old of stale samples; its detached value multiplies the loss.
    """
    logp, logq = finite(logp.detach()), finite(logq)
    ratio = logp - logq.detach()
    bounded = _clamp(ratio, clamp)
    if support.place == "advantage":
        loss = -bounded * logq
    elif support.estimator == "k2":
        # Linear beyond the clamp (Huber), so that value and gradient belong together.
        loss = _surrogate(bounded.square() / 2 + bounded.abs() * (ratio - bounded).abs(), -bounded, logq)
    else:
        value = bounded.exp() - bounded - 1.0
        coefficient = -bounded if support.place == "straight_through" else 1.0 - bounded.exp()
        loss = _surrogate(value, coefficient, logq)
    return loss if rho is None else rho.detach() * loss


def importance_ratio(logq: Tensor, old: Tensor | None) -> Tensor | None:
    """pi_theta/pi_old per token, or None when the samples are from the present policy."""
    return None if old is None else torch.exp(logq.detach() - old)
