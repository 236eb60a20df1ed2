"""Target transforms: teacher and student as they are compared, against numpy formulas in value and gradient."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import kdrl
from kdrl.errors import UserError
from kdrl.objectives.base import Needs
from kdrl.objectives.distill import Distill, DistillConfig
from kdrl.objectives.schedules import Moment

from .numbers import Array, ab, entropy, kdrl_of, kl, norm, pair, sm, stepped, term_of
from .reference import close, token_view

TEACHER, STUDENT = pair(11)
REFERENCE = pair(12)[1]
Y = 3
FEW = list(range(len(TEACHER)))

DIVERGENCES: dict[str, tuple[Any, Any]] = {
    "forward": ("forward_kl", kl),
    "reverse": ("reverse_kl", lambda p, q: kl(q, p)),
    "jsd": ({"jsd": 0.3}, lambda p, q: kl(p, 0.3 * p + 0.7 * q) / 0.7 + kl(q, 0.3 * p + 0.7 * q) / 0.3),
    "ab": ({"alpha_beta": {"alpha": 0.2, "beta": 0.7}}, lambda p, q: ab(p, q, 0.2, 0.7)),
    "tv": ("tv", lambda p, q: 0.5 * ((p - q) * np.sign(np.real(p - q))).sum()),
}


def same(spec: Any, formula: Any, student: Array = STUDENT, **more: Any) -> None:
    expected, found = stepped(formula, student), kdrl_of(spec, TEACHER, student, Y, **more)
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("t_teacher", "t_student"), list(product((None, 0.5, 2.0), (None, 3.0))))
@pytest.mark.parametrize("rescale", [False, True])
def test_temperatures_of_either_side(name: str, t_teacher: float | None, t_student: float | None, rescale: bool):
    if t_teacher is None and t_student is None:
        return
    divergence, formula = DIVERGENCES[name]
    one, two = t_teacher or 1.0, t_student or 1.0
    target = {"teacher_temperature": t_teacher, "student_temperature": t_student, "rescale": rescale}
    factor = one * two if rescale else 1.0
    spec = {"divergence": divergence, "target": target}
    same(spec, lambda z: factor * formula(sm(TEACHER, one), sm(z, two)))


def test_a_temperature_of_the_loss_replaces_that_of_the_rollouts():
    """What arrives was taken at the rollouts' temperature; 0.9 in TRL's GKD drives the samples alone."""
    sampled_at = 0.7
    spec = {"divergence": "forward_kl", "target": {"teacher_temperature": 2.0, "student_temperature": 1.0}}
    value, gradient = term_of(spec, TEACHER / sampled_at, STUDENT / sampled_at, Y, temperature=sampled_at)
    expected = stepped(lambda z: kl(sm(TEACHER, 2.0), sm(z)), STUDENT)
    close(value, expected[0])
    close(gradient / sampled_at, expected[1])
    # One side alone: the other stays at the rollouts'. Rescaled by both that are in force.
    spec = {"divergence": "forward_kl", "target": {"teacher_temperature": 2.0, "rescale": True}}
    value, _ = term_of(spec, TEACHER / sampled_at, STUDENT / sampled_at, Y, temperature=sampled_at)
    close(value, 2.0 * sampled_at * kl(sm(TEACHER, 2.0), sm(STUDENT, sampled_at)))


def test_the_cooled_loss_tends_to_half_the_variance_of_logit_differences():
    t = 1e4
    spec = {"divergence": "forward_kl",
            "target": {"teacher_temperature": t, "student_temperature": t, "rescale": True}}  # fmt: skip
    close(kdrl_of(spec, TEACHER, STUDENT)[0], 0.5 * (STUDENT - TEACHER).var(), 1e-3)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_power_of_the_teacher(name: str, gamma: float):
    divergence, formula = DIVERGENCES[name]
    same({"divergence": divergence, "target": {"power": gamma}}, lambda z: formula(norm(sm(TEACHER) ** gamma), sm(z)))


def standard(z: Array) -> Array:
    centred = z - z.mean()
    return centred / np.sqrt((centred**2).mean())


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_standardised_logits_forget_shift_and_scale(name: str, temperature: float | None):
    divergence, formula = DIVERGENCES[name]
    t = temperature or 1.0
    target = {"standardise": True, "teacher_temperature": temperature, "student_temperature": temperature}
    spec = {"divergence": divergence, "target": target}
    same(spec, lambda z: formula(sm(standard(TEACHER), t), sm(standard(z), t)))
    plain = kdrl_of(spec, TEACHER, STUDENT)[0]
    close(kdrl_of(spec, 3 * TEACHER - 1, 0.2 * STUDENT + 4)[0], plain, 1e-8)
    assert kdrl_of(spec, 2 * STUDENT + 1, STUDENT)[0] < 1e-10


def test_standardised_logits_of_tokens_that_are_ruled_out():
    teacher, student = np.append(TEACHER, -np.inf), np.append(STUDENT, -np.inf)
    spec = {"divergence": "forward_kl", "target": {"standardise": True}}
    found, plain = kdrl_of(spec, teacher, student), kdrl_of(spec, TEACHER, STUDENT)
    close(found[0], plain[0])
    close(found[1], np.append(plain[1], 0.0))


# ---------------------------------------------------------------- the label


def mixed(rho: float, p: Array, y: int = Y) -> Array:
    return (1 - rho) * p + rho * np.eye(len(p))[y]


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.9])
def test_a_constant_label_mix(rho: float):
    same({"divergence": "forward_kl", "target": {"label_mix": rho}}, lambda z: kl(mixed(rho, sm(TEACHER)), sm(z)))


def test_a_label_alone_is_cross_entropy():
    value, gradient = kdrl_of({"divergence": "forward_kl", "target": {"label_mix": 1.0}}, TEACHER, STUDENT, Y)
    close(value, -np.log(sm(STUDENT)[Y]))
    close(gradient, sm(STUDENT) - np.eye(9)[Y])


@pytest.mark.parametrize(
    ("rho", "formula"),
    [
        ({"one_minus": "max_p"}, lambda p: 1 - p.max()),
        ("relative_entropy_p", lambda p: entropy(p) / np.log(len(p))),
        ("mft", lambda p: (p.max() - p[Y] + 0.2) / (1 + p.max() - p[Y])),
        ({"choose": {"where": {"above": {"of": "max_p", "value": 0.1}}, "then": 0.3, "otherwise": 0.7}},
         lambda p: 0.3 if p.max() > 0.1 else 0.7),
        ({"affine": {"of": "max_p", "scale": 9}}, lambda p: 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_label_mix_from_a_score_held_between_zero_and_one(rho: Any, formula: Any):
    same(
        {"divergence": "forward_kl", "target": {"label_mix": rho}},
        lambda z: kl(mixed(formula(sm(TEACHER)), sm(TEACHER)) + 1e-300, sm(z)),
    )


def test_mft_lifts_the_label_above_every_other_token_by_tau():
    p, tau = sm(TEACHER), 0.2
    for y in FEW:
        rho = (p.max() - p[y] + tau) / (1 + p.max() - p[y])
        target = mixed(rho, p, y)
        others = (1 - rho) * np.delete(p, y).max()
        value, _ = kdrl_of({"divergence": "forward_kl", "target": {"label_mix": "mft"}}, TEACHER, STUDENT, y)
        close(value, kl(target, sm(STUDENT)))
        if y != p.argmax():
            close(target[y] - others, tau)


def test_a_label_mix_on_a_schedule_as_in_ps_kd():
    spec = {"divergence": "forward_kl", "target": {"label_mix": {"linear": {"from": 1.0, "to": 0.2}}}}
    for step, rho in ((0, 1.0), (5, 0.6), (10, 0.2)):
        value, gradient = term_of(spec, TEACHER, STUDENT, Y, Moment(step, 10))
        close(gradient, sm(STUDENT) - mixed(rho, sm(TEACHER)))
        close(value, kl(mixed(rho, sm(TEACHER)) + 1e-300, sm(STUDENT)))


def test_a_label_mix_of_a_tempered_teacher_and_on_a_truncated_support():
    p, k = sm(TEACHER, 2.0), 3
    target = mixed(0.4, p)
    inside = np.argsort(-target)[:k]
    outside = np.argsort(-target)[k:]

    def few(x: Array) -> Array:
        return np.append(x[inside], x[outside].sum())

    spec = {"divergence": "forward_kl", "support": {"topk": k}, "target": {"label_mix": 0.4, "teacher_temperature": 2}}
    same(spec, lambda z: kl(few(target), few(sm(z))))


@pytest.mark.parametrize("epsilon", [1.0, 1.5, 0.7])
def test_a_boosted_label(epsilon: float):
    """OFA-KD: (p + e_y)^epsilon - e_y, no distribution; kdrl adds its entropy, a constant."""
    p = sm(TEACHER)
    target = (p + np.eye(9)[Y]) ** epsilon - np.eye(9)[Y]
    same({"divergence": "forward_kl", "target": {"label_boost": epsilon}}, lambda z: kl(target, sm(z)))
    if epsilon == 1.0:
        close(target, p)


# ---------------------------------------------------------------- product with the initial student


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_product_with_the_initial_student(name: str, eta: float):
    divergence, formula = DIVERGENCES[name]
    target = norm(sm(REFERENCE) ** (1 - eta) * sm(TEACHER) ** eta)
    spec = {"divergence": divergence, "target": {"product": eta}}
    same(spec, lambda z: formula(target, sm(z)), reference=REFERENCE)
    close({0.0: sm(REFERENCE), 1.0: sm(TEACHER)}.get(eta, target), target)


@pytest.mark.parametrize("token", ["k1", "k2", "k3"])
def test_the_product_of_sampled_tokens(token: str):
    """R is taken to the unnormalised product: its constant falls out of the expected gradient."""
    eta, q = 1.5, sm(STUDENT)
    spec = {"support": {"token": token}, "clamp": None, "target": {"product": eta}}
    ratio = eta * np.log(sm(TEACHER)) + (1 - eta) * np.log(sm(REFERENCE)) - np.log(q)
    for y in FEW:
        _, gradient = kdrl_of(spec, TEACHER, STUDENT, y, reference=REFERENCE)
        close(gradient, -ratio[y] * (np.eye(9)[y] - q))


def test_a_run_reads_the_product_from_both_teachers_scores_of_the_token():
    eta, at = 1.5, torch.tensor([0, 5, 8])
    logp, logr, z = (torch.tensor(x) for x in (TEACHER, REFERENCE, STUDENT))
    spec = {"support": {"token": "k2"}, "clamp": None, "target": {"product": eta}}
    leaf = z.clone().requires_grad_()
    view = token_view(
        leaf.log_softmax(-1)[at], teacher_N=logp.log_softmax(-1)[at], reference_N=logr.log_softmax(-1)[at]
    )
    term = Distill(DistillConfig.model_validate(spec))
    assert term.needs == Needs(teacher="token", reference="token")
    term.loss(view).sum().backward()
    expected = sum(kdrl_of(spec, TEACHER, STUDENT, int(y), reference=REFERENCE)[1] for y in at)
    close(leaf.grad, expected)


def test_a_product_without_the_initial_student_is_refused():
    with pytest.raises(UserError, match=r"target\.product needs reference_logits"):
        kdrl_of({"target": {"product": 1.5}}, TEACHER, STUDENT)


def test_the_transforms_come_in_the_order_that_is_told():
    """Product, standardised logits, temperature, power, label."""
    spec = {
        "divergence": "forward_kl",
        "target": {"product": 1.5, "standardise": True, "teacher_temperature": 0.5, "power": 0.7, "label_boost": 1.2},
    }
    product_logits = 1.5 * TEACHER - 0.5 * REFERENCE
    p = norm(sm(standard(product_logits), 0.5) ** 0.7)
    target = (p + np.eye(9)[Y]) ** 1.2 - np.eye(9)[Y]
    same(spec, lambda z: kl(target, sm(standard(z))), reference=REFERENCE)


# ---------------------------------------------------------------- label and rest apart


def apart(p: Array, y: int = Y) -> tuple[Array, Array]:
    rest = np.concatenate([p[:y], p[y + 1 :]])
    return np.array([p[y], rest.sum()]), norm(rest)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "ab"])
@pytest.mark.parametrize("t", [1.0, 4.0])
def test_label_and_rest_with_weights_of_their_own(name: str, t: float):
    divergence, formula = DIVERGENCES[name]
    two, rest = apart(sm(TEACHER, t))
    target: dict[str, Any] = {"decouple": {"label": 1, "rest": 8}}
    if t != 1.0:
        target |= {"teacher_temperature": t, "student_temperature": t, "rescale": True}

    def dkd(z: Array) -> Any:
        two_q, rest_q = apart(sm(z, t))
        return t * t * (formula(two, two_q) + 8 * formula(rest, rest_q))

    same({"divergence": divergence, "target": target}, dkd)


def test_weights_of_label_and_rest_may_be_scores_and_schedules():
    weights = {"label": {"linear": {"from": 0.0, "to": 2.0}}, "rest": {"one_minus": "label_p"}}
    spec = {"divergence": "forward_kl", "target": {"decouple": weights}}
    (two, rest), p_y = apart(sm(TEACHER)), sm(TEACHER)[Y]
    two_q, rest_q = apart(sm(STUDENT))
    for step, label in ((0, 0.0), (5, 1.0), (10, 2.0)):
        value, _ = term_of(spec, TEACHER, STUDENT, Y, Moment(step, 10))
        close(value, label * kl(two, two_q) + (1 - p_y) * kl(rest, rest_q))


@pytest.mark.parametrize("label", [0, 4, 8])
def test_any_token_may_be_the_label(label: int):
    spec = {"divergence": "forward_kl", "target": {"decouple": {"label": 2, "rest": 0.5}}}
    (two, rest) = apart(sm(TEACHER), label)

    def dkd(z: Array) -> Any:
        two_q, rest_q = apart(sm(z), label)
        return 2 * kl(two, two_q) + 0.5 * kl(rest, rest_q)

    expected, found = stepped(dkd, STUDENT), kdrl_of(spec, TEACHER, STUDENT, label)
    close(found[0], expected[0])
    close(found[1], expected[1])


# ---------------------------------------------------------------- many tokens, refusals, writing

TARGETS: list[Any] = [
    {"teacher_temperature": 2.0},
    {"student_temperature": "max_p"},
    {"teacher_temperature": {"affine": {"of": "entropy_p", "offset": 0.5}}, "rescale": True},
    {"teacher_temperature": "label_p", "student_temperature": "max_q", "rescale": True},
    {"power": 0.3},
    {"standardise": True},
    {"label_mix": 0.3},
    {"label_mix": {"one_minus": "max_p"}},
    {"label_boost": 1.5},
    {"product": 1.25},
    {"decouple": {"label": 1, "rest": 8}},
    {"decouple": {"label": {"above": {"of": "label_p", "value": 0.1}}, "rest": "max_q", "label_only": True}},
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_token_is_transformed_by_itself(target: Any):
    teachers, students = (np.stack(z) for z in zip(*(pair(s) for s in range(4)), strict=True))
    references = np.stack([pair(s + 30)[1] for s in range(4)])
    labels = np.array([0, 8, 3, 3])
    spec = {"divergence": "forward_kl", "target": target}
    value, gradient = term_of(spec, teachers, students, labels, reference=references)
    for i in range(4):
        alone = kdrl_of(spec, teachers[i], students[i], int(labels[i]), reference=references[i])
        close(value[i], alone[0])
        close(gradient[i], alone[1])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets_are_written_as_they_read(target: Any):
    config = DistillConfig.model_validate({"divergence": "forward_kl", "target": target})
    written = config.model_dump(mode="json")
    again = DistillConfig.model_validate(written)
    assert again.target.changes == set(target)
    assert again.model_dump(mode="json") == written


def test_a_term_without_a_transform_writes_none():
    assert "target" not in DistillConfig.model_validate({}).model_dump(mode="json")


def test_a_temperature_from_a_score_as_in_adakd():
    """T = base exp(-c tanh(log(score / median))) on both sides, the loss times T^2; over all tokens given."""
    students, teachers = (np.stack(z) for z in zip(*((pair(s)[1], pair(s)[0]) for s in range(5)), strict=True))
    p, q = (np.array([sm(z) for z in side]) for side in (teachers, students))
    difficulty = np.array([kl(b, a) for a, b in zip(p, q, strict=True)])
    t = 1.5 * np.exp(-0.5 * np.tanh(np.log(difficulty / np.median(difficulty))))
    score = {"over_median": {"of": "reverse_kl", "c": 0.5, "base": 1.5}}
    spec = {"target": {"teacher_temperature": score, "student_temperature": score, "rescale": True}}
    leaf = torch.tensor(students, requires_grad=True)
    loss = kdrl.divergence(leaf, torch.tensor(teachers), spec, torch.zeros(5, dtype=torch.long))
    loss.sum().backward()
    assert leaf.grad is not None
    for i in range(5):
        expected = stepped(lambda z, i=i: t[i] ** 2 * kl(sm(z, t[i]), sm(teachers[i], t[i])), students[i])
        close(loss[i].item(), expected[0])
        close(leaf.grad[i], expected[1])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"target": {"label_mix": 0.5}}, "only under divergence: forward_kl"),
        ({"divergence": {"jsd": 0.5}, "target": {"label_mix": 0.5}}, "only under divergence: forward_kl"),
        ({"divergence": "forward_kl", "support": {"draws": 4}, "target": {"label_mix": 0.5}}, "full or topk support"),
        ({"divergence": "forward_kl", "target": {"label_mix": 0.5, "student_temperature": 2}}, "temperature is 1"),
        ({"divergence": "forward_kl", "target": {"label_mix": 0.5, "label_boost": 2}}, "choose one"),
        ({"target": {"label_boost": 1.5}}, "only under divergence: forward_kl"),
        ({"divergence": "forward_kl", "target": {"label_boost": 0}}, "greater than 0"),
        ({"target": {"rescale": True}}, "none is given"),
        ({"support": {"token": "k2"}, "target": {"teacher_temperature": 2}}, "needs whole distributions"),
        ({"support": {"token": "k2"}, "target": {"decouple": {"label": 1, "rest": 1}}}, "needs whole distributions"),
        (
            {"divergence": "forward_kl", "support": {"token": {"estimator": "k3", "as": "loss"}},
             "target": {"product": 1.5}},
            "k3 as a loss needs a normalised target",
        ),
        ({"support": {"topk": 4}, "target": {"decouple": {"label": 1, "rest": 1}}}, "arms over full support"),
        ({"divergence": "tv", "target": {"decouple": {"label": 1, "rest": 1}}}, "arms over full support"),
        ({"target": {"decouple": {"label": 1, "rest": 1, "label_only": True}}}, "a part of forward_kl"),
        ({"target": {"decouple": {"label": 1}}}, "rest"),
        (
            {"divergence": {"arms": [{"of": "p||q", "gate": "max_p"}]},
             "target": {"decouple": {"label": 1, "rest": 1}}},
            "takes no gate there",
        ),
        ({"target": {"temperature": 2}}, "temperature"),
        ({"target": {"power": "max_p"}}, "is not a number"),
    ],
    ids=str,
)  # fmt: skip
def test_targets_that_cannot_be_meant_are_refused(spec: Any, says: str):
    with pytest.raises(ValidationError, match=says):
        DistillConfig.model_validate(spec)
