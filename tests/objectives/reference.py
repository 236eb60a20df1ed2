"""References written from the formulas in plain numpy, by enumeration; they share no code with kdrl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from kdrl.objectives.distill import Distill, DistillConfig
from kdrl.objectives.scores import Tokens
from kdrl.objectives.terms import TokenView

Array = np.ndarray
quick = settings(max_examples=15, deadline=None, derandomize=True)

DIVERGENCES: list[Any] = [
    "forward_kl",
    "reverse_kl",
    {"jsd": 0.0},
    {"jsd": 1.0},
    {"jsd": 0.03},
    {"jsd": 0.5},
    {"jsd": 0.9},
    {"jsd": {"beta": 0.25, "scale": "paper"}},
]


def log_softmax(z: Array) -> Array:
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def softmax(z: Array) -> Array:
    return np.exp(log_softmax(z))


def _sum_where(weight: Array, term: Array) -> float:
    return float(sum(w * t for w, t in zip(weight, term, strict=True) if w > 0))


def kl(p: Array, q: Array) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return _sum_where(p, np.log(p) - np.log(q))


def value_of(spec: Any, p: Array, q: Array) -> float:
    """D(p, q) of the spec for two distributions."""
    if spec in ("forward_kl", {"jsd": 0.0}):
        return kl(p, q)
    if spec in ("reverse_kl", {"jsd": 1.0}):
        return kl(q, p)
    paper = isinstance(spec["jsd"], dict)
    b = spec["jsd"]["beta"] if paper else spec["jsd"]
    m = b * p + (1 - b) * q
    return (b * kl(p, m) + (1 - b) * kl(q, m)) / (1 if paper else b * (1 - b))


def slope_of(spec: Any, p: Array, q: Array) -> Array:
    """dD/dq_v up to a constant over v, by hand: -p/q for KL(p||q), log(q/p) for KL(q||p), (1-b) log(q/m) for J_b."""
    if spec in ("forward_kl", {"jsd": 0.0}):
        return -p / q
    if spec in ("reverse_kl", {"jsd": 1.0}):
        return np.log(q) - np.log(p)
    paper = isinstance(spec["jsd"], dict)
    b = spec["jsd"]["beta"] if paper else spec["jsd"]
    return (1 - b) * (np.log(q) - np.log(b * p + (1 - b) * q)) / (1 if paper else b * (1 - b))


def to_logits(q: Array, slope: Array) -> Array:
    """The gradient on logits z of q = softmax(z) from the gradient on q."""
    return q * (slope - (q * slope).sum())


def gradient_of(spec: Any, p: Array, q: Array) -> Array:
    """dD/dz for q = softmax(z)."""
    return to_logits(q, slope_of(spec, p, q))


def autograd(loss: Callable[[Tensor], Tensor], z: Array) -> tuple[Array, Array]:
    """The loss from logits `z` and the gradient of its sum on them, in float64."""
    leaf = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    value = loss(leaf)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach().numpy(), leaf.grad.numpy()


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Assert equality to rounding, relative to the size of what is expected."""
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@st.composite
def logit_pairs(draw: st.DrawFn, bound: float = 6.0, most: int = 7) -> tuple[Array, Array]:
    """Teacher and student logits over one vocabulary of 2 to `most` tokens."""
    size = draw(st.integers(2, most))
    values = arrays(np.float64, size, elements=st.floats(-bound, bound, width=32))
    return draw(values), draw(values)


def as_tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def token_view(logq_N: Tensor, row_N: Any = None, **fields: Any) -> TokenView:
    """A view of N tokens, each its own response unless `row_N` says otherwise; every token is kept."""
    count = len(logq_N)
    rows_N = torch.arange(count) if row_N is None else torch.as_tensor(row_N)
    defaults: dict[str, Any] = {
        "rows": int(rows_N.max()) + 1 if count else 0,
        "last_N": torch.zeros(count, dtype=torch.bool),
        "keep_N": torch.ones(count, dtype=torch.bool),
        "reward_N": torch.zeros(count, dtype=torch.float64),
        "correct_N": torch.zeros(count, dtype=torch.bool),
    }
    return TokenView(logq_N=logq_N, row_N=rows_N, **(defaults | fields))


def tokens_of(logp_CV: Tensor, logq_CV: Tensor, token_C: Any = None, **more: Any) -> Tokens:
    """What a comparison sees of C tokens whose distributions are these."""
    token_C = torch.zeros(len(logq_CV), dtype=torch.long) if token_C is None else torch.as_tensor(token_C)
    pick = token_C[:, None]
    return Tokens(
        data=more.pop("data", {}),
        logq_C=logq_CV.detach().gather(-1, pick)[:, 0],
        logp_C=logp_CV.gather(-1, pick)[:, 0],
        token_C=token_C,
        logp_CV=logp_CV,
        logq_CV=logq_CV.detach(),
        **more,
    )


def distribution_loss(config: DistillConfig, logp: Tensor, logq: Tensor, token: Any = None, **more: Any) -> Tensor:
    """The loss per token of a distillation term from log-probs `[..., V]`."""
    flat_p, flat_q = logp.reshape(-1, logp.shape[-1]), logq.reshape(-1, logq.shape[-1])
    token = None if token is None else torch.as_tensor(token).reshape(-1)
    tokens = tokens_of(flat_p, flat_q, token, **more)
    return Distill(config).compare(tokens, flat_q)[:, 0].reshape(logq.shape[:-1])
