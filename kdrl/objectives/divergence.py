"""Divergences between a teacher p and a student q over the last axis, in log-space.

Out here: the alpha-beta family, assistants other than the arithmetic mean, and gates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrl.objectives.specs import Divergence

# An outcome that one side rules out entirely counts as this log-probability, so that every divergence stays finite.
LOG_FLOOR = -1.0e4


def finite(logp: Tensor) -> Tensor:
    """Log-probabilities with -inf raised to LOG_FLOOR, where they have no gradient and no mass."""
    return logp.clamp(min=LOG_FLOOR)


def _expect(weight_log: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sum of exp(weight_log) (a - b) over the last axis."""
    return (weight_log.exp() * (a - b)).sum(-1)


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p||q) from log-probabilities `[..., V]` to `[...]` in nats."""
    logp, logq = finite(logp), finite(logq)
    return _expect(logp, logp, logq)


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q||p) from log-probabilities `[..., V]` to `[...]` in nats."""
    logp, logq = finite(logp), finite(logq)
    return _expect(logq, logq, logp)


def jensen_shannon(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """J_beta = beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q attached (GKD, 2306.13649)."""
    logp, logq = finite(logp), finite(logq)
    logm = torch.logaddexp(math.log(beta) + logp, math.log1p(-beta) + logq)
    return beta * _expect(logp, logp, logm) + (1.0 - beta) * _expect(logq, logq, logm)


def divergence_of(spec: Divergence, logp: Tensor, logq: Tensor) -> Tensor:
    """The divergence that `spec` names, teacher `logp` and student `logq` `[..., V]` to `[...]`.

    `{jsd: b}` is J_b / (b(1-b)), which tends to forward KL at b = 0 and to reverse KL at b = 1.
    """
    if spec.kind == "forward_kl":
        return forward_kl(logp, logq)
    if spec.kind == "reverse_kl":
        return reverse_kl(logp, logq)
    assert spec.beta is not None
    value = jensen_shannon(logp, logq, spec.beta)
    return value if spec.scale == "paper" else value / (spec.beta * (1.0 - spec.beta))
