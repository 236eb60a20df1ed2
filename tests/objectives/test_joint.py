"""KDRL and TRRD through the objects that a run uses: terms, token view, masks and the reducer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdrl.objectives.masks import MaskContext, evaluate_mask
from kdrl.objectives.policy import Advantage, advantages
from kdrl.objectives.reduce import token_weights
from kdrl.objectives.terms import Distill, DistillConfig, PolicyGradient, PolicyGradientConfig, Term

from .reference import Array, as_tensor, close, log_softmax, softmax, token_view

# Three groups of two: one right of two, none right, both right. Lengths 2, 1, 2, 1, 1, 2.
REWARD_B = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
GROUP_B = torch.tensor([0, 0, 1, 1, 2, 2])
ROW_N = np.array([0, 0, 1, 2, 2, 3, 4, 5, 5])
# (1 - 1/2) / sqrt(1/2): the sample standard deviation of {1, 0} is sqrt(1/2).
HAND_ADVANTAGE_B = np.array([np.sqrt(0.5), -np.sqrt(0.5), 0.0, 0.0, 0.0, 0.0])
KEPT_B = {
    "all": np.ones(6),
    "wrong_response": np.array([0, 1, 1, 1, 0, 0.0]),
    "wrong_group": np.array([0, 0, 1, 1, 0, 0.0]),
}
VOCABULARY = 5


class World:
    """Six sampled responses with a student and a teacher distribution at every token."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.student, self.teacher = random.normal(size=(2, len(ROW_N), VOCABULARY))
        self.tokens = random.integers(VOCABULARY, size=len(ROW_N))
        at = np.arange(len(ROW_N)), self.tokens
        self.R = log_softmax(self.teacher)[at] - log_softmax(self.student)[at]
        self.score = np.eye(VOCABULARY)[self.tokens] - softmax(self.student)  # grad log pi on the logits
        self.row_N = torch.as_tensor(ROW_N)

    def weights(self, term: Term[Any]) -> Tensor:
        correct_B = torch.as_tensor(REWARD_B == 1)
        context = MaskContext(
            correct_B=correct_B,
            reward_B=as_tensor(REWARD_B),
            group_B=GROUP_B,
            truncated_B=torch.zeros(6, dtype=torch.bool),
            row_N=self.row_N,
            last_N=torch.zeros(len(ROW_N), dtype=torch.bool),
            entropy_N=None,
        )
        return token_weights(term.config.reduce, evaluate_mask(term.config.mask, context), self.row_N, 6, torch.float64)

    def gradient(self, terms: list[Term[Any]], step: int = 0, total: int = 100) -> Array:
        """Gradient of the weighted sum of the terms on the student's logits `[N, V]`."""
        z_NV = as_tensor(self.student).requires_grad_()
        pick = torch.as_tensor(self.tokens)[:, None]
        advantage_B = advantages(Advantage.model_validate("grpo"), as_tensor(REWARD_B), GROUP_B)
        view = token_view(
            z_NV.log_softmax(-1).gather(-1, pick)[:, 0],
            ROW_N,
            advantage_N=advantage_B[self.row_N],
            teacher_N=as_tensor(self.teacher).log_softmax(-1).gather(-1, pick)[:, 0],
        )
        parts = [term.config.weight(step, total) * (self.weights(term) * term.loss(view)).sum() for term in terms]
        torch.stack(parts).sum().backward()
        assert z_NV.grad is not None
        return z_NV.grad.numpy()


def grpo(**keys: Any) -> PolicyGradient:
    return PolicyGradient(PolicyGradientConfig.model_validate({"advantage": "grpo"} | keys))


def distill(**keys: Any) -> Distill:
    return Distill(DistillConfig.model_validate({"divergence": "reverse_kl"} | keys))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("mask", list(KEPT_B))
@pytest.mark.parametrize("reduce", ["batch_tokens", "token_global", {"constant": 4.0}, "sum"])
def test_kdrl_gradient_is_advantage_plus_beta_r_times_the_score(estimator: str, mask: str, reduce: Any):
    world, beta = World(), 0.2
    kept_N = KEPT_B[mask][ROW_N]
    share = {"batch_tokens": 9, "token_global": kept_N.sum(), "sum": 1}.get(str(reduce), 6 * 4.0)
    share_rl = {"batch_tokens": 9, "token_global": 9, "sum": 1}.get(str(reduce), 6 * 4.0)
    found = world.gradient(
        [grpo(reduce=reduce), distill(support={"token": estimator}, weight=beta, mask=mask, reduce=reduce)]
    )
    push_N = HAND_ADVANTAGE_B[ROW_N] / share_rl + beta * kept_N * world.R / share
    close(found, -push_N[:, None] * world.score, 2e-6)  # 1e-6 is added to the standard deviation


def test_constant_beta_over_all_tokens_is_the_formula_of_the_paper():
    world, beta = World(1), 2.0e-3
    found = world.gradient([grpo(), distill(support={"token": "k2"}, weight=beta)])
    close(found, -(HAND_ADVANTAGE_B[ROW_N] + beta * world.R)[:, None] * world.score / 9, 1e-6)


def test_annealed_beta_is_the_papers_line_to_its_floor():
    world = World(2)
    term = distill(support={"token": "k2"}, weight={"linear": {"from": 5.0e-3, "to": 1.0e-3, "steps": 80}})
    for step in (0, 1, 40, 79, 80, 279):
        beta = max(5.0e-3 - 5.0e-5 * step, 1.0e-3)
        close(world.gradient([term], step, 280), -beta * world.R[:, None] * world.score / 9)


def test_masks_say_where_the_teacher_speaks():
    world = World(3)
    of_row = {row: np.flatnonzero(row == ROW_N) for row in range(6)}
    for mask, kept_B in KEPT_B.items():
        found = world.gradient([distill(support={"token": "k2"}, mask=mask)])
        for row, tokens in of_row.items():
            assert (np.abs(found[tokens]).max() > 1e-3) == bool(kept_B[row])


def test_groups_without_contrast_get_the_teacher_alone_and_under_trrd_nothing():
    world = World(4)
    silent = np.flatnonzero(HAND_ADVANTAGE_B[ROW_N] == 0)
    close(world.gradient([grpo()])[silent], 0.0, 1e-12)
    close(world.gradient([grpo(ratio={"alpha": 0.5})])[silent], 0.0, 1e-12)
    joint = world.gradient([grpo(), distill(support={"token": "k2"}, weight=0.5)])
    close(joint[silent], (-0.5 * world.R[:, None] * world.score / 9)[silent])


def test_another_teacher_gives_kdrl_and_trrd_another_gradient():
    joint: list[Term[Any]] = [grpo(), distill(support={"token": "k2"}, weight=0.1)]
    anchored: list[Term[Any]] = [grpo(ratio={"alpha": 0.5})]
    for terms in (joint, anchored):
        world = World(5)
        before = world.gradient(terms)
        world.teacher = World(6).teacher
        assert np.abs(world.gradient(terms) - before).max() > 1e-4


# --- TRRD: r = (pi / pi_old)^a (pi / p)^(1-a), log pi - log p clamped -------------------------------------------------


def trrd(
    advantage: float, gap: float, *, stale: float = 0.0, clip: dict[str, float] | None = None, **anchor: Any
) -> tuple[float, float]:
    """Loss and its gradient on log pi where log pi - log p = gap and log pi - log pi_old = stale."""
    term = grpo(ratio={"alpha": 0.5} | anchor, clip=clip or {})
    logq = as_tensor([-2.0]).requires_grad_()
    view = token_view(
        logq,
        advantage_N=as_tensor([advantage]),
        teacher_N=as_tensor([-2.0 - gap]),
        old_N=None if stale == 0.0 else as_tensor([-2.0 - stale]),
    )
    loss = term.loss(view)
    loss.sum().backward()
    assert logq.grad is not None
    return loss.item(), logq.grad.item()


def test_trrd_ratio_is_the_geometric_mixture():
    for alpha, stale, gap in ((0.5, 0.2, 0.1), (0.25, -0.1, 0.4), (1.0, 0.1, 0.9), (0.0, 0.3, -0.1)):
        ratio = np.exp(alpha * stale + (1 - alpha) * gap)
        loss, gradient = trrd(1.0, gap, stale=stale, alpha=alpha, clip={"low": 0.9, "high": 9.0})
        close([loss, gradient], [-ratio, -ratio])


def test_trrd_on_policy_starts_at_the_teachers_ratio_and_not_at_one():
    assert trrd(1.0, -0.3)[0] == pytest.approx(-np.exp(-0.15))


@pytest.mark.parametrize(
    ("advantage", "gap", "weight"),
    [
        (1.0, -0.6, np.exp(-0.3)),  # the teacher prefers it: kept, weighted down
        (1.0, 0.3, np.exp(0.15)),  # within the clip
        (1.0, 0.6, 0.0),  # exp(.3) > 1.2: the teacher rejects it, masked
        (-1.0, 0.6, np.exp(0.3)),  # the teacher rejects it: pushed down harder
        (-1.0, -0.3, np.exp(-0.15)),  # within the clip
        (-1.0, -0.6, 0.0),  # exp(-.3) < .8: the teacher prefers it, protected
        (0.0, 0.6, 0.0),
        (0.0, -0.6, 0.0),
    ],
)
def test_trrd_weights_by_hand(advantage: float, gap: float, weight: float):
    _, gradient = trrd(advantage, gap)
    close(gradient, -advantage * weight)


@pytest.mark.parametrize("gap", [-9.0, -1.5, 1.5, 9.0])
def test_trrd_clamp_bounds_the_ratio_and_leaves_the_factor_alpha(gap: float):
    advantage = -np.sign(gap)  # the side on which the clip does not hold the token
    ratio = np.exp(0.5 * np.sign(gap))
    loss, gradient = trrd(advantage, gap)
    close(loss, -advantage * ratio)
    close(gradient, -advantage * 0.5 * ratio)
    free_ratio = np.exp(0.5 * gap)
    close(trrd(advantage, gap, clamp=None), [-advantage * free_ratio] * 2)


def test_the_teacher_never_turns_the_rewards_sign():
    for advantage in (-2.0, -0.5, 0.5, 2.0):
        for gap in np.linspace(-4, 4, 33):
            for stale in (-0.5, 0.0, 0.5):
                _, gradient = trrd(advantage, gap, stale=stale)
                assert -gradient * advantage >= 0.0


def test_alpha_one_is_grpo_and_says_what_it_needs():
    for stale in (-0.4, -0.1, 0.1, 0.4):
        for advantage in (-1.0, 1.0):
            term = grpo()
            logq = as_tensor([-2.0]).requires_grad_()
            loss = term.loss(token_view(logq, advantage_N=as_tensor([advantage]), old_N=as_tensor([-2.0 - stale])))
            loss.sum().backward()
            assert logq.grad is not None
            close(trrd(advantage, 5.0, stale=stale, alpha=1.0), [loss.item(), logq.grad.item()])
    assert grpo().needs.teacher is None
    assert grpo(ratio={"alpha": 0.5}).needs.teacher == "token"
