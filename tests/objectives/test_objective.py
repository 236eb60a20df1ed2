"""A list of terms over a step's rollouts: who reads what, with which advantage and which weight of each token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdrl.batch import Origin, Response, Rollouts
from kdrl.objectives.objective import Active, Objective, reduction, weighted_loss
from kdrl.objectives.schedules import Moment
from kdrl.objectives.terms import TERMS
from kdrl.tasks import Problem

from .reference import as_tensor, close, token_view


def response(
    group: int, length: int, reward: float, origin: Origin = "student", ended: bool = True, **more: Any
) -> Response:
    problem = Problem(id=str(group), prompt="?", answer=0)
    ids = list(range(length))
    return Response(problem, group, [1], ids, origin, ended, "", reward=reward, correct=reward == 1.0, **more)


# Group 0: right (2 tokens), wrong (1, truncated), a gold text (2, its first not trained). Group 1: wrong, wrong.
ROLLOUTS = Rollouts.of(
    [
        response(0, 2, 1.0),
        response(0, 1, 0.0, ended=False),
        response(0, 2, 1.0, "gold", trained=[False, True]),
        response(1, 3, 0.0),
        response(1, 1, 0.0),
    ]
)
#         row: 0  0  1  2  2  3  3  3  4
STUDENT_N = [1, 1, 1, 0, 0, 1, 1, 1, 1]
WRONG_N = [0, 0, 1, 0, 0, 1, 1, 1, 1]
LAST_N = [0, 1, 0, 0, 1, 0, 0, 1, 1]


def activate(*terms: tuple[str, dict[str, Any]], step: int = 0, **more: Any) -> list[Active]:
    made = [TERMS.get(name)(TERMS.get(name).Config.model_validate(keys)) for name, keys in terms]
    return Objective(made).activate(ROLLOUTS, Moment(step, 10), **more)


def kept(active: Active) -> list[int]:
    return active.keep_N.long().tolist()


def test_a_term_reads_the_trained_tokens_of_its_origins_that_its_mask_keeps():
    gold, student, masked, trimmed, both = activate(
        ("cross_entropy", {}),
        ("policy_gradient", {}),
        ("distill", {"on": ["student"], "mask": "wrong_response"}),
        ("distill", {"on": ["student"], "skip_eos": True}),
        ("distill", {"mask": ["right_response", {"top_entropy": 1.0}]}),
        entropy_N=torch.arange(9.0),
    )
    assert kept(gold) == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert kept(student) == STUDENT_N
    assert kept(masked) == WRONG_N
    assert masked.eligible_N.long().tolist() == STUDENT_N
    assert kept(trimmed) == [s * (1 - e) for s, e in zip(STUDENT_N, LAST_N, strict=True)]
    assert kept(both) == [1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert [a.name for a in (gold, student, masked)] == ["cross_entropy", "policy_gradient", "distill.0"]


def test_advantages_are_taken_over_the_responses_that_the_term_reads():
    (active,) = activate(("policy_gradient", {"advantage": "dr_grpo"}))
    assert active.advantage_B is not None
    # With the gold text in its group the mean would be 2/3.
    close(active.advantage_B, [0.5, -0.5, 0.0, 0.0, 0.0])
    assert activate(("distill", {}))[0].advantage_B is None


def test_a_term_of_zero_weight_is_not_active_and_returns_with_its_schedule():
    terms = (
        ("policy_gradient", {"weight": {"switch": {"at": 3, "before": 0.0, "after": 1.0}}}),
        ("distill", {"weight": {"linear": {"from": 1.0, "to": 0.0, "steps": 4}}}),
    )
    found = {step: {a.name: a.weight for a in activate(*terms, step=step)} for step in (0, 3, 4)}
    assert found == {
        0: {"distill": 1.0},
        3: {"policy_gradient": 1.0, "distill": 0.25},
        4: {"policy_gradient": 1.0},
    }


def test_which_teacher_is_asked():
    anchored, plain, other, own = activate(
        ("policy_gradient", {"ratio": {"alpha": 0.5}}),
        ("policy_gradient", {}),
        ("distill", {}),
        ("distill", {"teacher": "self", "on": ["privileged"]}),
    )
    assert [a.teacher for a in (anchored, plain, other, own)] == ["teacher", None, "teacher", "self"]


def test_a_sequence_ratio_wants_whole_responses_and_others_only_what_they_keep():
    half = {"mask": {"top_entropy": 0.25}}
    token, sequence = activate(
        ("policy_gradient", half),
        ("policy_gradient", half | {"ratio": "sequence"}),
        entropy_N=torch.tensor([0.0, 0, 0, 0, 0, 1, 2, 0, 0]),
    )
    assert token.wanted_N(ROLLOUTS.row_N, 5).long().tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert sequence.wanted_N(ROLLOUTS.row_N, 5).long().tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("reduce", "weight_N"),
    [
        ("sum", [0, 0, 1, 0, 0, 1, 1, 1, 0]),
        ("token_global", [0, 0, 1 / 4, 0, 0, 1 / 4, 1 / 4, 1 / 4, 0]),
        ("sequence_mean", [0, 0, 1 / 2, 0, 0, 1 / 6, 1 / 6, 1 / 6, 0]),
        ({"constant": 10.0}, [0, 0, 1 / 30, 0, 0, 1 / 30, 1 / 30, 1 / 30, 0]),
        ("batch_tokens", [0, 0, 1 / 6, 0, 0, 1 / 6, 1 / 6, 1 / 6, 0]),
    ],
    ids=str,
)
def test_one_optimizer_step_counts_its_own_responses(reduce: Any, weight_N: list[float]):
    (active,) = activate(("distill", {"on": ["student"], "mask": "wrong_response", "reduce": reduce}))
    close(reduction(active, ROLLOUTS, [0, 1, 3]).double(), weight_N, 1e-7)


def test_a_token_of_no_weight_cannot_spoil_the_loss():
    (active,) = activate(("cross_entropy", {}))
    logq = as_tensor([-1.0, -np.inf, -2.0]).requires_grad_()
    loss = weighted_loss(active, token_view(logq), as_tensor([0.25, 0.0, 0.5]))
    loss.backward()
    assert logq.grad is not None
    close(loss.item(), 1.25)
    close(logq.grad, [-0.25, 0.0, -0.5])


def test_groups_kept_for_distillation_leave_the_policy_gradient_as_it_was():
    # Dynamic sampling: DAPO never sees a group of equal rewards, however many a distillation term keeps.
    made = [TERMS.get(name)(TERMS.get(name).Config()) for name in ("policy_gradient", "distill")]
    policy, distill = Objective(made, drop_flat=True).activate(ROLLOUTS, Moment(0, 10))
    assert kept(policy) == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert kept(distill)[5:] == [1, 1, 1, 1]
    alone = reduction(policy, ROLLOUTS, range(ROLLOUTS.rows))
    close(alone.sum(), 1.0)
    assert (alone[5:] == 0).all()
