"""Top-k support with a tail outcome: what it keeps of the full divergence, and that peaked teachers do not break it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl.objectives.support import bucket, teacher_topk
from kdrl.objectives.terms import DistillConfig

from .reference import (
    DIVERGENCES,
    Array,
    as_tensor,
    autograd,
    close,
    distribution_loss,
    gradient_of,
    log_softmax,
    logit_pairs,
    quick,
    slope_of,
    softmax,
    value_of,
)

every_divergence = pytest.mark.parametrize("spec", DIVERGENCES, ids=str)


def measure(spec: Any, support: Any, teacher: Array, student: Array) -> tuple[Array, Array]:
    config = DistillConfig.model_validate({"divergence": spec, "support": support})
    logp = as_tensor(teacher).log_softmax(-1)
    return autograd(lambda z: distribution_loss(config, logp, z.log_softmax(-1)), student)


def by_hand(spec: Any, k: int, teacher: Array, student: Array) -> tuple[float, Array]:
    """The divergence of the K + 1 outcomes, and its gradient on the student's logits through the tail's sum."""
    p, q = softmax(teacher), softmax(student)
    if k >= len(p):
        return value_of(spec, p, q), gradient_of(spec, p, q)
    head = np.argsort(-teacher, kind="stable")[:k]
    tail = np.setdiff1d(np.arange(len(p)), head)
    few_p, few_q = (np.append(x[head], x[tail].sum()) for x in (p, q))
    few_slope = slope_of(spec, few_p, few_q)
    slope = np.empty_like(q)
    slope[head], slope[tail] = few_slope[:-1], few_slope[-1]
    return value_of(spec, few_p, few_q), q * (slope - (q * slope).sum())


@every_divergence
@given(pair=logit_pairs(), k=st.integers(1, 9))
@quick
def test_value_and_gradient_equal_those_of_the_k_plus_one_outcomes(spec: Any, pair: tuple[Array, Array], k: int):
    # Distinct teacher logits, so that "the k most likely" is one set.
    teacher = np.round(pair[0], 1) + 0.01 * np.arange(len(pair[0]))
    found, expected = measure(spec, {"topk": k}, teacher, pair[1]), by_hand(spec, k, teacher, pair[1])
    close(found[0], expected[0])
    close(found[1], expected[1])


@every_divergence
@given(pair=logit_pairs(), more=st.integers(0, 3))
@quick
def test_the_whole_vocabulary_as_head_is_full_support(spec: Any, pair: tuple[Array, Array], more: int):
    found, full = measure(spec, {"topk": len(pair[0]) + more}, *pair), measure(spec, "full", *pair)
    close(found[0], full[0])
    close(found[1], full[1])


@given(pair=logit_pairs(), k=st.integers(1, 6))
@quick
def test_forward_kl_gradient_is_the_full_one_in_the_head_and_scaled_student_mass_outside(
    pair: tuple[Array, Array], k: int
):
    teacher, student = np.round(pair[0], 1) + 0.01 * np.arange(len(pair[0])), pair[1]
    k = min(k, len(teacher) - 1)
    _, gradient = measure("forward_kl", {"topk": k}, teacher, student)
    _, full = measure("forward_kl", "full", teacher, student)
    p, q = softmax(teacher), softmax(student)
    order = np.argsort(-teacher, kind="stable")
    head, tail = order[:k], order[k:]
    close(gradient[head], full[head])
    close(gradient[tail], q[tail] * (1 - (1 - p[head].sum()) / (1 - q[head].sum())))
    close(gradient[tail].sum(), full[tail].sum())


@every_divergence
@given(pair=logit_pairs(bound=20.0))
@quick
def test_never_negative_and_growing_with_k_to_the_full_divergence(spec: Any, pair: tuple[Array, Array]):
    # Merging outcomes never increases an f-divergence.
    values = [measure(spec, {"topk": k}, *pair)[0] for k in range(1, len(pair[0]) + 1)]
    assert values[0] >= -1e-12
    assert all(small <= large + 1e-9 * (1 + large) for small, large in pairwise(values))
    close(values[-1], measure(spec, "full", *pair)[0])


@every_divergence
def test_zero_at_the_teacher(spec: Any):
    teacher = np.random.default_rng(2).normal(size=6)
    value, gradient = measure(spec, {"topk": 2}, teacher, teacher + 3.0)
    close(value, 0.0, 1e-12)
    close(gradient, np.zeros(6), 1e-12)


def test_the_head_is_the_teachers_and_not_the_students():
    logp, logq = torch.tensor([[0.1, 0.2, 0.6, 0.1]]).log(), torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log()
    ids = teacher_topk(logp, 2)
    assert ids.tolist() == [[2, 1]]
    close(bucket(logp, ids).exp(), [[0.6, 0.2, 0.2]], 1e-6)
    close(bucket(logq, ids).exp(), [[0.1, 0.1, 0.8]], 1e-6)
    assert bucket(logq, teacher_topk(logp, 9)).shape == (1, 4), "no tail outcome when every token is in the head"


@every_divergence
@pytest.mark.parametrize("peak", [20.0, 60.0, 300.0])
def test_peaked_teachers_keep_their_tail_in_float32(spec: Any, peak: float):
    # 1 - sum(head) is exactly zero here: the tail must come from its own outcomes.
    random = np.random.default_rng(4)
    teacher, student = np.append(peak, random.normal(size=30)), random.normal(size=31)
    config = DistillConfig.model_validate({"divergence": spec, "support": {"topk": 1}})
    leaf = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    logp = torch.tensor(teacher, dtype=torch.float32).log_softmax(-1)
    value = distribution_loss(config, logp, leaf.log_softmax(-1))
    value.backward()
    expected_value, expected_gradient = by_hand(spec, 1, teacher, student)
    assert leaf.grad is not None
    close(value.item(), expected_value, 3e-5)
    close(leaf.grad, expected_gradient, 3e-5)


@pytest.mark.parametrize("peak", [60.0, 300.0])
def test_peaked_students_keep_their_tail_in_float32(peak: float):
    student = np.append(peak, np.random.default_rng(4).normal(size=30))
    logq = torch.tensor(student, dtype=torch.float32).log_softmax(-1)
    head, tail = bucket(logq, torch.tensor([0]))
    close(head.item(), log_softmax(student)[0], 1e-5)
    close(tail.item(), np.log(np.exp(log_softmax(student)[1:]).sum()), 1e-5)


@every_divergence
@pytest.mark.parametrize("side", ["teacher", "student", "both"])
def test_a_tail_that_is_ruled_out_stays_finite(spec: Any, side: str):
    open_, shut = np.array([1.0, 0.2, -0.5]), np.array([1.0, -np.inf, -np.inf])
    teacher, student = (shut if side in (name, "both") else open_ for name in ("teacher", "student"))
    value, gradient = measure(spec, {"topk": 1}, teacher, student)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
