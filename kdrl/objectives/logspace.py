"""Arithmetic on log-probabilities that stays finite where a probability is zero."""

from __future__ import annotations

from torch import Tensor

# An outcome that one side rules out entirely counts as this log-probability, so that every divergence stays finite.
LOG_FLOOR = -1.0e4


def finite(logp: Tensor) -> Tensor:
    """Log-probabilities with -inf raised to LOG_FLOOR, where they have no gradient and no mass."""
    return logp.clamp(min=LOG_FLOOR)


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats over the last axis; outcomes of no probability count zero."""
    return -(logp.exp() * finite(logp)).sum(-1)
