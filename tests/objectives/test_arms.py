"""Arms over teacher, student and assistant: every order, mean and gate in value and gradient against numpy formulas."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdrl.objectives.distill import DistillConfig
from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.schedules import Moment
from kdrl.objectives.specs import ORDERS, Divergence

from .numbers import Array, ab, data, entropy, kdrl_of, kl, mean, norm, pair, sm, stepped, term_of
from .reference import close, logit_pairs, quick

TEACHER, STUDENT = pair(7)
P, Q = sm(TEACHER), sm(STUDENT)


def of(divergence: Any, teacher: Array = TEACHER, student: Array = STUDENT, **more: Any) -> tuple[Any, Array]:
    return kdrl_of({"divergence": divergence}, teacher, student, **more)


def same(found: tuple[Any, Array], formula: Any, student: Array = STUDENT, tolerance: float = 1e-9) -> None:
    expected = stepped(formula, student)
    close(found[0], expected[0], tolerance)
    close(found[1], expected[1], tolerance)


@pytest.mark.parametrize("exponents", [(1, 0), (0, 1), (0.2, 0.7), (1.5, 0.5)], ids=str)
@pytest.mark.parametrize(
    ("order", "a", "detach"),
    [c for c in product(ORDERS, (-1, 0, 0.5, 1, 3), (False, True)) if not c[2] or "q" in c[0]],
    ids=str,
)
def test_every_order_with_every_mean_attached_and_detached(
    order: str, a: float, detach: bool, exponents: tuple[float, float]
):
    x, y = order.split("||")
    share, hold = 0.3, data if detach else lambda v: v

    def formula(z: Array) -> Any:
        sides = {"p": P, "q": sm(z)}
        sides["r"] = mean(P, hold(sides["q"]), a, share)
        if exponents in ((1, 0), (0, 1)):
            one, two = (x, y) if exponents == (1, 0) else (y, x)
            return kl(sides[one], sides[two])
        return ab(sides[x], sides[y], *exponents)

    arm = {"of": order, "alpha": exponents[0], "beta": exponents[1]}
    spec: Any = {"arms": [arm]}
    if "r" in order:
        spec["assistant"] = {"a": a, "share": share, "detach": detach}
    same(of(spec), formula)


@pytest.mark.parametrize("order", ORDERS[2:])
@pytest.mark.parametrize(("share", "stands_for"), [(0.0, "q"), (1.0, "p")])
def test_at_its_ends_the_assistant_is_student_or_teacher(order: str, share: float, stands_for: str):
    if stands_for == "p" and "q" not in order:
        pytest.skip("nothing of the student is left")
    for a in (-1, 0.5, 1, 3):
        spec = {"arms": [{"of": order}], "assistant": {"a": a, "share": share}}
        sides = {"p": lambda z: P, "q": sm, "r": sm if stands_for == "q" else lambda z: P}
        same(of(spec), lambda z, s=sides: kl(s[order[0]](z), s[order[-1]](z)))


def test_means_near_the_geometric_one_run_into_it_without_a_step():
    exact = of({"arms": [{"of": "q||r"}], "assistant": {"a": 1, "share": 0.3}})
    for off in (1e-2, 1e-3, 3e-4, 1e-4, 1e-6):
        for a in (1 - off, 1 + off):
            found = of({"arms": [{"of": "q||r"}], "assistant": {"a": a, "share": 0.3}})
            close(found[0], exact[0], 3 * off + 1e-12)
            close(found[1], exact[1], 3 * off + 1e-12)


@pytest.mark.parametrize("a", [1 - 3e-4, 1 + 3e-4, 1 + 1e-4, 1.0])
def test_means_near_the_geometric_one_keep_their_digits_in_float32(a: float):
    spec = Divergence.model_validate({"arms": [{"of": "q||r"}], "assistant": {"a": a, "share": 0.3}})
    logits = [torch.tensor(z) for z in (TEACHER, STUDENT)]
    exact, rough = (
        divergence_of(spec, logits[0].to(t).log_softmax(-1), logits[1].to(t).log_softmax(-1))
        for t in (torch.float64, torch.float32)
    )
    close(rough.item(), exact.item(), 2e-3)


def test_two_arms_add_with_their_weights():
    spec = {
        "arms": [{"of": "p||r", "weight": 0.3}, {"of": "q||r", "weight": 0.7, "alpha": 0.5, "beta": 0.5}],
        "assistant": {"a": 3, "share": 0.3},
    }

    def formula(z: Array) -> Any:
        q = sm(z)
        r = mean(P, q, 3, 0.3)
        return 0.3 * kl(P, r) + 0.7 * ab(q, r, 0.5, 0.5)

    same(of(spec), formula)


def test_a_tilted_assistant_is_neither_sharpened_nor_a_mean():
    for tilt, order in product((0.01, 0.4, 1.5), ("p||r", "r||p", "q||r", "r||q")):
        same(
            of({"arms": [{"of": order}], "assistant": {"tilt": tilt}}),
            lambda z, t=tilt, o=order: kl(
                *({"p": P, "q": sm(z), "r": norm(P * sm(z) ** t)}[side] for side in o.split("||"))
            ),
        )


# ---------------------------------------------------------------- exponents and their limits


@pytest.mark.parametrize("exponents", [(0.2, 0.7), (0.5, 0.5), (1, 1), (2, 0.3), (1, 2), (0.1, 0.8)], ids=str)
@given(logits=logit_pairs())
@quick
def test_alpha_beta_is_its_formula(exponents: tuple[float, float], logits: tuple[Array, Array]):
    p = sm(logits[0])
    found = of({"alpha_beta": {"alpha": exponents[0], "beta": exponents[1]}}, *logits)
    same(found, lambda z: ab(p, sm(z), *exponents), logits[1])


LIMITS: dict[tuple[float, float], Any] = {
    (1, 0): lambda q: kl(P, q),
    (0, 1): lambda q: kl(q, P),
    (0.5, 0): lambda q: ((P**0.5 * 0.5 * np.log(P / q)) - P**0.5 + q**0.5).sum() / 0.25,
    (0, 0.5): lambda q: ((q**0.5 * 0.5 * np.log(q / P)) - q**0.5 + P**0.5).sum() / 0.25,
    (2, 0): lambda q: ((P**2 * 2 * np.log(P / q)) - P**2 + q**2).sum() / 4,
    (0, 2): lambda q: ((q**2 * 2 * np.log(q / P)) - q**2 + P**2).sum() / 4,
    (0, 0): lambda q: 0.5 * (np.log(P / q) ** 2).sum(),
}


@pytest.mark.parametrize("exponents", LIMITS, ids=str)
def test_zero_exponents_are_the_limits_of_small_ones(exponents: tuple[float, float]):
    """ABKD's own code divides by alpha where alpha squared belongs."""
    alpha, beta = exponents
    found = of({"alpha_beta": {"alpha": alpha, "beta": beta}})
    same(found, lambda z: LIMITS[exponents](sm(z)))
    small = 2e-4
    near = of({"alpha_beta": {"alpha": alpha or small, "beta": beta or small}})
    close(near[0], found[0], 2e-3)
    close(near[1], found[1], 2e-3)


@pytest.mark.parametrize(
    "exponents",
    [
        (1e-4, 0.7),
        (0.7, 1e-4),
        (1e-3, 1.0),
        (1e-5, 0.5),
        (1e-9, 1.0),
        (1e-2, 1e-2),
        (4e-3, 0),
        (3e-3, 2e-3),
        (1e-5, 1e-5),
        (1e-200, 0),
    ],
    ids=str,
)
def test_small_exponents_keep_their_digits_in_float32(exponents: tuple[float, float]):
    """A schedule that starts or ends at zero passes by; the cancelling powers must not eat the gradient."""
    spec = Divergence.model_validate({"alpha_beta": {"alpha": exponents[0], "beta": exponents[1]}})
    z = torch.tensor(STUDENT, dtype=torch.float32, requires_grad=True)
    value = divergence_of(spec, torch.tensor(TEACHER, dtype=torch.float32).log_softmax(-1), z.log_softmax(-1))
    value.backward()
    # Far below what float64 can cancel, the limit is the reference.
    alpha, beta = (e if e > 1e-3 else 0.0 for e in exponents)
    if alpha and beta:
        expected = stepped(lambda y: ab(P, sm(y), alpha, beta), STUDENT)
    elif alpha or beta:
        a, sides = alpha or beta, (lambda q: (P, q)) if alpha else (lambda q: (q, P))

        def limit(y: Array) -> Any:
            one, two = sides(sm(y))
            return (one**a * a * np.log(one / two) - one**a + two**a).sum() / a**2

        expected = stepped(limit, STUDENT)
    else:
        expected = stepped(lambda y: 0.5 * (np.log(P / sm(y)) ** 2).sum(), STUDENT)
    close(value.item(), expected[0], 3e-2)
    assert z.grad is not None
    close(z.grad, expected[1], 3e-2 * np.abs(expected[1]).max())


def test_the_mirror_of_exponents_is_the_mirror_of_sides():
    one = of({"arms": [{"of": "p||q", "alpha": 0.2, "beta": 0.7}]})
    two = of({"arms": [{"of": "q||p", "alpha": 0.7, "beta": 0.2}]})
    close(one[0], two[0])
    close(one[1], two[1])


@given(logits=logit_pairs(), alpha=st.floats(0.0, 2.0), beta=st.floats(0.0, 2.0))
@quick
def test_never_negative(logits: tuple[Array, Array], alpha: float, beta: float):
    value, _ = of({"alpha_beta": {"alpha": alpha, "beta": beta}}, *logits)
    # The smallest exponents that are not taken as zero leave 1e-16 / (1e-4)^2 of rounding.
    assert value >= -1e-7


# ---------------------------------------------------------------- other kinds


def test_total_variation_and_its_subgradient():
    same(of("tv"), lambda z: 0.5 * ((P - sm(z)) * np.sign(data(P - sm(z)))).sum())


@pytest.mark.parametrize("skew", [0.0, 0.1, 0.6])
def test_skewed_kls(skew: float):
    same(of({"skew_kl": skew}), lambda z: kl(P, skew * P + (1 - skew) * sm(z)))
    for detach, hold in ((False, lambda v: v), (True, data)):
        found = of({"skew_reverse_kl": {"skew": skew, "detach": detach}})
        same(found, lambda z, hold=hold: kl(sm(z), (1 - skew) * P + skew * hold(sm(z))))


@pytest.mark.parametrize(
    ("divergence", "says"),
    [
        ({"skew_kl": {"skew": 0.1, "detach": True}}, "detach belongs to jsd, skew_reverse_kl"),
        ({"arms": [{"of": "p||r"}], "assistant": {"share": 0.5, "detach": True}}, "nothing would be trained"),
        (
            {"arms": [{"of": "q||p"}, {"of": "r||p"}], "assistant": {"share": 0.5, "detach": True}},
            "nothing would be trained",
        ),
    ],
    ids=str,
)
def test_an_arm_that_holds_no_student_is_refused(divergence: Any, says: str):
    with pytest.raises(ValidationError, match=says):
        DistillConfig.model_validate({"divergence": divergence})


def test_a_detached_mixture_in_jensen_shannon_leaves_the_students_arm():
    b = 0.3
    found = of({"jsd": {"beta": b, "scale": "paper", "detach": True}})
    same(found, lambda z: b * kl(P, b * P + (1 - b) * data(sm(z))) + (1 - b) * kl(sm(z), b * P + (1 - b) * data(sm(z))))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_preference_is_the_logistic_loss_of_two_margins(beta: float):
    c, r = int(P.argmax()), int(Q.argmax())
    assert c != r

    def formula(z: Array) -> Any:
        margin = (np.log(sm(z))[c] - np.log(sm(z))[r]) - (np.log(P)[c] - np.log(P)[r])
        return np.log(1 + np.exp(-beta * margin))

    same(of({"preference": beta}), formula)


# ---------------------------------------------------------------- gates


def head(p: Array, mu: float) -> Array:
    inside, mass = np.zeros(len(p), bool), 0.0
    for v in np.argsort(-p):
        inside[v] = mass < mu
        mass += p[v]
    return inside


GATES: dict[str, tuple[Any, Any]] = {
    "max_p": ("max_p", lambda p, q: p.max()),
    "entropy_p": ("entropy_p", lambda p, q: entropy(p)),
    "entropy_q": ("entropy_q", lambda p, q: entropy(q)),
    "disagreement": ("disagreement", lambda p, q: 0.5 * np.abs(p - q).sum()),
    "head_gap": (
        {"head_gap": 0.8},
        lambda p, q: np.abs(p - q)[head(p, 0.8)].sum() / np.abs(p - q).sum(),
    ),
    "schedule": ({"linear": {"from": 0.25, "to": 1.0}}, lambda p, q: 0.25),
    "number": (0.4, lambda p, q: 0.4),
    "per entry": ("sigmoid_log_ratio", lambda p, q: p / (p + q)),
    "other entry": ("sigmoid_log_ratio_q", lambda p, q: q / (p + q)),
    "of entries": (
        {"affine": {"of": {"times": {"of": "sigmoid_log_ratio", "by": "max_q"}}, "scale": 2, "offset": 0.1}},
        lambda p, q: 2 * p / (p + q) * q.max() + 0.1,
    ),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("order", ["p||q", "q||p", "q||r", "r||q"])
def test_a_gate_is_data_that_multiplies_its_own_arm(name: str, order: str):
    gate, value = GATES[name]

    def formula(z: Array) -> Any:
        sides = {"p": P, "q": sm(z), "r": mean(P, sm(z), -1, 0.5)}
        x, y = (sides[s] for s in order.split("||"))
        return (value(P, data(sm(z))) * x * np.log(x / y)).sum() + 2 * kl(sm(z), P)

    spec: Any = {"arms": [{"of": order, "gate": gate}, {"of": "q||p", "weight": 2}]}
    if "r" in order:
        spec["assistant"] = {"share": 0.5}
    same(of(spec), formula)


def test_gates_of_many_tokens_are_each_tokens_own():
    teachers, students = (np.stack(z) for z in zip(*(pair(s) for s in range(5)), strict=True))
    for gate in ("entropy_p", "sigmoid_log_ratio", GATES["of entries"][0], {"above": {"of": "max_q", "value": 0.5}}):
        spec = {"divergence": {"arms": [{"of": "p||q", "gate": gate}]}}
        value, gradient = term_of(spec, teachers, students)
        for i in range(5):
            alone = kdrl_of(spec, teachers[i], students[i])
            close(value[i], alone[0])
            close(gradient[i], alone[1])


def test_gates_on_a_truncated_support_see_whole_distributions_and_entries_what_is_left():
    k = 3
    for gate, value in (("entropy_p", lambda p, q, few_p, few_q: entropy(p)),
                        ("sigmoid_log_ratio", lambda p, q, few_p, few_q: few_p / (few_p + few_q))):  # fmt: skip
        inside = np.argsort(-P)[:k]
        outside = np.argsort(-P)[k:]

        def few(x: Array, inside: Array = inside, outside: Array = outside) -> Array:
            return np.append(x[inside], x[outside].sum())

        def formula(z: Array, value: Any = value, few: Any = few) -> Any:
            q = sm(z)
            g = value(P, data(q), few(P), few(data(q)))
            return (g * few(P) * np.log(few(P) / few(q))).sum()

        spec = {"divergence": {"arms": [{"of": "p||q", "gate": gate}]}, "support": {"topk": k}}
        same(kdrl_of(spec, TEACHER, STUDENT), formula)


# ---------------------------------------------------------------- scalars that move


MOVING = {"linear": {"from": 0.2, "to": 0.6}}
MOVED: list[tuple[Any, Any]] = [
    ({"jsd": MOVING}, lambda s: {"jsd": s}),
    ({"skew_kl": MOVING}, lambda s: {"skew_kl": s}),
    ({"symmetric": MOVING}, lambda s: {"symmetric": s}),
    ({"alpha_beta": {"alpha": MOVING, "beta": 0.5}}, lambda s: {"alpha_beta": {"alpha": s, "beta": 0.5}}),
    ({"preference": MOVING}, lambda s: {"preference": s}),
    (
        {"arms": [{"of": "q||r", "weight": MOVING}], "assistant": {"share": MOVING}},
        lambda s: {"arms": [{"of": "q||r", "weight": s}], "assistant": {"share": s}},
    ),
    (
        {"arms": [{"of": "q||r", "gate": MOVING}], "assistant": {"tilt": MOVING}},
        lambda s: {"arms": [{"of": "q||r", "gate": s}], "assistant": {"tilt": s}},
    ),
    (
        {"arms": [{"of": "p||q", "alpha": MOVING, "beta": MOVING}]},
        lambda s: {"arms": [{"of": "p||q", "alpha": s, "beta": s}]},
    ),
]


@pytest.mark.parametrize(("spec", "at"), MOVED, ids=[str(m[0]) for m in MOVED])
def test_every_scalar_may_be_a_schedule(spec: Any, at: Any):
    for step, value in ((0, 0.2), (5, 0.4), (10, 0.6)):
        found = term_of({"divergence": spec}, TEACHER, STUDENT, moment=Moment(step, 10))
        fixed = term_of({"divergence": at(value)}, TEACHER, STUDENT)
        close(found[0], fixed[0])
        close(found[1], fixed[1])


def test_a_schedule_that_leaves_its_range_is_refused_when_it_does():
    spec = Divergence.model_validate({"skew_kl": {"linear": {"from": 0.1, "to": 2.0}}})
    spec.now(Moment(0, 10))
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        spec.now(Moment(9, 10))


# ---------------------------------------------------------------- reading and writing

READABLE: list[Any] = [
    "forward_kl",
    "tv",
    {"jsd": 0.3},
    {"jsd": {"beta": 0.3, "scale": "paper", "detach": True}},
    {"jsd": MOVING},
    {"skew_reverse_kl": {"skew": 0.1, "detach": True}},
    {"symmetric": 0.4},
    {"alpha_beta": {"alpha": 0.2, "beta": 0.7}},
    {"pair": ["student", "uniform"]},
    {"preference": 0.1},
    {"arms": [{"of": "q||r", "gate": {"above": {"of": "entropy_p", "value": 1}}}], "assistant": {"tilt": 0.8}},
    {"arms": [{"of": "p||q", "weight": MOVING, "alpha": 0.5, "beta": 0.5}, {"of": "q||p"}]},
]


@pytest.mark.parametrize("spec", READABLE, ids=str)
def test_what_is_written_back_reads_as_the_same_loss(spec: Any):
    config = DistillConfig.model_validate({"divergence": spec})
    written = config.model_dump(mode="json")
    again = DistillConfig.model_validate(written)
    assert again.model_dump(mode="json") == written
    one, two = (term_of(c, TEACHER, STUDENT) for c in ({"divergence": spec}, {"divergence": written["divergence"]}))
    close(one[0], two[0])
    close(one[1], two[1])


@pytest.mark.parametrize(
    ("divergence", "says"),
    [
        ("alpha_beta", "needs"),
        ({"alpha_beta": {"alpha": 0.5}}, "alpha_beta needs beta"),
        ({"alpha_beta": {"alpha": -0.5, "beta": 1}}, "negative power"),
        ({"alpha_beta": {"alpha": 0.5, "beta": 0.5, "skew": 1}}, "skew belongs to"),
        ({"skew_kl": 1.0}, "compares a distribution with itself"),
        ({"skew_kl": 1.5}, "a share between 0 and 1"),
        ({"symmetric": -0.1}, "a share between 0 and 1"),
        ({"preference": 0}, "above 0"),
        ({"pair": ["student", "nobody"]}, "'student', 'teacher' or 'uniform'"),
        ({"arms": []}, "arms"),
        ({"arms": [{"of": "p||q"}] * 3}, "at most two arms"),
        ({"arms": [{"of": "p||p"}]}, "of"),
        ({"arms": [{"of": "p||r"}]}, "needs an assistant"),
        ({"arms": [{"of": "p||q"}], "assistant": {"share": 0.5}}, "no arm compares with r"),
        ({"arms": [{"of": "q||r"}], "assistant": {"a": 0.5}}, "one of both"),
        ({"arms": [{"of": "q||r"}], "assistant": {"share": 0.5, "tilt": 0.5}}, "one of both"),
        ({"arms": [{"of": "q||r"}], "assistant": {"a": 1, "tilt": 0.5}}, "a says which mean"),
        ({"arms": [{"of": "q||r"}], "assistant": {"share": 1.5}}, "a share between 0 and 1"),
        ({"arms": [{"of": "q||p", "alpha": -1}]}, "negative power"),
        ({"arms": [{"of": "q||p", "gate": "entropy"}]}, "did you mean"),
    ],
    ids=str,
)
def test_divergences_that_cannot_be_are_refused(divergence: Any, says: str):
    with pytest.raises(ValidationError, match=says):
        DistillConfig.model_validate({"divergence": divergence})
