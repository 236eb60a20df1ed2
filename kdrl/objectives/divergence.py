"""Divergences between a teacher p and a student q over the last axis, in log-space.

Out here: the alpha-beta family, assistants other than the arithmetic mean, and gates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrl.objectives.specs import Divergence

# A teacher that rules a token out entirely gets this log-probability, so that reverse KL stays finite.
LOG_FLOOR = -1.0e4


def _expect(weight_log: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sum of exp(weight_log) (a - b) over the last axis, where an entry of zero weight counts zero."""
    gap = torch.where(torch.isneginf(weight_log), 0.0, a - b)
    return (weight_log.exp() * gap).sum(-1)


def _shared_support(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    """Drop entries that the student's model masks out (it cannot learn them); floor the teacher's zeros."""
    absent = torch.isneginf(logq)
    floor = torch.full((), LOG_FLOOR, dtype=logp.dtype, device=logp.device)
    return torch.where(absent, -torch.inf, torch.maximum(logp, floor)), logq


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p||q) from log-probabilities `[..., V]` to `[...]` in nats."""
    logp, logq = _shared_support(logp, logq)
    return _expect(logp, logp, logq)


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q||p) from log-probabilities `[..., V]` to `[...]` in nats."""
    logp, logq = _shared_support(logp, logq)
    return _expect(logq, logq, logp)


def jensen_shannon(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """J_beta = beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q attached (GKD, 2306.13649)."""
    logp, logq = _shared_support(logp, logq)
    absent = torch.isneginf(logq)
    # logaddexp(-inf, -inf) has a NaN gradient, so absent entries are given a finite stand-in first.
    p_safe, q_safe = torch.where(absent, LOG_FLOOR, logp), torch.where(absent, LOG_FLOOR, logq)
    logm = torch.logaddexp(math.log(beta) + p_safe, math.log1p(-beta) + q_safe)
    return beta * _expect(logp, p_safe, logm) + (1.0 - beta) * _expect(logq, q_safe, logm)


def divergence_of(spec: Divergence, logp: Tensor, logq: Tensor) -> Tensor:
    """The divergence that `spec` names, teacher `logp` and student `logq` `[..., V]` to `[...]`.

    `{jsd: b}` is J_b / (b(1-b)), which tends to forward KL at b = 0 and to reverse KL at b = 1.
    """
    if spec.kind == "forward_kl" or (spec.kind == "jsd" and spec.beta == 0.0):
        return forward_kl(logp, logq)
    if spec.kind == "reverse_kl" or (spec.kind == "jsd" and spec.beta == 1.0):
        return reverse_kl(logp, logq)
    assert spec.beta is not None
    value = jensen_shannon(logp, logq, spec.beta)
    return value if spec.scale == "paper" else value / (spec.beta * (1.0 - spec.beta))
