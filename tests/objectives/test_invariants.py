"""What holds for every divergence, support and target: zero at the teacher, permutations, shifts, extremes, precision.

Where something of it does not hold, the exception is asserted with its value.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import kdrl
from kdrl.objectives.distill import DistillConfig

from .numbers import Array, entropy, kdrl_of, norm, pair, sm, term_of
from .reference import as_tensor, close, logit_pairs, quick

ORDERS = ("p||r", "r||p", "q||r", "r||q")
AKL = {"arms": [{"of": "p||q", "gate": "head_gap"}, {"of": "q||p", "gate": {"one_minus": "head_gap"}}]}
TODI = {
    "arms": [{"of": "p||q", "gate": "sigmoid_log_ratio"}, {"of": "q||p", "gate": "sigmoid_log_ratio_q"}],
}
# Zero, and without gradient, exactly where the student is the teacher.
PROPER: list[Any] = [
    "forward_kl",
    "reverse_kl",
    "tv",
    {"jsd": 0.3},
    {"jsd": {"beta": 0.3, "scale": "paper"}},
    {"jsd": {"beta": 0.3, "detach": True}},
    {"skew_kl": 0.1},
    {"skew_reverse_kl": 0.1},
    {"skew_reverse_kl": {"skew": 0.1, "detach": True}},
    {"symmetric": 0.3},
    *({"alpha_beta": {"alpha": a, "beta": b}} for a, b in ((0.2, 0.7), (0.5, 0.5), (1, 1), (0, 0.5), (2, 0), (0, 0))),
    AKL,
    TODI,
    {"arms": [{"of": "q||p", "gate": "sigmoid_log_ratio"}]},
    {"arms": [{"of": "q||p"}, {"of": "p||q", "gate": {"above": {"of": "entropy_p", "value": 0.8}}}]},
    *(
        {"arms": [{"of": order, "alpha": a, "beta": b}], "assistant": {"a": mean, "share": 0.4}}
        for order, (a, b), mean in product(ORDERS, ((1, 0), (0.2, 0.7)), (-1, 0.5, 1, 3))
    ),
    *({"arms": [{"of": order}], "assistant": {"a": 1, "share": 0.4, "detach": True}} for order in ORDERS[2:]),
    *({"pair": [one, two]} for one, two in product(("student", "teacher", "uniform"), repeat=2)),
]
OTHER: list[Any] = [{"preference": 0.1}, {"arms": [{"of": "r||q"}], "assistant": {"tilt": 0.5}}]
SUPPORTS: list[Any] = [
    "full",
    {"topk": 3},
    {"topk": {"k": 3, "of": "student"}},
    {"topk": {"k": 5, "top_p": 0.7}},
    {"topk": {"k": 3, "rest": "renormalise"}},
    {"topk": {"k": 3, "rest": "renormalise_teacher"}},
    {"topk": {"k": 3, "rest": "partial"}},
]
TARGETS: list[Any] = [
    {},
    {"teacher_temperature": 2.0, "student_temperature": 2.0, "rescale": True},
    {"teacher_temperature": "max_p", "student_temperature": "max_p"},
    {"standardise": True},
    {"standardise": True, "teacher_temperature": 0.5, "student_temperature": 0.5},
    {"power": 1.0},
    {"label_mix": 0.0},
    {"label_boost": 1.0},
    {"product": 1.0},
    {"decouple": {"label": 1, "rest": 8}},
]


def allowed(*specs: Any) -> bool:
    try:
        DistillConfig.model_validate(specs[0])
    except ValidationError:
        return False
    return True


def combined(divergences: list[Any], targets: list[Any]) -> list[Any]:
    specs = [{"divergence": d, "support": s, "target": t} for d, s, t in product(divergences, SUPPORTS, targets)]
    return [spec for spec in specs if allowed(spec)]


def short(spec: Any) -> str:
    return " ".join(str(v) for v in spec.values() if v not in ("full", {}))


def biased(spec: Any) -> bool:
    return isinstance(spec["support"], dict) and spec["support"]["topk"] in (
        {"k": 3, "rest": "renormalise_teacher"},
        {"k": 3, "rest": "partial"},
    )


def test_zero_value_and_gradient_at_the_teacher_for_every_proper_divergence_support_and_target():
    teachers = np.stack([pair(seed)[0] for seed in range(3)])
    wrong = []
    for spec in combined(PROPER, TARGETS):
        if (spec["divergence"] == "forward_kl" and biased(spec)) or "renormalise_teacher" in str(spec):
            continue
        # The total variation has a kink there: equal up to rounding, its gradient is any subgradient.
        shift = 0.0 if spec["divergence"] == "tv" else 1.7
        value, gradient = term_of(spec, teachers, teachers + shift, [0, 4, 8], reference=teachers[::-1].copy())
        if np.abs(value).max() > 1e-9 or np.abs(gradient).max() > 1e-9:
            wrong.append((spec, value, gradient))
    assert not wrong, f"{len(wrong)}: {wrong[0]}"


def test_that_is_two_thousand_losses():
    assert len(combined(PROPER, TARGETS)) > 2000


# ---------------------------------------------------------------- exceptions, with their value

T, S = pair(2)
P, Q = sm(T), sm(S)
K3 = np.isin(np.arange(9), np.argsort(-P)[:3])


def at_teacher(spec: Any, **more: Any) -> tuple[Any, Array]:
    return kdrl_of(spec, T, T, 4, **more)


def test_preference_is_log_two_at_the_teacher_without_gradient():
    value, gradient = at_teacher({"divergence": {"preference": 0.3}})
    close(value, np.log(2))
    close(gradient, np.zeros(9))


def test_ranking_is_not_zero_at_the_teacher():
    """sum_j p(j) -log(p(j) / mass of those not yet ranked), an entropy of the ranking; the gradient is not zero."""
    order = [4, *[v for v in np.argsort(-P) if v != 4]]
    value, gradient = at_teacher({"divergence": "rank", "support": {"topk": 20}})
    close(value, sum(-P[v] * np.log(P[v] / P[order[j:]].sum()) for j, v in enumerate(order)))
    assert np.abs(gradient).max() > 1e-2


@pytest.mark.parametrize("tilt", [0.3, 0.8])
def test_a_tilted_teacher_is_sharper_than_the_teacher(tilt: float):
    r = norm(P ** (1 + tilt))
    value, gradient = at_teacher(
        {"divergence": {"arms": [{"of": "r||q"}], "assistant": {"tilt": tilt, "detach": True}}}
    )
    close(value, (r * np.log(r / P)).sum())
    close(gradient, P - r)


def test_a_label_mix_pulls_from_the_teacher_towards_the_label():
    target = 0.7 * P + 0.3 * np.eye(9)[4]
    value, gradient = at_teacher({"divergence": "forward_kl", "target": {"label_mix": 0.3}})
    close(value, (target * np.log(target / P)).sum())
    close(gradient, P - target)


def test_a_label_boost_has_its_minimum_at_its_own_normalised_target():
    target = (P + np.eye(9)[4]) ** 1.5 - np.eye(9)[4]
    value, gradient = at_teacher({"divergence": "forward_kl", "target": {"label_boost": 1.5}})
    close(value, (target * np.log(target / P)).sum())
    close(gradient, target.sum() * P - target)
    spec = {"divergence": "forward_kl", "target": {"label_boost": 1.5}}
    close(kdrl_of(spec, T, np.log(target), 4)[1], np.zeros(9))


@pytest.mark.parametrize(("one", "two"), [(2.0, 1.0), (1.0, 2.0), (0.5, 3.0)])
def test_temperatures_that_differ_leave_the_divergence_of_one_distribution_from_its_tempered_self(
    one: float, two: float
):
    target = {"teacher_temperature": one, "student_temperature": two}
    value, gradient = at_teacher({"divergence": "forward_kl", "target": target})
    a, b = sm(T, one), sm(T, two)
    close(value, (a * np.log(a / b)).sum())
    close(gradient, (b - a) / two)
    assert value > 1e-3


def test_a_power_or_a_product_is_another_target():
    for target, wanted in (({"power": 0.5}, norm(P**0.5)), ({"product": 1.5}, norm(P**1.5 * Q**-0.5))):
        value, gradient = at_teacher({"divergence": "forward_kl", "target": target}, reference=S)
        close(value, (wanted * np.log(wanted / P)).sum())
        close(gradient, P - wanted)


@pytest.mark.parametrize("rest", ["renormalise_teacher", "partial"])
def test_the_over_sharp_truncations_are_not_at_rest_at_the_teacher(rest: str):
    value, gradient = at_teacher({"divergence": "forward_kl", "support": {"topk": {"k": 3, "rest": rest}}})
    mass = P[K3].sum()
    if rest == "partial":
        close(value, 0.0)
        close(gradient, mass * P - K3 * P)
    else:
        close(value, -np.log(mass))
        close(gradient, P - K3 * P / mass)


def test_a_renormalised_teachers_total_variation_is_half_of_what_it_gained():
    value, _ = at_teacher({"divergence": "tv", "support": {"topk": {"k": 3, "rest": "renormalise_teacher"}}})
    close(value, 0.5 * (1 - P[K3].sum()))


def test_sampled_estimates_are_zero_token_by_token_at_the_teacher():
    for y, token in product(range(9), ("k1", "k2", "k3", {"estimator": "k3", "as": "loss"})):
        spec = {"divergence": "reverse_kl" if isinstance(token, str) else "forward_kl", "support": {"token": token}}
        value, gradient = kdrl_of(spec, T, T - 2.0, y)
        close(value, 0.0, 1e-12)
        close(gradient, np.zeros(9), 1e-12)


# ---------------------------------------------------------------- order and level of logits

SOME = [*combined([*PROPER[:8], *PROPER[9:18], AKL, TODI, *PROPER[20:30:3], *OTHER, *PROPER[-9::4]], [{}]),
        *combined(["forward_kl", {"jsd": 0.3}], TARGETS[1:]),
        *combined(["forward_kl"], [{"label_mix": {"one_minus": "max_p"}}, {"label_boost": 1.5}, {"product": 1.5},
                                   {"power": 0.4}, {"decouple": {"label": 2, "rest": 1, "label_only": True}}]),
        *({"divergence": "rank", "support": {"topk": k}, "target": {}} for k in (2, 20)),
        *({"divergence": d, "support": {"token": t}, "target": {}}
          for d, t in (("reverse_kl", "k2"), ("forward_kl", {"estimator": "k3", "as": "loss"})))]  # fmt: skip
every = pytest.mark.parametrize("spec", SOME, ids=short)


@every
def test_names_of_tokens_and_the_level_of_logits_do_not_matter(spec: Any):
    zt, zs, zr, y = *pair(21), pair(22)[0], 4
    order = np.random.default_rng(3).permutation(9)
    value, gradient = kdrl_of(spec, zt, zs, y, reference=zr)
    moved = kdrl_of(spec, zt[order], zs[order], int(np.argwhere(order == y)[0, 0]), reference=zr[order])
    close(moved[0], value)
    close(moved[1], gradient[order])
    shifted = kdrl_of(spec, zt + 40.0, zs - 25.0, y, reference=zr + 7.0)
    close(shifted[0], value, 1e-8)
    close(shifted[1], gradient, 1e-8)
    close(gradient.sum(), 0.0, 1e-8)
    assert np.abs(gradient).max() > 1e-4, "this spec teaches nothing here"


@pytest.mark.parametrize("divergence", [d for d in PROPER if "sigmoid_log_ratio" not in str(d) or d == TODI], ids=str)
@given(logits=logit_pairs(bound=8.0))
@quick
def test_never_negative(divergence: Any, logits: tuple[Array, Array]):
    assert kdrl_of({"divergence": divergence}, *logits)[0] >= -1e-9


def test_an_entry_gate_alone_makes_no_divergence():
    """p/(p+q) on the arm q||p falls below zero: a gate weighs entries, and only whole sums are divergences."""
    spec = {"divergence": {"arms": [{"of": "q||p", "gate": "sigmoid_log_ratio"}]}}
    assert min(kdrl_of(spec, *pair(seed))[0] for seed in range(20)) < -0.01


# ---------------------------------------------------------------- extremes

EXTREME = {
    "ruled out": [0.0, -np.inf, 1.0, -np.inf, 0.5, -0.3],
    "ruled out elsewhere": [-np.inf, 0.2, -np.inf, 0.4, -np.inf, 0.0],
    "one token": [-np.inf, -np.inf, 2.0, -np.inf, -np.inf, -np.inf],
    "another token": [-np.inf, -np.inf, -np.inf, -np.inf, 2.0, -np.inf],
    "peaked": [300.0, 0.0, 1.0, -1.0, 0.5, -300.0],
    "peaked elsewhere": [0.0, 300.0, 300.0, -1.0, -300.0, 0.0],
    "flat": [0.0] * 6,
}
LABELS = (0, 4)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_ruled_out_and_peaked_tokens_give_finite_values_and_gradients(spec: Any, dtype: torch.dtype):
    sides = list(product(EXTREME, EXTREME, LABELS))
    teacher, student = (torch.tensor([EXTREME[str(pick[i])] for pick in sides], dtype=dtype) for i in range(2))
    reference = torch.tensor([EXTREME["flat" if i % 2 else "ruled out"] for i in range(len(sides))], dtype=dtype)
    student.requires_grad_()
    tokens = torch.tensor([pick[2] for pick in sides])
    loss = kdrl.divergence(student, teacher, spec, tokens, reference_logits=reference)
    loss.sum().backward()
    assert student.grad is not None
    for i, pick in enumerate(sides):
        assert loss[i].isfinite(), pick
        assert student.grad[i].isfinite().all(), pick


@every
def test_float32_agrees_with_float64(spec: Any):
    found = []
    for dtype in (torch.float64, torch.float32):
        random = np.random.default_rng(7)
        teacher, student, reference = (torch.tensor(4 * random.normal(size=(3, 500)), dtype=dtype) for _ in range(3))
        student.requires_grad_()
        loss = kdrl.divergence(student, teacher, spec, torch.tensor([3, 0, 499]), reference_logits=reference)
        loss.sum().backward()
        assert student.grad is not None
        found.append((loss.detach().double().numpy(), student.grad.double().numpy()))
    scale = max(np.abs(found[0][1]).max(), 1e-2)
    close(found[1][0], found[0][0], 2e-4)
    close(found[1][1] / scale, found[0][1] / scale, 2e-4)


@given(logits=logit_pairs(bound=5.0, most=5), data=st.data())
@quick
def test_the_entropy_of_a_distribution_with_holes(logits: tuple[Array, Array], data: st.DataObject):
    kept = data.draw(st.lists(st.booleans(), min_size=len(logits[0]), max_size=len(logits[0])).filter(any))
    holed = np.where(kept, logits[0], -np.inf)
    config = {"divergence": "forward_kl", "scale": "entropy_p"}
    p = sm(logits[0][np.array(kept)])
    plain = kdrl_of({"divergence": "forward_kl"}, holed, logits[1])[0]
    close(kdrl_of(config, holed, logits[1])[0], plain * entropy(p), 1e-8)


@pytest.mark.parametrize("divergence", [{"pair": ["uniform", "uniform"]}, {"pair": ["uniform", "student"]}, "tv", TODI],
                         ids=str)  # fmt: skip
def test_a_token_that_both_rule_out_counts_nowhere(divergence: Any):
    wide = kdrl_of({"divergence": divergence}, np.append(T, -np.inf), np.append(S, -np.inf))
    plain = kdrl_of({"divergence": divergence}, T, S)
    close(wide[0], plain[0])
    close(wide[1], np.append(plain[1], 0.0))


def test_gates_and_targets_see_no_gradient_of_the_teacher():
    teacher = as_tensor(T).requires_grad_()
    for spec in (SOME[0], {"divergence": TODI}, {"divergence": "forward_kl", "target": {"label_mix": "mft"}}):
        kdrl.divergence(as_tensor(S)[None].requires_grad_(), teacher[None], spec, torch.tensor([4])).sum().backward()
    assert teacher.grad is None
