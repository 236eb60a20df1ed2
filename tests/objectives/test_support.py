"""Top-k supports: what each keeps of the full divergence, and that peaked teachers do not break them; ranking."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdrl.objectives.support import bucket, teacher_topk
from kdrl.objectives.terms import Distill, DistillConfig

from .numbers import ab, kdrl_of, pair, sm, stepped
from .numbers import kl as kl_of
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
    tokens_of,
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


# ---------------------------------------------------------------- what becomes of the rest


def covered_by(teacher: Array, student: Array, k: int, of: str, top_p: float | None = None) -> Array:
    """Which tokens a truncation chooses, one by one."""
    by, chosen, mass = teacher if of == "teacher" else student, np.zeros(len(teacher), bool), 0.0
    for v in np.argsort(-by)[:k]:
        chosen[v] = top_p is None or mass < top_p
        mass += softmax(teacher)[v]
    return chosen


RESTS = ("tail", "renormalise_teacher", "partial", "renormalise")


def outcomes(p: Any, q: Any, inside: Array, rest: str) -> tuple[Any, Any]:
    """Teacher and student over what a truncation leaves, possibly complex."""
    p_in, q_in = p[inside], q[inside]
    if rest == "tail":
        return np.append(p_in, p[~inside].sum()), np.append(q_in, q[~inside].sum())
    if rest == "renormalise_teacher":
        return p_in / p_in.sum(), q_in
    if rest == "renormalise":
        return p_in / p_in.sum(), q_in / q_in.sum()
    return p_in, q_in


FORMULAS: dict[str, Any] = {
    "forward_kl": (kl_of, "forward_kl"),
    "reverse_kl": (lambda p, q: kl_of(q, p), "reverse_kl"),
    "tv": (lambda p, q: 0.5 * ((p - q) * np.sign(np.real(p - q))).sum(), "tv"),
    "jsd": (
        lambda p, q: kl_of(p, 0.4 * p + 0.6 * q) / 0.6 + kl_of(q, 0.4 * p + 0.6 * q) / 0.4,
        {"jsd": 0.4},
    ),
    "alpha_beta": (lambda p, q: ab(p, q, 0.2, 0.7), {"alpha_beta": {"alpha": 0.2, "beta": 0.7}}),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("top_p", [None, 0.6, 0.95])
@pytest.mark.parametrize("of", ["teacher", "student"])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("name", FORMULAS)
def test_every_truncation_is_the_divergence_of_what_it_leaves(
    name: str, rest: str, of: str, top_p: float | None, seed: int
):
    formula, spec = FORMULAS[name]
    if rest in ("renormalise_teacher", "partial") and name not in ("forward_kl", "tv"):
        return
    if top_p is not None and of == "student":
        return
    teacher, student = pair(seed)
    inside = covered_by(teacher, student, 5, of, top_p)
    assert 0 < inside.sum() <= 5

    def by_formula(z: Array) -> Any:
        return formula(*outcomes(softmax(teacher), sm(z), inside, rest))

    expected = stepped(by_formula, student)
    found = measure(spec, {"topk": {"k": 5, "of": of, "rest": rest, "top_p": top_p}}, teacher, student)
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("of", ["teacher", "student"])
@pytest.mark.parametrize("k", [1, 3, 8, 9, 20])
def test_gradients_of_the_table(k: int, of: str):
    """Forward KL, by hand: with P and Q the masses of the chosen tokens; all tokens chosen, every rest is full."""
    teacher, student = pair(5)
    p, q, inside = softmax(teacher), softmax(student), covered_by(*pair(5), k, of)
    mass_p, mass_q = p[inside].sum(), q[inside].sum()
    outside = q * (1 - (1 - mass_p) / (1 - mass_q)) if k < len(p) else q
    table = {
        "tail": np.where(inside, q - p, outside),
        "renormalise_teacher": q - inside * p / mass_p,
        "partial": mass_p * q - inside * p,
        "renormalise": inside * (q / mass_q - p / mass_p),
    }
    for rest, gradient in table.items():
        found = measure("forward_kl", {"topk": {"k": k, "of": of, "rest": rest}}, teacher, student)
        close(found[1], gradient)
        if k >= len(p):
            close(found[1], q - p)


def test_the_bias_of_each_truncation_where_the_student_is_the_teacher():
    """`tail` and `renormalise` rest there; the two over-sharp ones rest at p_K/P instead."""
    teacher, _ = pair(5)
    p, inside = softmax(teacher), covered_by(teacher, teacher, 3, "teacher")
    for rest, still in (("tail", True), ("renormalise", True), ("renormalise_teacher", False), ("partial", False)):
        gradient = measure("forward_kl", {"topk": {"k": 3, "rest": rest}}, teacher, teacher)[1]
        assert (np.abs(gradient).max() < 1e-12) == still, rest
    over_sharp = np.where(inside, np.log(p), -60.0)
    for rest in ("renormalise_teacher", "partial"):
        gradient = measure("forward_kl", {"topk": {"k": 3, "rest": rest}}, teacher, over_sharp)[1]
        assert np.abs(gradient).max() < 1e-12


@pytest.mark.parametrize("of", ["teacher", "student"])
@pytest.mark.parametrize("top_p", [None, 0.7])
def test_the_mass_covered_is_told_for_both_sides(of: str, top_p: float | None):
    if top_p is not None and of == "student":
        return
    teachers, students = (np.stack(z) for z in zip(*(pair(s) for s in range(4)), strict=True))
    for rest in RESTS:
        config = DistillConfig.model_validate(
            {"divergence": "forward_kl", "support": {"topk": {"k": 3, "of": of, "rest": rest, "top_p": top_p}}}
        )
        logp, logq = as_tensor(teachers).log_softmax(-1), as_tensor(students).log_softmax(-1).requires_grad_()
        found = Distill(config).compare(tokens_of(logp, logq), logq)[:, 1:]
        inside = np.stack([covered_by(t, s, 3, of, top_p) for t, s in zip(teachers, students, strict=True)])
        close(found[:, 0].detach(), (softmax(teachers) * inside).sum(-1))
        close(found[:, 1].detach(), (softmax(students) * inside).sum(-1))


def test_full_support_covers_everything():
    logp = as_tensor(np.stack(pair(1))).log_softmax(-1)
    config = DistillConfig.model_validate({})
    close(Distill(config).compare(tokens_of(logp, logp), logp)[:, 1:], np.ones((2, 2)))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"divergence": "reverse_kl", "support": {"topk": {"k": 3, "rest": "partial"}}}, "1/e of its mass"),
        ({"divergence": {"symmetric": 0.5}, "support": {"topk": {"k": 3, "rest": "renormalise_teacher"}}}, "1/e"),
        ({"divergence": {"jsd": 0.5}, "support": {"topk": {"k": 3, "rest": "partial"}}}, "no longer sum to one"),
        ({"divergence": {"pair": ["student", "student"]}, "support": {"topk": 3}}, "rest: partial"),
        (
            {"divergence": {"pair": ["uniform"] * 2}, "support": {"topk": {"k": 3, "rest": "partial", "top_p": 0.9}}},
            "holes among them",
        ),
        ({"divergence": {"preference": 0.1}, "support": {"topk": 3}}, "two argmaxes"),
        ({"divergence": "rank"}, "give it `support: {topk: K}`"),
        ({"divergence": "rank", "support": {"topk": {"k": 3, "rest": "partial"}}}, "rank reads only k"),
        ({"divergence": "rank", "support": {"topk": {"k": 3, "of": "student"}}}, "rank reads only k"),
        ({"divergence": "reverse_kl", "support": {"draws": 3}}, "samples of the teacher"),
        ({"divergence": {"jsd": 0.5}, "support": {"draws": 3}}, "samples of the teacher"),
        ({"divergence": "tv", "support": {"token": "k2"}}, "no sampled-token estimator"),
        ({"support": {"topk": {"k": 3, "of": "student", "top_p": 0.9}}}, "does not go with `of: student`"),
        ({"support": {"topk": {"k": 3, "top_p": 1.5}}}, "less than 1"),
        ({"support": {"topk": {"k": 3, "rest": "drop"}}}, "renormalise_teacher"),
        ({"support": {"topk": {"of": "student"}}}, "k belongs to topk"),
        ({"support": {"topk": {"k": 3, "tau": 2}}}, "no setting 'tau'; it takes k, of, rest, top_p"),
        ({"divergence": "forward_kl", "support": {"draws": {"tau": 0.7}}}, "n belongs to draws"),
        ({"divergence": "forward_kl", "support": {"draws": {"n": 2, "tau": 0}}}, "greater than 0"),
        ({"support": {"topk": 3}, "clamp": 2.0}, "belongs to support"),
    ],
    ids=str,
)
def test_supports_that_cannot_teach_are_refused(spec: Any, says: str):
    with pytest.raises(ValidationError, match=re.escape(says)):
        DistillConfig.model_validate(spec)


def test_part_of_a_reverse_kl_would_drive_the_student_out_of_the_chosen_tokens():
    """Why it is refused: sum over K of q log(q/p) is least at 1/e of the mass, here found by descent on the formula."""
    teacher, _ = pair(5)
    p, inside = softmax(teacher), covered_by(teacher, teacher, 4, "teacher")
    z = teacher.copy()
    for _ in range(4000):
        z -= 2.0 * stepped(lambda y: kl_of(sm(y)[inside], p[inside]), z)[1]
    close(softmax(z)[inside].sum(), p[inside].sum() / np.e, 1e-3)


@pytest.mark.parametrize(
    "support",
    ["full", {"topk": 3}, {"topk": {"k": 3, "of": "student"}}, {"topk": {"k": 3, "rest": "renormalise", "top_p": 0.5}},
     {"draws": 4}, {"draws": {"n": 4, "tau": 0.7}}, {"token": "k2"}, {"token": {"estimator": "k3", "as": "loss"}}],
    ids=str,
)  # fmt: skip
def test_supports_are_written_as_they_read(support: Any):
    config = DistillConfig.model_validate(
        {"divergence": "forward_kl", "support": support} if support != {"token": "k2"} else {"support": support}
    )
    written = config.model_dump(mode="json")
    assert DistillConfig.model_validate(written).model_dump(mode="json") == written
    assert DistillConfig.model_validate(written).support == config.support


# ---------------------------------------------------------------- ranking


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_ranking_is_plackett_luce_with_the_teachers_probabilities_as_weights(k: int, seed: int):
    """Label first, also where the teacher's k likeliest do not hold it; then the teacher's order."""
    teacher, student = pair(seed)
    p = softmax(teacher)
    for label in range(len(p)):
        order = [label, *[v for v in np.argsort(-p) if v != label][:k]]

        def formula(z: Array, order: list[int] = order) -> Any:
            top = np.real(z).max()
            later = [np.log(np.exp(z[order[j:]] - top).sum()) + top for j in range(len(order))]
            return sum(p[v] * (later[j] - z[v]) for j, v in enumerate(order))

        expected = stepped(formula, student)
        found = kdrl_of({"divergence": "rank", "support": {"topk": k}}, teacher, student, label)
        close(found[0], expected[0])
        close(found[1], expected[1])
