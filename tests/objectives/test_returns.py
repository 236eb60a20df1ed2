"""MiniLLM's long-range term: later rewards by hand, and the whole sequence's reverse KL by enumeration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdrl.objectives.returns import SequenceKL, SequenceKLConfig, discounted_sum, later_rewards

from .reference import Array, as_tensor, close, log_softmax, quick, token_view

VOCABULARY, LONGEST = 3, 3  # token 0 ends a response


def term(**keys: Any) -> SequenceKL:
    return SequenceKL(SequenceKLConfig.model_validate(keys))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    discount=st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    seed=st.integers(0, 99),
)
@quick
def test_discounted_sums_are_those_of_the_plain_loop(lengths: list[int], discount: float, seed: int):
    row_N = np.repeat(np.arange(len(lengths)), lengths)
    values = np.random.default_rng(seed).normal(size=len(row_N))
    want, later, count = values.copy(), np.zeros_like(values), np.zeros_like(values)
    for t in reversed(range(len(values) - 1)):
        if row_N[t] == row_N[t + 1]:
            want[t] += discount * want[t + 1]
            later[t], count[t] = discount * want[t + 1], count[t + 1] + 1
    rows = torch.as_tensor(row_N)
    close(discounted_sum(as_tensor(values), rows, discount), want)
    close(later_rewards(as_tensor(values), rows, discount, False), later)
    close(later_rewards(as_tensor(values), rows, discount, True), later / np.maximum(count, 1))


def test_no_tokens_no_sums():
    assert len(discounted_sum(as_tensor([]), torch.zeros(0, dtype=torch.long), 1.0)) == 0


def sequences() -> list[tuple[int, ...]]:
    """Every response: it ends with token 0, or is cut at the longest length."""
    out: list[tuple[int, ...]] = []
    open_: list[tuple[int, ...]] = [()]
    while open_:
        prefix = open_.pop()
        for token in range(VOCABULARY):
            y = (*prefix, token)
            done = token == 0 or len(y) == LONGEST
            (out if done else open_).append(y)
    return sorted(out)


PREFIXES = sorted({y[:t] for y in sequences() for t in range(len(y))})


def sequence_kl(z: Array, logp: Array) -> float:
    """sum_y q(y) (log q(y) - log p(y)) with one row of logits per prefix."""
    logq, total = log_softmax(z), 0.0
    for y in sequences():
        at = [PREFIXES.index(y[:t]) for t in range(len(y))]
        mine, theirs = logq[at, y].sum(), logp[at, y].sum()
        total += np.exp(mine) * (mine - theirs)
    return total


def slope(function: Any, z: Array, h: float = 1e-6) -> Array:
    out = np.zeros_like(z)
    for i in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[i] = h
        out[i] = (function(z + step) - function(z - step)) / (2 * h)
    return out


def expected_gradient(made: SequenceKL, z: Array, logp: Array, single_step: bool, writer: Array | None = None) -> Array:
    """E over all responses of the term's gradient on the logits, by the writer's probabilities (default: q)."""
    leaf = as_tensor(z).requires_grad_()
    logq_PV = leaf.log_softmax(-1)
    at = np.array([PREFIXES.index(y[:t]) for y in sequences() for t in range(len(y))])
    token = np.array([v for y in sequences() for v in y])
    row_N = np.array([i for i, y in enumerate(sequences()) for _ in y])
    logq_N = logq_PV[torch.as_tensor(at), torch.as_tensor(token)]
    drawn = log_softmax(z) if writer is None else writer
    probability_B = np.exp(np.bincount(row_N, weights=drawn[at, token]))
    importance_B = np.exp(np.bincount(row_N, weights=log_softmax(z)[at, token] - drawn[at, token]))
    close(probability_B.sum(), 1.0)
    view = token_view(logq_N, row_N, teacher_N=as_tensor(logp[at, token]))
    weight_N = as_tensor((probability_B * importance_B)[row_N])
    loss = (weight_N * made.loss(view)).sum()
    if single_step:
        reach_P = np.zeros(len(PREFIXES))
        np.add.at(reach_P, at, (probability_B * importance_B)[row_N])
        gap_P = (logq_PV.exp() * (logq_PV - as_tensor(logp))).sum(-1)
        loss = loss + (as_tensor(reach_P) * gap_P).sum()
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad.numpy()


@pytest.mark.parametrize("seed", range(3))
def test_with_the_single_step_term_it_is_the_gradient_of_the_whole_sequences_reverse_kl(seed: int):
    random = np.random.default_rng(seed)
    z, logp = random.normal(size=(len(PREFIXES), VOCABULARY)), log_softmax(random.normal(size=(len(PREFIXES), 3)))
    want = slope(lambda logits: sequence_kl(logits, logp), z)
    close(expected_gradient(term(), z, logp, True), want, 1e-6)
    alone = expected_gradient(term(), z, logp, False)
    assert np.abs(alone - want).max() > 1e-2, "each part alone is not it"
    assert np.abs(alone).max() > 1e-2


def test_text_of_a_mixture_with_the_weights_of_whole_sequences_gives_the_same():
    random = np.random.default_rng(5)
    z, logp = random.normal(size=(len(PREFIXES), VOCABULARY)), log_softmax(random.normal(size=(len(PREFIXES), 3)))
    mixture = np.log(0.8 * np.exp(log_softmax(z)) + 0.2 * np.exp(logp))
    close(expected_gradient(term(), z, logp, True, mixture), slope(lambda a: sequence_kl(a, logp), z), 1e-6)


def test_a_teacher_equal_to_the_student_teaches_nothing():
    z = np.random.default_rng(6).normal(size=(len(PREFIXES), VOCABULARY))
    close(expected_gradient(term(), z, log_softmax(z), False), 0.0)


def one(made: SequenceKL, R: list[float], stale: list[float] | None = None) -> tuple[Array, Array]:
    """Loss and its gradient on log q of one response whose log p - log q are `R` and log q - log q_old are `stale`."""
    logq = as_tensor(np.linspace(-2.0, -1.0, len(R))).requires_grad_()
    old = None if stale is None else logq.detach() - as_tensor(stale)
    view = token_view(logq, [0] * len(R), teacher_N=logq.detach() + as_tensor(R), old_N=old)
    loss: Tensor = made.loss(view)
    loss.sum().backward()
    assert logq.grad is not None
    return loss.detach().numpy(), logq.grad.numpy()


def test_settings_by_hand():
    close(one(term(), [1.0, -2.0, 3.0])[1], [-1.0, -3.0, 0.0])
    close(one(term(discount=0.5), [1.0, -2.0, 3.0])[1], [-(0.5 * -2 + 0.25 * 3), -1.5, 0.0])
    close(one(term(length_norm=True), [1.0, -2.0, 3.0])[1], [-0.5, -3.0, 0.0])
    close(one(term(reward_scale=2.0, reward_clip=3.0), [1.0, -2.0, 1.0])[1], [-(-3.0 + 2.0), -2.0, 0.0])
    close(one(term(reward_clip=None), [0.0, 500.0])[1], [-500.0, 0.0])


def test_a_clip_holds_stale_tokens_and_none_multiplies_by_the_ratio():
    stale = [float(np.log(1.5)), 0.0, 0.0]
    close(one(term(), [0.0, 2.0, 1.0], stale)[1], [-4.5, -1.0, 0.0])
    close(one(term(clip={"low": 0.2, "high": 0.2}), [0.0, 2.0, 1.0], stale)[1], [0.0, -1.0, 0.0])
    close(one(term(clip={"low": 0.2, "high": 0.2}), [0.0, -2.0, 1.0], stale)[1], [1.5, -1.0, 0.0])


def test_what_it_asks_for():
    made = term()
    assert made.needs.teacher == "token"
    assert made.whole_rows
    assert made.config.on == ("student", "mixed")
    with pytest.raises(ValidationError, match="reward_clip"):
        term(reward_clip=-1.0)
