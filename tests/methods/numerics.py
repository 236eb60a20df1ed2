"""Parts of formulas in plain numpy, for real and complex logits: nothing here comes from kdrl.

The imaginary part after a step of 1e-30 i is the exact derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Step:
    """N tokens of one optimizer step: teacher and initial student logits, tokens, rows, who wrote them, and when.

    `uniform_NK` are the numbers that draws are made from, `step` of `total` the moment.
    """

    teacher_NV: Array
    initial_NV: Array
    token_N: Array
    row_N: Array
    origin_N: Array
    uniform_NK: Array
    step: int = 5
    total: int = 20

    @property
    def progress(self) -> float:
        """Share of the run."""
        return self.step / self.total


Loss = Callable[[Step, Array], complex]

# What the scalars with a memory have come to in these tests.
GAMMA, TAID, SHARE = 0.35, 0.63, 0.5


def gradient(loss: Loss, step: Step, z: Array) -> Array:
    """d loss / d z `[N, V]` by complex steps."""
    out = np.zeros(z.shape)
    for at in np.ndindex(*z.shape):
        moved = z.astype(complex)
        moved[at] += 1e-30j
        out[at] = np.imag(loss(step, moved)) / 1e-30
    return out


# --- parts of formulas ---


def log_sm(z: Array, temperature: float | Array = 1.0) -> Array:
    z = z / temperature
    z = z - np.max(np.real(z), -1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def sm(z: Array, temperature: float | Array = 1.0) -> Array:
    return np.exp(log_sm(z, temperature))


def kl(a: Array, b: Array) -> Array:
    return (a * (np.log(a) - np.log(b))).sum(-1)


def entropy(a: Array) -> Array:
    return -(a * np.log(np.where(a > 0, a, 1.0))).sum(-1)


def mass(a: Array) -> Array:
    """Normalised."""
    return a / a.sum(-1, keepdims=True)


def pick(a: Array, token: Array) -> Array:
    return np.take_along_axis(a, token[:, None], -1)[:, 0]


def ce(s: Step, z: Array) -> Array:
    return -pick(log_sm(z), s.token_N)


def one_hot(s: Step, z: Array) -> Array:
    return np.eye(z.shape[-1])[s.token_N]


def mean(x: Array, keep: Array | None = None) -> complex:
    keep = np.ones(len(x), bool) if keep is None else keep
    return x[keep].sum() / keep.sum()


def by(s: Step, *origins: str) -> Array:
    return np.isin(s.origin_N, origins)


def of_sequences(s: Step, x: Array, keep: Array) -> complex:
    """Mean over each response's tokens, then over responses."""
    rows = [r for r in np.unique(s.row_N) if keep[s.row_N == r].any()]
    return sum(x[(s.row_N == r) & keep].mean() for r in rows) / len(rows)


def without(a: Array, token: Array) -> Array:
    """All entries but the token's, `[N, V-1]`."""
    return np.stack([np.delete(row, y) for row, y in zip(a, token, strict=True)])


def js(p: Array, q: Array, b: float) -> Array:
    m = b * p + (1 - b) * q
    return b * kl(p, m) + (1 - b) * kl(q, m)


def alpha_beta(x: Array, y: Array, a: float, b: float) -> Array:
    both = a + b
    return -(x**a * y**b - a / both * x**both - b / both * y**both).sum(-1) / (a * b)


def absolute(x: Array) -> Array:
    """|x|, differentiable at complex x near the real line."""
    return np.where(np.real(x) < 0, -x, x)


def outcomes(p: Array, q: Array, k: int, of: str, tail: bool) -> tuple[Array, Array]:
    """p and q over the k likeliest tokens of one of them, and with a tail of all others as one outcome."""
    order = np.argsort(-np.real(p if of == "teacher" else q), -1)
    head, rest = order[:, :k], order[:, k:]
    cut = []
    for dist in (p, q):
        inside = np.take_along_axis(dist, head, -1)
        outside = np.take_along_axis(dist, rest, -1).sum(-1, keepdims=True)
        cut.append(np.concatenate([inside, outside], -1) if tail else inside)
    return cut[0], cut[1]
