"""The formulas of the catalogue in numpy that takes complex numbers, so that a complex step gives exact gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

import kdrl
from kdrl.objectives.distill import DistillConfig
from kdrl.objectives.schedules import START, Moment

from .reference import Array, as_tensor, autograd, distribution_loss

Formula = Callable[[Array], Any]


def pair(seed: int, size: int = 9) -> tuple[Array, Array]:
    """Teacher and student logits of one token."""
    random = np.random.default_rng(seed)
    return 2.2 * random.normal(size=size), 1.7 * random.normal(size=size)


def sm(z: Array, temperature: float = 1.0) -> Array:
    """Softmax."""
    e = np.exp((z - np.max(np.real(z))) / temperature)
    return e / e.sum()


def data(x: Array) -> Array:
    """x without its gradient."""
    return np.real(x)


def kl(x: Array, y: Array) -> Any:
    """Sum x log(x/y), also of what does not sum to one."""
    return (x * (np.log(x) - np.log(y))).sum()


def entropy(x: Array) -> Any:
    """In nats."""
    return -(x * np.log(x)).sum()


def ab(x: Array, y: Array, a: float, b: float) -> Any:
    """D_{a,b}(x||y) with a, b and a + b not zero (ABKD)."""
    return -(x**a * y**b - a / (a + b) * x ** (a + b) - b / (a + b) * y ** (a + b)).sum() / (a * b)


def mean(p: Array, q: Array, a: float, share: float) -> Array:
    """The power mean of AMiD, normalised."""
    k = (1 - a) / 2
    r = p**share * q ** (1 - share) if a == 1 else (share * p**k + (1 - share) * q**k) ** (1 / k)
    return r / r.sum()


def norm(x: Array) -> Array:
    """x over its sum."""
    return x / x.sum()


def stepped(formula: Formula, z: Array) -> tuple[float, Array]:
    """Value of a formula at logits z and its gradient on them by a complex step, exact to rounding."""
    gradient = np.zeros(len(z))
    for i in range(len(z)):
        moved = z.astype(complex)
        moved[i] += 1e-30j
        gradient[i] = np.imag(formula(moved)) / 1e-30
    return float(np.real(formula(z.astype(complex)))), gradient


def kdrl_of(spec: Mapping[str, Any], teacher: Array, student: Array, token: int = 0, **more: Any) -> tuple[Any, Array]:
    """Value and gradient of `kdrl.divergence` on the student's logits of one token, in float64."""
    reference = more.pop("reference", None)
    if reference is not None:
        more["reference_logits"] = as_tensor(reference)[None]
    at = torch.tensor([token])

    def loss(z: torch.Tensor) -> torch.Tensor:
        return kdrl.divergence(z[None], as_tensor(teacher)[None], spec, at, **more)[0]

    return autograd(loss, student)


def term_of(
    spec: Mapping[str, Any], teacher: Array, student: Array, token: Any = 0, moment: Moment = START, **more: Any
) -> tuple[Any, Array]:
    """The same from the term as a run calls it: `[V]` or `[N, V]` logits, any moment, temperature and data."""
    config = DistillConfig.model_validate(spec)
    logp = as_tensor(teacher).log_softmax(-1)
    token = np.broadcast_to(token, np.shape(student)[:-1]).copy()
    if "reference" in more:
        more["reference_CV"] = as_tensor(more.pop("reference")).reshape(-1, logp.shape[-1]).log_softmax(-1)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return distribution_loss(config, logp, z.log_softmax(-1), token, moment=moment, **more)

    return autograd(loss, student)
