"""The leash in its forward direction, by enumeration over a small vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kdrl.objectives.terms import ReferenceKL, ReferenceKLConfig

from .reference import Array, as_tensor, close, kl, log_softmax, softmax, token_view


def term(**keys: Any) -> ReferenceKL:
    return ReferenceKL(ReferenceKLConfig.model_validate({"direction": "forward"} | keys))


def expected(made: ReferenceKL, z: Array, reference: Array, right: bool = True, writer: Array | None = None) -> Any:
    """E over the writer's tokens (default: the student's) of value and gradient on the logits."""
    leaf = as_tensor(z).requires_grad_()
    logq = leaf.log_softmax(-1)
    drawn = softmax(z) if writer is None else writer
    view = token_view(
        logq,
        reference_N=as_tensor(np.log(reference)),
        correct_N=torch.full((len(z),), right),
        old_N=None if writer is None else as_tensor(np.log(writer)),
    )
    loss = (as_tensor(drawn) * made.loss(view)).sum()
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad.numpy()


@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_the_kl_from_the_reference(seed: int):
    random = np.random.default_rng(seed)
    z, reference = random.normal(size=6), softmax(random.normal(size=6))
    value, gradient = expected(term(clamp=None), z, reference)
    close(value, kl(reference, softmax(z)))
    close(gradient, softmax(z) - reference)
    writer = softmax(random.normal(size=6))
    value, gradient = expected(term(clamp=None), z, reference, writer=writer)
    close(value, kl(reference, softmax(z)))
    close(gradient, softmax(z) - reference)


@pytest.mark.parametrize(("right", "phi"), [(True, 0.5), (False, 2.0)])
def test_a_tempered_reference_pulls_to_its_normalised_form_times_its_mass(right: bool, phi: float):
    random = np.random.default_rng(7)
    z, reference = random.normal(size=5), softmax(random.normal(size=5))
    made = term(clamp=None, power={"right": 0.5, "wrong": 2.0})
    value, gradient = expected(made, z, reference, right)
    mass = (reference**phi).sum()
    target = reference**phi / mass
    close(gradient, mass * (softmax(z) - target))
    close(value, mass * kl(target, softmax(z)) + mass * np.log(mass) - mass + 1)
    close(expected(made, np.log(target), reference, right)[1], 0.0)


def test_differentiating_the_estimate_itself_would_descend_something_else():
    """d/dz E_q[u log u - u + 1] with samples held fixed is that of E_ref[(log u)^2] / 2, not of the KL."""
    random = np.random.default_rng(8)
    z, reference = random.normal(size=5), softmax(random.normal(size=5))
    leaf = as_tensor(z).requires_grad_()
    u = as_tensor(reference) / leaf.log_softmax(-1).exp()
    (as_tensor(softmax(z)) * (u * u.log() - u + 1)).sum().backward()
    assert leaf.grad is not None
    log_u = np.log(reference) - log_softmax(z)
    score = np.eye(5) - softmax(z)
    close(leaf.grad.numpy(), -(reference * log_u) @ score)
    assert np.abs(leaf.grad.numpy() - (softmax(z) - reference)).max() > 1e-2


def test_the_clamp_bounds_the_coefficient():
    leaf = as_tensor([-9.0, -1.0]).requires_grad_()
    view = token_view(leaf, reference_N=as_tensor([-1.0, -9.0]))
    term(clamp=2.0).loss(view).sum().backward()
    assert leaf.grad is not None
    close(leaf.grad.numpy(), 1 - np.exp([2.0, -2.0]))


def test_settings_that_choose_nothing_are_refused_and_the_rest_reads_back():
    with pytest.raises(ValidationError, match="estimator chooses among those of the reverse KL"):
        term(estimator="k3")
    with pytest.raises(ValidationError, match="power tempers the reference of `direction: forward`"):
        term(direction="reverse", power={"right": 0.5})
    for keys in ({}, {"power": {"right": 0.5, "wrong": 1.5}}, {"direction": "reverse", "estimator": "k3"}):
        config = term(**keys).config
        assert ReferenceKLConfig.model_validate(config.model_dump()) == config
    assert term(power={"right": 0.5}).needs.rewards
    assert not term().needs.rewards
