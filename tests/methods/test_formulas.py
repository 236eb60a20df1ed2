"""Every distillation method's loss and gradient against its formula, at a moment in the middle of its schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdrl.methods import all_methods, get_method
from kdrl.objectives.distill import DistillConfig
from kdrl.recipe import read_entry

from .harness import loss_of, made_step
from .numerics import Array, Step, ce, gradient, kl, log_sm, mass, mean, sm
from .rewarded import WHOLE
from .sampled import PUBLISHED
from .typed import BESIDE, OBJECTIVES

# No whole step here: their own numbers are typed in typed.py, which names the tests of their formulas.
ELSEWHERE = {"align-to-distill", "nd", "qat-kd", "tinybert", "vkd", "alm", "gold", "kdrl-chunk", "simple-ctkd", "uld"}
ELSEWHERE |= {"alm-debiased", "multilevelot", "dskd", "dskd-v2", "dskd-cma"}


def found(name: str, step: Step, z: Array, only: str | None = None) -> tuple[float, Array]:
    leaf = torch.tensor(z, requires_grad=True)
    loss = loss_of(name, step, leaf, only)
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad.numpy()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_value_and_gradient_are_those_of_the_formula(name: str, seed: int):
    step, z = made_step(name, seed)
    value, slope = found(name, step, z)
    want = gradient(PUBLISHED[name], step, z)
    assert np.abs(want).max() > 1e-6
    np.testing.assert_allclose(value, np.real(PUBLISHED[name](step, z)), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(slope, want, rtol=1e-8, atol=1e-10)


def test_every_method_has_a_reference_of_its_own_numbers():
    """Distillation here, rewards and preferences in test_elsewhere.py; the rest has typed objectives there."""
    assert sorted(all_methods()) == sorted([*PUBLISHED, *WHOLE, *ELSEWHERE])
    assert set(OBJECTIVES) == ELSEWHERE
    assert set(BESIDE) == {*WHOLE, *ELSEWHERE}


# Not zero at p = q, with the reason; `value` of the distillation terms there, from the formula.
NOT_ZERO: dict[str, Callable[[Step], complex]] = {
    # Where both agree on the first choice the margin is zero.
    "dpkd": lambda s: 0.5 * np.log(2.0),
    # The target holds the label.
    "ban-cwtm": lambda s: PUBLISHED["ban-cwtm"](s, s.teacher_NV),
    "bridge-garden": lambda s: PUBLISHED["bridge-garden"](s, s.teacher_NV),
    "mft": lambda s: PUBLISHED["mft"](s, s.teacher_NV),
    "ps-kd": lambda s: PUBLISHED["ps-kd"](s, s.teacher_NV),
    "ofa-target": lambda s: PUBLISHED["ofa-target"](s, s.teacher_NV) - mean(ce(s, s.teacher_NV)),
    # The target is another distribution than the teacher.
    "ttm": lambda s: 45.0 * mean(kl(mass(sm(s.teacher_NV) ** 0.1), sm(s.teacher_NV))),
    "wttm": lambda s: PUBLISHED["wttm"](s, s.teacher_NV) - mean(ce(s, s.teacher_NV)),
    "veto": lambda s: PUBLISHED["veto"](s, s.teacher_NV),
    "ptkd": lambda s: PUBLISHED["ptkd"](s, s.teacher_NV) - (1 - 0.9 * 0.06) * mean(ce(s, s.teacher_NV)),
    "g-opd": lambda s: PUBLISHED["g-opd"](s, s.teacher_NV),
    # A ranking and a smoothed plan are no divergences.
    "pld": lambda s: PUBLISHED["pld"](s, s.teacher_NV),
    "sinkd": lambda s: PUBLISHED["sinkd"](s, s.teacher_NV) - mean(ce(s, s.teacher_NV)),
}
# Zero there, but not its gradient: NKD's share of the label lacks its counterpart, and draws have noise.
SLOPE_LEFT = {"nkd", "rs-kd"}


def teaches(name: str) -> bool:
    return any(e.name in ("distill", "batch_distill") for e in map(read_entry, get_method(name).recipe["objective"]))


@pytest.mark.parametrize("name", sorted(n for n in PUBLISHED if teaches(n)))
def test_the_student_that_is_its_teacher(name: str):
    step, _ = made_step(name, 3)
    only = "batch_distill" if name in ("sinkd", "luminet") else "distill"
    value, slope = found(name, step, step.teacher_NV, only)
    want = np.real(NOT_ZERO[name](step)) if name in NOT_ZERO else 0.0
    assert (abs(want) > 1e-7) == (name in NOT_ZERO)
    np.testing.assert_allclose(value, want, rtol=1e-8, atol=1e-12)
    if name not in {*NOT_ZERO, *SLOPE_LEFT}:
        assert np.abs(slope).max() < 1e-9
    if name in SLOPE_LEFT:
        assert np.abs(slope).max() > 1e-3
    if name == "dpkd":
        assert np.abs(slope).max() < 1e-12


def expected_gradient(name: str, step: Step, z: Array) -> Array:
    """The gradient at one state, averaged over the student's own choice of token."""
    one = replace(
        step,
        **{f: getattr(step, f)[:1] for f in ("teacher_NV", "initial_NV", "row_N", "origin_N", "uniform_NK")},
    )
    q = sm(z[0])
    slopes = [found(name, replace(one, token_N=np.array([y])), z[:1])[1][0] for y in range(len(q))]
    return (q[:, None] * np.array(slopes)).sum(0)


@pytest.mark.parametrize("name", ["opd", "opd-k3", "g-opd"])
def test_sampled_tokens_descend_what_the_title_says(name: str):
    step, z = made_step(name, 4)
    logp, q = log_sm(step.teacher_NV[0]), sm(z[0])
    if name == "g-opd":
        logp = log_sm(1.25 * logp - 0.25 * log_sm(step.initial_NV[0]))
    difference = np.log(q) - logp
    reverse = q * (difference - (q * difference).sum())
    want = q - np.exp(logp) if name == "opd-k3" else reverse
    np.testing.assert_allclose(expected_gradient(name, step, z), want, atol=1e-10)


def test_draws_are_forward_kl_on_average():
    """Over an even grid of the unit interval every token is drawn in proportion to its probability."""
    step, z = made_step("rs-kd", 5)
    grid = np.tile((np.arange(20000) + 0.5) / 20000, (len(z), 1))
    value, _ = found("rs-kd", replace(step, uniform_NK=grid), z)
    np.testing.assert_allclose(value, mean(kl(sm(step.teacher_NV), sm(z))), rtol=2e-3)


def test_a_schedule_moves_the_loss():
    """Veto's tilt fades to plain reverse KL, PS-KD's label to the teacher, at the last moment of the run."""
    step, z = made_step("veto", 6)
    end = replace(step, step=20)
    np.testing.assert_allclose(found("veto", end, z)[0], np.real(PUBLISHED["reverse-kl"](step, z)))
    for name in ("veto", "ps-kd", "ptkd"):
        step, z = made_step(name, 6)
        for moment in (0, 12, 19):
            there = replace(step, step=moment)
            np.testing.assert_allclose(found(name, there, z)[0], np.real(PUBLISHED[name](there, z)), rtol=1e-9)


def test_no_method_leaves_a_divergence_to_the_default():
    """A default that changes would change a published method without a word."""
    for name, method in all_methods().items():
        for raw in method.recipe["objective"]:
            entry = read_entry(raw)
            if isinstance(entry.config, DistillConfig):
                assert {"divergence", "support"} <= entry.config.model_fields_set, name
