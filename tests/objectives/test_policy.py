"""Advantages, ratios and clipping against numbers worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdrl.objectives.policy import NAMED_ADVANTAGES, Advantage, Clip, advantages, clipped_loss, sequence_mean
from kdrl.objectives.terms import PolicyGradient, PolicyGradientConfig

from .reference import as_tensor, close, quick, token_view

# Group 4: rewards 1 0 0 0, mean 1/4, sample std 1/2. Group 1: 2 4, mean 3, std sqrt(2). Group 7: one response.
REWARDS = [1.0, 2.0, 0.0, 5.0, 0.0, 4.0, 0.0]
GROUPS = [4, 1, 4, 7, 4, 1, 4]
# Batch: sum 12, mean 12/7, squares 46, so variance (46 - 144/7) / 6 = 89/21.
BATCH_STD = np.sqrt(89 / 21)
HAND = {
    "grpo": [1.5, -np.sqrt(0.5), -0.5, 0.0, -0.5, np.sqrt(0.5), -0.5],
    "dr_grpo": [0.75, -1.0, -0.25, 0.0, -0.25, 1.0, -0.25],
    "rloo": [1.0, -2.0, -1 / 3, 0.0, -1 / 3, 2.0, -1 / 3],
    "reinforce": REWARDS,
    "batch_std": list(np.array([0.75, -1.0, -0.25, 0.0, -0.25, 1.0, -0.25]) / BATCH_STD),
}


def compute(spec: Any, rewards: Any, groups: Any) -> Any:
    return advantages(Advantage.model_validate(spec), as_tensor(rewards), torch.as_tensor(groups)).numpy()


@pytest.mark.parametrize("name", list(HAND))
def test_named_advantages_by_hand(name: str):
    close(compute(name, REWARDS, GROUPS), HAND[name], 1e-5)


def test_every_named_advantage_is_worked_by_hand_above():
    assert set(HAND) == set(NAMED_ADVANTAGES)


def test_parts_of_one_s_own_by_hand():
    batch_mean = np.array(REWARDS) - 12 / 7
    close(compute({"baseline": "batch_mean", "scale": "none"}, REWARDS, GROUPS), batch_mean)
    close(compute({"baseline": "batch_mean", "scale": "batch_std"}, REWARDS, GROUPS), batch_mean / BATCH_STD, 1e-5)
    loo = np.array(HAND["rloo"])
    close(compute({"baseline": "leave_one_out", "scale": "batch_std"}, REWARDS, GROUPS), loo / BATCH_STD, 1e-5)
    close(compute({"baseline": "leave_one_out", "scale": "group_std"}, [1.0, 0, 0, 0], [0] * 4)[0], 2.0, 1e-5)


EVERY = [{"baseline": b, "scale": s} for b in ("group_mean", "leave_one_out", "batch_mean", "none") for s in
         ("group_std", "batch_std", "none")]  # fmt: skip


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "batch_std"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_and_a_group_of_one_teach_nothing(name: str, reward: float):
    found = compute(name, [reward] * 3 + [0.7] + [1.0, 0.0], [0, 0, 0, 1, 2, 2])
    assert (found[:4] == 0.0).all()
    assert (found[4:] != 0.0).all()
    assert (compute(name, [reward] * 4, [0, 0, 0, 1]) == 0.0).all()


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_no_advantage_explodes_where_rewards_do_not_differ(spec: dict[str, str]):
    # Rewards in [0, 1]; a spread of zero must not divide them by the epsilon. Refusing the pair is an answer too.
    try:
        parsed = Advantage.model_validate(spec)
    except ValidationError:
        return
    for rewards in ([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1.0] * 6):
        found = advantages(parsed, as_tensor(rewards), torch.tensor([0, 0, 1, 1, 2, 3]))
        assert found.abs().max() < 10.0


@pytest.mark.parametrize("spec", [*NAMED_ADVANTAGES, {"baseline": "batch_mean", "scale": "none"}], ids=str)
@given(data=st.data(), order=st.permutations(range(6)))
@quick
def test_order_of_responses_and_names_of_groups_are_irrelevant(spec: Any, data: Any, order: list[int]):
    rewards = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6)))
    groups = np.array(data.draw(st.lists(st.integers(0, 2), min_size=6, max_size=6)))
    close(compute(spec, rewards[order], 7 - 2 * groups[order]), compute(spec, rewards, groups)[order], 1e-8)


def test_an_unknown_advantage_names_the_known():
    with pytest.raises(ValidationError, match="grpo, dr_grpo, rloo, reinforce, batch_std"):
        Advantage.model_validate("gropo")


@pytest.mark.parametrize("spec", [*NAMED_ADVANTAGES, {"baseline": "batch_mean", "scale": "none"}], ids=str)
def test_advantage_is_written_back_as_it_was_read(spec: Any):
    assert Advantage.model_validate(spec).model_dump() == spec


# --- clipping: loss and gradient on log pi as (ratio, advantage) -> (loss, slope), slope of the ratio is the ratio ----


def clipped(clip: dict[str, Any], ratio: float, advantage: float) -> tuple[float, float, bool]:
    logq = as_tensor([-1.3]).requires_grad_()
    log_ratio = logq - (-1.3 - np.log(ratio))
    loss, held = clipped_loss(Clip.model_validate(clip), log_ratio, as_tensor([advantage]), logq)
    loss.sum().backward()
    assert logq.grad is not None
    return loss.item(), logq.grad.item(), bool(held.item())


PPO_CASES = [
    # clip, ratio, A, loss, held
    ({}, 1.0, 2.0, -2.0, False),
    ({}, 1.1, 2.0, -2.2, False),
    ({}, 1.3, 2.0, -2.4, True),
    ({}, 0.5, 2.0, -1.0, False),
    ({}, 1.3, -2.0, 2.6, False),
    ({}, 0.5, -2.0, 1.6, True),
    ({}, 0.9, -2.0, 1.8, False),
    ({}, 1.5, 0.0, 0.0, False),
    ({"low": 0.1, "high": 0.1}, 1.15, 1.0, -1.1, True),
    ({"low": 0.1, "high": 0.1}, 0.85, -1.0, 0.9, True),
    ({"high": 0.28}, 1.25, 1.0, -1.25, False),
    ({"high": 0.28}, 1.3, 1.0, -1.28, True),
    ({"high": 0.28}, 0.75, -1.0, 0.8, True),
    ({"low": 3e-4, "high": 4e-4}, 1.00035, 1.0, -1.00035, False),
    ({"low": 3e-4, "high": 4e-4}, 0.99965, -1.0, 0.9997, True),
    ({"dual": 3.0}, 2.9, -2.0, 5.8, False),
    ({"dual": 3.0}, 4.0, -2.0, 6.0, True),
    ({"dual": 3.0}, 0.5, -2.0, 1.6, True),
    ({"dual": 3.0}, 4.0, 2.0, -2.4, True),
    ({"dual": 3.0}, 0.1, 2.0, -0.2, False),
]


@pytest.mark.parametrize(("clip", "ratio", "advantage", "loss", "held"), PPO_CASES)
def test_ppo_clip_by_hand(clip: dict[str, Any], ratio: float, advantage: float, loss: float, held: bool):
    close(clipped(clip, ratio, advantage), [loss, 0.0 if held else loss, held])


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize(("ratio", "weight", "held"), [(0.01, 0.01, False), (4.9, 4.9, False), (80.0, 5.0, True)])
def test_cispo_caps_the_weight_and_drops_no_token(advantage: float, ratio: float, weight: float, held: bool):
    loss, gradient, found_held = clipped({"kind": "cispo", "cap": 5.0}, ratio, advantage)
    close(loss, -weight * advantage * -1.3)
    close(gradient, -weight * advantage)
    assert found_held == held


@pytest.mark.parametrize("ratio", [0.1, 1.0, 9.0])
def test_no_clip_is_the_plain_surrogate(ratio: float):
    close(clipped({"kind": "none"}, ratio, 2.0), [-2 * ratio, -2 * ratio, False])
    close(clipped({"kind": "none"}, ratio, -2.0), [2 * ratio, 2 * ratio, False])


@pytest.mark.parametrize(
    ("clip", "why"),
    [
        ({"kind": "cispo"}, "clip.cap belongs to `kind: cispo`"),
        ({"cap": 5.0}, "clip.cap belongs to `kind: cispo`"),
        ({"kind": "cispo", "cap": 5.0, "high": 0.2}, "clip.high belongs to `kind: ppo`"),
        ({"kind": "none", "dual": 3.0}, "clip.dual belongs to `kind: ppo`"),
        ({"dual": 1.0}, "greater than 1"),
        ({"hgh": 0.2}, "hgh"),
        ({"low": -0.2}, "low"),
        ({"low": 1.5}, "low"),
        ({"high": -0.2}, "high"),
        ({"kind": "cispo", "cap": -5.0}, "cap"),
    ],
)
def test_clip_settings_that_would_do_nothing_or_turn_the_gradient_are_refused(clip: dict[str, Any], why: str):
    with pytest.raises(ValidationError, match=why):
        Clip.model_validate(clip)


@pytest.mark.parametrize(
    "clip",
    [
        {"kind": "ppo", "low": 0.2, "high": 0.28},
        {"kind": "ppo", "low": 0.1, "high": 0.2, "dual": 3.0},
        {"kind": "cispo", "cap": 5.0},
        {"kind": "none"},
    ],
)
def test_clip_is_written_back_as_it_was_read(clip: dict[str, Any]):
    parsed = Clip.model_validate(clip)
    assert parsed.model_dump() == clip
    assert Clip.model_validate(parsed.model_dump()) == parsed


# --- the term: which ratio --------------------------------------------------------------------------------------------


def policy_gradient(
    keys: dict[str, Any], advantage: list[float], log_ratio: list[float] | None, rows: list[int]
) -> tuple[Any, Any]:
    logq = as_tensor(np.linspace(-2.0, -0.5, len(rows))).requires_grad_()
    old = None if log_ratio is None else logq.detach() - as_tensor(log_ratio)
    term = PolicyGradient(PolicyGradientConfig.model_validate(keys))
    loss = term.loss(token_view(logq, rows, advantage_N=as_tensor(advantage), old_N=old))
    loss.sum().backward()
    assert logq.grad is not None
    return loss.detach().numpy(), logq.grad.numpy()


def test_on_policy_every_plain_variant_has_the_gradient_of_reinforce():
    advantage = [1.5, 1.5, -0.5]
    for keys in ({}, {"clip": {"kind": "none"}}, {"clip": {"kind": "cispo", "cap": 5.0}}, {"ratio": "none"}):
        close(policy_gradient(keys, advantage, None, [0, 0, 1])[1], [-1.5, -1.5, 0.5])
    close(policy_gradient({}, advantage, None, [0, 0, 1])[0], [-1.5, -1.5, 0.5])
    # Under GSPO each of a response's n tokens carries the whole ratio's gradient, a n-th of each.
    close(policy_gradient({"ratio": "sequence"}, advantage, None, [0, 0, 1])[1], [-1.5, -1.5, 0.5])


def test_token_ratio_by_hand():
    loss, gradient = policy_gradient({}, [1.0, 1.0, -1.0], list(np.log([1.1, 1.5, 1.5])), [0, 0, 1])
    close(loss, [-1.1, -1.2, 1.5])
    close(gradient, [-1.1, 0.0, 1.5])


def test_sequence_ratio_is_the_geometric_mean_over_the_response():
    # Response 0: log ratios .3, .1, -.1 with mean .1; response 1: one token at -.2.
    keys = {"ratio": "sequence", "clip": {"low": 0.5, "high": 0.5}}
    loss, gradient = policy_gradient(keys, [2.0, 2.0, -1.0, 2.0], [0.3, 0.1, -0.2, -0.1], [0, 0, 1, 0])
    s = np.exp([0.1, 0.1, -0.2, 0.1])
    close(loss, [-2 * s[0], -2 * s[0], s[2], -2 * s[0]])
    # The three losses of response 0 each pass a third of their slope to each of its tokens.
    close(gradient, [-2 * s[0], -2 * s[0], s[2], -2 * s[0]])


def test_sequence_ratio_is_clipped_for_the_response_as_one():
    keys = {"ratio": "sequence", "clip": {"low": 3e-4, "high": 4e-4}}
    loss, gradient = policy_gradient(keys, [1.0, 1.0, 1.0], [0.5, -0.4, 0.0001], [0, 0, 1])
    close(loss, [-1.0004, -1.0004, -np.exp(0.0001)])
    close(gradient, [0.0, 0.0, -np.exp(0.0001)])


def test_without_a_ratio_stale_log_probs_change_nothing():
    loss, gradient = policy_gradient({"ratio": "none"}, [2.0, -1.0], [0.9, -0.9], [0, 1])
    close(loss, [-2.0 * -2.0, 1.0 * -0.5])
    close(gradient, [-2.0, 1.0])


@pytest.mark.parametrize("clip", [{"high": 0.28}, {"kind": "cispo", "cap": 5.0}, {"dual": 3.0}])
def test_a_clip_that_no_ratio_would_use_is_refused(clip: dict[str, Any]):
    with pytest.raises(ValidationError, match="clip"):
        PolicyGradientConfig.model_validate({"ratio": "none", "clip": clip})


def test_sequence_mean_by_hand_also_for_a_response_without_tokens():
    found = sequence_mean(as_tensor([1.0, 5.0, 3.0]), torch.tensor([2, 0, 2]), 4)
    close(found, [2.0, 5.0, 2.0])
