"""What the teacher and other writers do inside the policy gradient, against the formulas; and KL-regularised RL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kdrl.objectives.estimators import token_loss
from kdrl.objectives.policy import Advantage, advantages
from kdrl.objectives.schedules import Moment
from kdrl.objectives.terms import Distill, DistillConfig, PolicyGradient, PolicyGradientConfig

from .reference import Array, as_tensor, close, kl, log_softmax, softmax, token_view


def term(**keys: Any) -> PolicyGradient:
    return PolicyGradient(PolicyGradientConfig.model_validate(keys))


def run(
    keys: dict[str, Any],
    advantage: Any,
    *,
    logq: Any = None,
    R: Any = None,
    stale: Any = None,
    foreign: Any = None,
    moment: Moment | None = None,
) -> tuple[Array, Array]:
    """Loss and its gradient on log q, one token a response."""
    leaf = as_tensor(np.linspace(-2.0, -0.5, len(advantage)) if logq is None else logq).requires_grad_()
    fields: dict[str, Any] = {"advantage_N": as_tensor(advantage)}
    if R is not None:
        fields["teacher_N"] = leaf.detach() + as_tensor(R)
    if stale is not None:
        fields["old_N"] = leaf.detach() - as_tensor(stale)
    if foreign is not None:
        fields["foreign_N"] = torch.tensor(foreign)
    if moment is not None:
        fields["moment"] = moment
    loss: Tensor = term(**keys).loss(token_view(leaf, **fields))
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach().numpy(), leaf.grad.numpy()


# --- LUFFY: f(p) = p / (p + gamma) in place of the ratio --------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_another_writers_tokens_are_shaped_and_never_clipped(gamma: float):
    p, A = np.array([0.9, 0.3, 0.01, 0.3]), np.array([1.0, 2.0, 0.5, -1.0])
    loss, gradient = run({"off_policy": {"shape": gamma}}, A, logq=np.log(p), stale=[3.0] * 4, foreign=[True] * 4)
    close(loss, -A * p / (p + gamma))
    close(gradient, -A * gamma / (p + gamma) ** 2 * p)


def test_unlikely_tokens_of_a_demonstration_are_lifted_more_than_by_their_probability():
    p = np.array([0.5, 0.05])
    gradient = run({"off_policy": {}}, [1.0, 1.0], logq=np.log(p), foreign=[True] * 2)[1] / p
    assert gradient[1] / gradient[0] == pytest.approx((0.6 / 0.15) ** 2)


def test_the_students_own_tokens_stay_as_they_are_beside_another_writers():
    A, stale = [1.0, -1.0, 1.0], list(np.log([1.5, 1.5, 1.5]))
    mixed = run({"off_policy": {}}, A, stale=stale, foreign=[False, False, True])
    alone = run({}, A, stale=stale)
    close(mixed[1][:2], alone[1][:2])
    close(alone[1], [0.0, 1.5, 0.0])
    assert mixed[1][2] != 0.0
    view = token_view(
        as_tensor([-1.0, -1.0]),
        advantage_N=as_tensor([1.0, 1.0]),
        old_N=as_tensor([-2.0, -2.0]),
        foreign_N=torch.tensor([False, True]),
    )
    assert term(off_policy={}).clipped(view)[1].tolist() == [True, False]


# --- signs, RLSD, the teacher as a reward -----------------------------------------------------------------------------


def test_weights_by_sign():
    close(run({"positive_weight": 2.0, "negative_weight": 0.5}, [1.0, -1.0, 0.0])[1], [-2.0, 0.5, 0.0])
    falling = {"negative_weight": {"linear": {"from": 1.0, "to": 0.0, "steps": 10}}}
    close(run(falling, [1.0, -1.0], moment=Moment(4, 10))[1], [-1.0, 0.6])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rlsd_scales_by_the_teacher_and_keeps_the_sign(share: float):
    A = np.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0])
    R = np.array([0.1, 3.0, -3.0, 0.1, 3.0, -50.0, 1.0])
    ratio = np.clip(np.exp(np.sign(A) * R), 0.8, 1.2)
    want = A * ((1 - share) + share * ratio)
    close(run({"modulate": {"share": share}}, A, R=R)[1], -want)
    assert (want * A >= 0).all()


def test_the_teacher_as_a_reward_inside_the_surrogate_is_a_k1_term_beside_it_on_policy():
    A, R, beta = [1.0, -0.5, 0.0], [0.4, -3.0, 14.0], 0.2
    inside = run({"teacher_reward": beta}, A, R=R)[1]
    distill = Distill(DistillConfig.model_validate({"support": {"token": "k1"}}))
    leaf = as_tensor(np.linspace(-2.0, -0.5, 3)).requires_grad_()
    (beta * token_loss(distill.config.support, leaf, leaf.detach() + as_tensor(R), 10.0)).sum().backward()
    assert leaf.grad is not None
    close(inside, leaf.grad.numpy() + run({}, A)[1])
    # Stale, it is one clipped surrogate: a positive sum is held above 1.2, and so is the teacher's part.
    close(run({"teacher_reward": beta}, A, R=R, stale=[0.5] * 3)[1][0], 0.0)


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ({"low": -1.0, "high": 2.0}, [-1.0, 0.5, 2.0]),
        ({"low": float(np.log(0.2 / 0.8)), "high": None}, [np.log(0.25), 0.5, 30.0]),  # REOPOLD's bound
        ({"low": None, "high": None}, [-30.0, 0.5, 30.0]),
        ({"weight": 2.0}, [-20.0, 1.0, 20.0]),
        (0.5, [-5.0, 0.25, 5.0]),
    ],
)
def test_bounds_of_the_teachers_reward(spec: Any, want: list[float]):
    close(run({"teacher_reward": spec}, [0.0] * 3, R=[-30.0, 0.5, 30.0])[1], -np.array(want))


@pytest.mark.parametrize("skip", [False, True])
def test_the_teacher_may_be_left_out_at_the_end(skip: bool):
    last = torch.tensor([False, True])
    for keys, want in (
        ({"teacher_reward": {"weight": 1.0, "skip_eos": skip}}, [3.0, 1.0 if skip else 3.0]),
        ({"modulate": {"skip_eos": skip}}, [1.2, 1.0 if skip else 1.2]),
    ):
        leaf = as_tensor([-1.0, -1.0])
        view = token_view(leaf, advantage_N=as_tensor([1.0, 1.0]), teacher_N=leaf + 2.0, last_N=last)
        close(term(**keys).advantage(view), want)


def test_the_weight_of_the_teachers_reward_may_move():
    spec = {"linear": {"from": 1.0, "to": 0.0, "steps": 4}}
    close(run({"teacher_reward": spec}, [0.0], R=[2.0], moment=Moment(1, 4))[1], [-1.5])


def test_mopd_drops_tokens_out_of_range_and_weighs_the_others():
    keys = {"teacher_reward": 1.0, "clip": {"kind": "masked", "low": 0.5, "high": 1.0}}
    ratios = np.array([0.4, 0.6, 1.0, 1.9, 2.1])
    A, R = np.array([1.0, -1.0, 1.0, -1.0, 1.0]), np.array([0.5, 0.5, -0.5, 0.3, 0.2])
    want = -np.where((ratios >= 0.5) & (ratios <= 2.0), ratios, 0.0) * (A + R)
    close(run(keys, A, R=R, stale=np.log(ratios))[1], want)


# --- InfAlign ---------------------------------------------------------------------------------------------------------


def test_calibrated_rewards_by_hand():
    spec = Advantage.model_validate({"baseline": "none", "scale": "none", "calibrate": 2.0})
    rewards, groups = as_tensor([3.0, 1.0, 1.0, 0.0, 9.0, 9.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    close(advantages(spec, rewards, groups), np.exp(2 * np.array([1.0, 0.75, 0.75, 0.25, 1.0, 1.0])))
    worst = Advantage.model_validate({"baseline": "none", "scale": "none", "calibrate": -2.0})
    close(advantages(worst, rewards, groups), -np.exp(-2 * np.array([1.0, 0.75, 0.75, 0.25, 1.0, 1.0])))
    assert rewards.tolist() == [3.0, 1.0, 1.0, 0.0, 9.0, 9.0], "rewards themselves are left alone"


def test_any_rising_function_of_the_reward_is_calibrated_to_the_same():
    rewards, groups = np.random.default_rng(0).normal(size=8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    spec = Advantage.model_validate({"calibrate": 10.0})
    close(advantages(spec, as_tensor(rewards), groups), advantages(spec, as_tensor(np.exp(3 * rewards)), groups))


# --- KL-regularised reinforcement learning (2205.11275; 2310.17303) ---------------------------------------------------


@pytest.mark.parametrize("beta", [0.2, 1.0, 3.0])
def test_reward_minus_a_kl_is_matching_the_reference_tilted_by_the_reward(beta: float):
    """grad E_q[r] - b grad KL(q||p0) = -b grad KL(q||p*), p* = p0 exp(r/b) / Z, from the terms that a run uses."""
    random = np.random.default_rng(3)
    z, reference = random.normal(size=(2, 6))
    reward = random.integers(0, 2, size=6).astype(float)
    p0 = softmax(reference)
    tilted = p0 * np.exp(reward / beta)
    tilted /= tilted.sum()

    leaf = as_tensor(z).requires_grad_()
    logq = leaf.log_softmax(-1)
    q = torch.as_tensor(softmax(z))
    distill = Distill(DistillConfig.model_validate({"support": {"token": "k2"}, "clamp": None}))
    # Every outcome once, weighed by its probability: exact expectations.
    view = token_view(logq, advantage_N=as_tensor(reward), teacher_N=as_tensor(np.log(p0)))
    (q * (term(ratio="none").loss(view) + beta * distill.loss(view))).sum().backward()
    assert leaf.grad is not None
    step = 1e-6
    want = [
        beta * (kl(softmax(z + step * e), tilted) - kl(softmax(z - step * e), tilted)) / (2 * step) for e in np.eye(6)
    ]
    close(leaf.grad.numpy(), want, 1e-7)
    value = (softmax(z) * reward).sum() - beta * kl(softmax(z), p0)
    close(value, -beta * kl(softmax(z), tilted) + beta * np.log((p0 * np.exp(reward / beta)).sum()))


def test_a_student_at_the_tilted_reference_is_at_rest():
    reward, p0, beta = np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.1, 0.2, 0.3, 0.4]), 0.5
    tilted = p0 * np.exp(reward / beta)
    leaf = as_tensor(np.log(tilted / tilted.sum())).requires_grad_()
    logq = leaf.log_softmax(-1)
    distill = Distill(DistillConfig.model_validate({"support": {"token": "k2"}, "clamp": None}))
    view = token_view(logq, advantage_N=as_tensor(reward), teacher_N=as_tensor(np.log(p0)))
    (logq.detach().exp() * (term(ratio="none").loss(view) + beta * distill.loss(view))).sum().backward()
    assert leaf.grad is not None
    close(leaf.grad.numpy(), 0.0)
    close(log_softmax(leaf.detach().numpy()), logq.detach().numpy())


# --- refusals and reading back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"off_policy": {}, "teacher_reward": 1.0}, "teacher_reward reads the teacher on the student's own samples"),
        ({"off_policy": {}, "modulate": {}}, "modulate reads the teacher"),
        ({"off_policy": {}, "ratio": {"alpha": 0.5}}, "ratio {alpha: ...} reads the teacher"),
        ({"modulate": {}, "teacher_reward": 1.0}, "modulate and teacher_reward each put the teacher"),
        ({"off_policy": {"shape": 0.0}}, "shape"),
        ({"modulate": {"clip": 1.5}}, "clip"),
        ({"teacher_reward": {"low": 2.0, "high": 1.0}}, "low must lie below"),
        ({"advantage": {"calibrate": 0.0}}, "makes every reward the same"),
        ({"clip": {"kind": "masked", "dual": 3.0}}, "clip.dual belongs to `kind: ppo`"),
        ({"clip": {"kind": "masked", "cap": 3.0}}, "clip.cap belongs to `kind: cispo`"),
    ],
)
def test_settings_that_cannot_stand_together_are_refused(keys: dict[str, Any], why: str):
    with pytest.raises(ValidationError, match=why):
        term(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"off_policy": {"shape": 0.2}},
        {"modulate": {"share": 0.5, "clip": 0.1}},
        {"teacher_reward": 0.3},
        {"teacher_reward": {"weight": {"cosine": {"from": 1.0, "to": 0.0}}, "low": None, "high": 3.0}},
        {"advantage": {"baseline": "none", "scale": "none", "calibrate": 10.0}},
        {"clip": {"kind": "masked", "low": 0.5, "high": 1.0}, "negative_weight": 0.5},
    ],
    ids=str,
)
def test_settings_are_written_back_as_they_were_read(keys: dict[str, Any]):
    config = term(**keys).config
    assert PolicyGradientConfig.model_validate(config.model_dump()).model_dump() == config.model_dump()


def test_what_it_asks_for():
    for keys in ({}, {"off_policy": {}}):
        assert term(**keys).needs.teacher is None
    for keys in ({"modulate": {}}, {"teacher_reward": 1.0}, {"ratio": {"alpha": 0.5}}):
        assert term(**keys).needs.teacher == "token"
