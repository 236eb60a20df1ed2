"""Sampled-token estimators: expected gradients by enumeration of every token, on-policy and on stale samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdrl.objectives.terms import Distill, DistillConfig, ReferenceKL, ReferenceKLConfig

from .reference import (
    Array,
    as_tensor,
    autograd,
    close,
    gradient_of,
    log_softmax,
    logit_pairs,
    quick,
    softmax,
    token_view,
)

# What an estimator descends, by where it stands: the whole list of pairs that can be built.
TEACHES: dict[tuple[str, Any], list[str | None]] = {
    ("reverse_kl", "k1"): [None, "advantage"],
    ("reverse_kl", "k2"): [None, "loss"],
    ("reverse_kl", "k3"): [None, "straight_through"],
    ("forward_kl", "k3"): ["loss"],
}
SOUND = [(divergence, name, place) for (divergence, name), places in TEACHES.items() for place in places]
every_sound_pair = pytest.mark.parametrize(("divergence", "estimator", "place"), SOUND)
PLACES = [None, "loss", "advantage", "straight_through"]


def support_of(estimator: str, place: str | None) -> dict[str, Any]:
    return {"token": estimator if place is None else {"estimator": estimator, "as": place}}


def distill(divergence: Any, estimator: str, place: str | None, **keys: Any) -> Distill:
    spec = {"divergence": divergence, "support": support_of(estimator, place)} | keys
    return Distill(DistillConfig.model_validate(spec))


def loss_per_token(term: Distill | ReferenceKL, teacher: Array, z_V: Tensor, old: Array | None = None) -> Tensor:
    """The term's loss for each token of the vocabulary as if it had been sampled."""
    old_N = None if old is None else as_tensor(log_softmax(old))
    logp_N = as_tensor(log_softmax(teacher))
    return term.loss(token_view(z_V.log_softmax(-1), teacher_N=logp_N, reference_N=logp_N, old_N=old_N))


def expected_gradient(term: Distill | ReferenceKL, teacher: Array, student: Array, old: Array | None = None) -> Array:
    """E over tokens sampled from the old policy (default: the student's) of the gradient on the student's logits."""
    weight_V = as_tensor(softmax(student if old is None else old))
    return autograd(lambda z: (weight_V * loss_per_token(term, teacher, z, old)).sum(), student)[1]


@every_sound_pair
@given(pair=logit_pairs(bound=2.0))
@quick
def test_expected_gradient_is_exact_on_policy(
    divergence: str, estimator: str, place: str | None, pair: tuple[Array, Array]
):
    found = expected_gradient(distill(divergence, estimator, place), *pair)
    close(found, gradient_of(divergence, softmax(pair[0]), softmax(pair[1])))


@every_sound_pair
@given(pair=logit_pairs(bound=2.0), seed=st.integers(0, 99))
@quick
def test_expected_gradient_is_exact_on_stale_samples(
    divergence: str, estimator: str, place: str | None, pair: tuple[Array, Array], seed: int
):
    old = pair[1] + np.random.default_rng(seed).normal(size=len(pair[1]))
    exact = gradient_of(divergence, softmax(pair[0]), softmax(pair[1]))
    close(expected_gradient(distill(divergence, estimator, place), *pair, old=old), exact)


def test_stale_samples_without_their_ratio_would_be_biased():
    random = np.random.default_rng(0)
    teacher, student, old = random.normal(size=(3, 5))
    weight_V = as_tensor(softmax(old))
    term = distill("reverse_kl", "k2", None)
    biased = autograd(lambda z: (weight_V * loss_per_token(term, teacher, z)).sum(), student)[1]
    assert np.abs(biased - gradient_of("reverse_kl", softmax(teacher), softmax(student))).max() > 0.05


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("stale", [False, True])
def test_the_leash_to_the_initial_policy_descends_the_reverse_kl_to_it(estimator: str, stale: bool):
    random = np.random.default_rng(8)
    reference, student, other = random.normal(size=(3, 5))
    term = ReferenceKL(ReferenceKLConfig.model_validate({"estimator": estimator}))
    found = expected_gradient(term, reference, student, other if stale else None)
    close(found, gradient_of("reverse_kl", softmax(reference), softmax(student)))


@every_sound_pair
def test_another_teacher_gives_another_gradient(divergence: str, estimator: str, place: str | None):
    random = np.random.default_rng(9)
    first, second, student = random.normal(size=(3, 5))
    term = distill(divergence, estimator, place)
    for i in range(5):
        one, two = (autograd(lambda z, t=t, i=i: loss_per_token(term, t, z)[i], student)[1] for t in (first, second))
        assert np.abs(one - two).max() > 1e-3


@every_sound_pair
def test_the_teacher_gets_no_gradient_and_agreement_gives_none(divergence: str, estimator: str, place: str | None):
    student = np.random.default_rng(10).normal(size=5)
    z = as_tensor(student).requires_grad_()
    logp = as_tensor(student).log_softmax(-1).requires_grad_()
    distill(divergence, estimator, place).loss(token_view(z.log_softmax(-1), teacher_N=logp)).sum().backward()
    assert logp.grad is None
    assert z.grad is not None
    close(z.grad, np.zeros(5), 1e-12)


@pytest.mark.parametrize(
    ("estimator", "place", "value"),
    [
        ("k2", "loss", lambda r: r**2 / 2),
        ("k3", "straight_through", lambda r: np.exp(r) - r - 1),
        ("k3", "loss", lambda r: np.exp(r) - r - 1),
    ],
)
@pytest.mark.parametrize("ratio", [-4.0, -0.5, 0.0, 0.3, 4.0])
def test_value_is_the_estimators(estimator: str, place: str, value: Any, ratio: float):
    term = distill("forward_kl" if (estimator, place) == ("k3", "loss") else "reverse_kl", estimator, place)
    logq = as_tensor([-1.5])
    close(term.loss(token_view(logq, teacher_N=logq + ratio)), [value(ratio)])
    stale = term.loss(token_view(logq, teacher_N=logq + ratio, old_N=logq - 0.7))
    close(stale, [np.exp(0.7) * value(ratio)])


@every_sound_pair
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("clamp", [2.0, 10.0])
def test_beyond_the_clamp_the_gradient_is_the_clamps_and_never_zero(
    divergence: str, estimator: str, place: str | None, sign: float, clamp: float
):
    term = distill(divergence, estimator, place, clamp=clamp)
    expected = 1 - np.exp(sign * clamp) if divergence == "forward_kl" else -sign * clamp
    for distance in (clamp, clamp + 1.0, 3 * clamp, 500.0):
        r = sign * distance
        _, gradient = autograd(lambda q, r=r: term.loss(token_view(q, teacher_N=q.detach() + r)), np.array([-3.0]))
        close(gradient, [expected])
        assert gradient[0] != 0.0


@every_sound_pair
def test_without_a_clamp_the_gradient_follows_the_ratio(divergence: str, estimator: str, place: str | None):
    term = distill(divergence, estimator, place, clamp=None)
    for ratio in (-40.0, 12.0):
        expected = 1 - np.exp(ratio) if divergence == "forward_kl" else -ratio
        _, gradient = autograd(lambda q, r=ratio: term.loss(token_view(q, teacher_N=q.detach() + r)), np.array([-3.0]))
        close(gradient, [expected])


def test_k2_beyond_the_clamp_is_the_function_whose_slope_its_gradient_is():
    term = distill("reverse_kl", "k2", "loss", clamp=2.0)

    def value(logq: float) -> float:
        return term.loss(token_view(as_tensor([logq]), teacher_N=as_tensor([-1.0]))).item()

    for logq in (-7.0, -4.0, -2.0, 0.5, 2.5):
        slope = (value(logq + 1e-5) - value(logq - 1e-5)) / 2e-5
        _, gradient = autograd(lambda q: term.loss(token_view(q, teacher_N=as_tensor([-1.0]))), np.array([logq]))
        close(slope, gradient[0], 1e-6)


@every_sound_pair
def test_a_sampled_token_that_the_teacher_rules_out_has_a_finite_loss(
    divergence: str, estimator: str, place: str | None
):
    # An infinite value would make the trainer skip the whole step.
    term = distill(divergence, estimator, place)
    value, gradient = autograd(lambda q: term.loss(token_view(q, teacher_N=as_tensor([-np.inf]))), np.array([-2.0]))
    close(gradient, [1 - np.exp(-10.0) if divergence == "forward_kl" else 10.0])
    assert np.isfinite(value).all()


REASONS = {
    ("jsd", "k1"): "jsd has no sampled-token estimator",
    ("jsd", "k2"): "jsd has no sampled-token estimator",
    ("jsd", "k3"): "jsd has no sampled-token estimator",
    ("k1", "loss"): "k1 cannot be differentiated as a loss: its expected gradient is zero",
    ("k1", "straight_through"): "k1 cannot be differentiated as a loss: its expected gradient is zero",
    ("k2", "advantage"): "k2 as an advantage is a biased gradient",
    ("k3", "advantage"): "k3 as an advantage is a biased gradient",
    ("forward_kl", "k1"): "descends the reverse KL",
    ("forward_kl", "k2"): "descends the reverse KL",
    ("forward_kl", "k3"): "descends the reverse KL",
    ("reverse_kl", "k3"): "descends the forward KL, not the reverse one",
    ("reverse_kl", "k2"): "k2 needs no straight-through form",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", {"jsd": 0.5}])
def test_a_pair_that_cannot_teach_is_refused_with_its_reason_and_every_other_is_built(
    divergence: Any, estimator: str, place: str | None
):
    kind = "jsd" if isinstance(divergence, dict) else divergence
    if place in TEACHES.get((kind, estimator), []):
        assert distill(divergence, estimator, place).config.support.place == (place or TEACHES[kind, estimator][1])
        return
    by_place = None if kind == "jsd" else REASONS.get((estimator, str(place)))
    with pytest.raises(ValidationError, match=by_place or REASONS[kind, estimator]) as caught:
        distill(divergence, estimator, place)
    assert "rite {" in str(caught.value) or "use `" in str(caught.value), "the sentence says what to write instead"


def test_what_is_refused_really_cannot_teach():
    random = np.random.default_rng(11)
    teacher, student = random.normal(size=(2, 6))
    p, q = softmax(teacher), softmax(student)
    logp, weight = as_tensor(np.log(p)), as_tensor(q)

    def expected(loss: Any) -> Array:
        return autograd(lambda z: (weight * loss(logp - z.log_softmax(-1), z.log_softmax(-1))).sum(), student)[1]

    forward, reverse = gradient_of("forward_kl", p, q), gradient_of("reverse_kl", p, q)
    close(expected(lambda r, logq: -r), np.zeros(6))
    close(expected(lambda r, logq: r.exp() - r - 1), forward)
    for advantage in (lambda r: r**2 / 2, lambda r: r.exp() - r - 1):
        found = expected(lambda r, logq, a=advantage: a(r.detach()) * logq)
        assert min(np.abs(found - forward).max(), np.abs(found - reverse).max()) > 1e-2


def test_a_clamp_where_nothing_is_sampled_is_refused():
    with pytest.raises(ValidationError, match="clamp bounds a sampled-token ratio"):
        DistillConfig.model_validate({"support": "full", "clamp": 5.0})
    with pytest.raises(ValidationError, match="clamp bounds a sampled-token ratio"):
        DistillConfig.model_validate({"support": {"topk": 4}, "clamp": 5.0})


@pytest.mark.parametrize("clamp", [0.0, -1.0])
def test_a_clamp_that_silences_the_teacher_is_refused(clamp: float):
    with pytest.raises(ValidationError):
        distill("reverse_kl", "k2", None, clamp=clamp)


def test_the_last_token_is_left_out_on_request():
    last_N = torch.tensor([False, True])
    kept_N = Distill(DistillConfig(skip_eos=True)).keep(last_N)
    assert kept_N is not None
    assert kept_N.tolist() == [True, False]
    assert Distill(DistillConfig()).keep(last_N) is None
