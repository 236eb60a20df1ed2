"""Every divergence over the whole vocabulary: value and gradient against the formulas, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.specs import Divergence

from .reference import (
    DIVERGENCES,
    Array,
    as_tensor,
    autograd,
    close,
    gradient_of,
    kl,
    logit_pairs,
    quick,
    softmax,
    value_of,
)

every_divergence = pytest.mark.parametrize("spec", DIVERGENCES, ids=str)
INF = np.inf


def measure(spec: Any, teacher: Array, student: Array) -> tuple[Array, Array]:
    """kdrl's value and gradient on the student's logits."""
    parsed = Divergence.model_validate(spec)
    logp = as_tensor(teacher).log_softmax(-1)
    return autograd(lambda z: divergence_of(parsed, logp, z.log_softmax(-1)), student)


@every_divergence
def test_reference_gradients_are_those_of_reference_values(spec: Any):
    random = np.random.default_rng(1)
    p, z = softmax(random.normal(size=5)), random.normal(size=5)
    steps = 1e-6 * np.eye(5)
    slopes = [(value_of(spec, p, softmax(z + h)) - value_of(spec, p, softmax(z - h))) / 2e-6 for h in steps]
    close(gradient_of(spec, p, softmax(z)), slopes, 1e-7)


@every_divergence
@given(pair=logit_pairs())
@quick
def test_value_and_gradient_equal_the_formula(spec: Any, pair: tuple[Array, Array]):
    p, q = softmax(pair[0]), softmax(pair[1])
    value, gradient = measure(spec, *pair)
    close(value, value_of(spec, p, q))
    close(gradient, gradient_of(spec, p, q))


@every_divergence
@given(pair=logit_pairs(bound=30.0))
@quick
def test_never_negative_and_zero_only_where_the_student_is_the_teacher(spec: Any, pair: tuple[Array, Array]):
    value, _ = measure(spec, *pair)
    assert value >= -1e-12
    if np.abs(softmax(pair[0]) - softmax(pair[1])).max() > 1e-3:
        assert value > 1e-9


@every_divergence
@given(pair=logit_pairs(), shift=st.floats(-50, 50))
@quick
def test_value_and_gradient_vanish_at_the_teacher(spec: Any, pair: tuple[Array, Array], shift: float):
    value, gradient = measure(spec, pair[0], pair[0] + shift)
    close(value, 0.0, 1e-11)
    close(gradient, np.zeros_like(gradient), 1e-11)


@every_divergence
@given(pair=logit_pairs(), other=st.integers(0, 6))
@quick
def test_another_teacher_gives_another_gradient(spec: Any, pair: tuple[Array, Array], other: int):
    teacher, student = pair
    moved = teacher.copy()
    moved[other % len(teacher)] += 1.0
    difference = measure(spec, moved, student)[1] - measure(spec, teacher, student)[1]
    expected = gradient_of(spec, softmax(moved), softmax(student)) - gradient_of(
        spec, softmax(teacher), softmax(student)
    )
    close(difference, expected)
    # Where both are nearly sure of different tokens little is left, and never nothing.
    assert np.abs(difference).max() > 1e-14


@pytest.mark.parametrize("scale", ["limits", "paper"])
def test_jensen_shannon_tends_to_the_two_kls_at_its_ends_only_under_scale_limits(scale: str):
    random = np.random.default_rng(3)
    teacher, student = random.normal(size=6), random.normal(size=6)
    p, q = softmax(teacher), softmax(student)
    for beta, end, name in ((1e-6, kl(p, q), "forward_kl"), (1 - 1e-6, kl(q, p), "reverse_kl")):
        value, gradient = measure({"jsd": {"beta": beta, "scale": scale}}, teacher, student)
        factor = 1.0 if scale == "limits" else beta * (1 - beta)
        close(value / factor, end, 1e-4)
        close(gradient / factor, gradient_of(name, p, q), 1e-4)


@pytest.mark.parametrize("beta", [0.03, 0.5, 0.9])
@given(pair=logit_pairs())
@quick
def test_the_paper_scale_is_bounded_and_beta_times_one_minus_beta_of_the_other(beta: float, pair: tuple[Array, Array]):
    paper = measure({"jsd": {"beta": beta, "scale": "paper"}}, *pair)
    limits = measure({"jsd": beta}, *pair)
    close(paper[0], beta * (1 - beta) * limits[0])
    close(paper[1], beta * (1 - beta) * limits[1])
    # The mutual information of a coin and what it picks cannot exceed the coin's entropy.
    assert paper[0] <= -beta * np.log(beta) - (1 - beta) * np.log(1 - beta) + 1e-12


@every_divergence
@given(data=st.data(), pair=logit_pairs(most=5))
@quick
def test_minus_infinity_on_either_side_stays_finite(spec: Any, data: st.DataObject, pair: tuple[Array, Array]):
    size = len(pair[0])
    kept = st.lists(st.booleans(), min_size=size, max_size=size).filter(any)
    teacher, student = (np.where(data.draw(kept), logits, -INF) for logits in pair)
    value, gradient = measure(spec, teacher, student)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    close(gradient[np.isneginf(student)], 0.0)
    close(gradient.sum(), 0.0)


@pytest.mark.parametrize("spec", [spec for spec in DIVERGENCES if spec not in ("reverse_kl", {"jsd": 1.0})], ids=str)
def test_a_token_the_teacher_rules_out_counts_as_probability_zero(spec: Any):
    teacher, student = np.array([0.3, -INF, 1.0, -INF]), np.array([0.1, 0.9, -1.0, 0.0])
    p, q = softmax(teacher), softmax(student)
    value, gradient = measure(spec, teacher, student)
    close(value, value_of(spec, p, q))
    close(gradient, gradient_of(spec, p, q))


def test_reverse_kl_drives_mass_off_a_token_the_teacher_rules_out():
    value, gradient = measure("reverse_kl", np.array([0.3, -INF, 1.0]), np.array([0.1, 0.9, -1.0]))
    assert value > 100.0, "the true value is infinite"
    assert gradient[1] > 0 > max(gradient[0], gradient[2])


@every_divergence
def test_a_token_that_both_rule_out_changes_nothing(spec: Any):
    teacher, student = np.array([0.3, 1.0, -0.7]), np.array([0.1, -1.0, 0.4])
    value, gradient = measure(spec, teacher, student)
    wide_value, wide_gradient = measure(spec, np.append(teacher, -INF), np.append(student, -INF))
    close(wide_value, value)
    close(wide_gradient, np.append(gradient, 0.0))


@every_divergence
def test_a_token_that_only_the_student_rules_out_leaves_no_negative_divergence(spec: Any):
    # Whatever is done with the teacher's mass there, a divergence below zero is not one.
    value, _ = measure(spec, np.array([1.0, 0.0, 0.0]), np.array([1.0, -INF, -INF]))
    assert value >= -1e-12


@every_divergence
def test_rows_do_not_mix(spec: Any):
    random = np.random.default_rng(5)
    teacher, student = random.normal(size=(2, 3, 4)), random.normal(size=(2, 3, 4))
    value, gradient = measure(spec, teacher, student)
    assert value.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        alone = measure(spec, teacher[i, j], student[i, j])
        close(value[i, j], alone[0])
        close(gradient[i, j], alone[1])


@every_divergence
def test_float32_agrees_with_float64_on_a_large_peaked_vocabulary(spec: Any):
    random = np.random.default_rng(7)
    teacher, student = 8 * random.normal(size=2000), 8 * random.normal(size=2000)
    exact = value_of(spec, softmax(teacher), softmax(student))
    parsed = Divergence.model_validate(spec)
    logp, logq = (torch.tensor(z, dtype=torch.float32).log_softmax(-1) for z in (teacher, student))
    close(divergence_of(parsed, logp, logq).item(), exact, 1e-4)
