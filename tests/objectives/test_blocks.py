"""Losses over blocks of tokens: their formulas, and that chunks and micro-batches cut no block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kdrl.objectives.blocks import BatchDistill, BatchDistillConfig, block_ids, sinkhorn, standardised_kl
from kdrl.objectives.head import Head, chunks, score_tokens

from .reference import Array, as_tensor, autograd, close, softmax, tokens_of


def by_hand(teacher: Array, student: Array, epsilon: float, rounds: int, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    cost = np.array([[np.abs(a - b).sum() for b in p] for a in q])
    plan = np.exp(-cost / epsilon)
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdims=True)
        plan = plan / plan.sum(0, keepdims=True)
    return float((plan * cost).sum())


def test_sinkhorn_is_the_transport_cost_of_the_formula_and_its_gradient():
    teacher, student = np.random.default_rng(0).normal(size=(2, 4, 6))
    logp = as_tensor(teacher).log_softmax(-1)
    value, gradient = autograd(lambda z: sinkhorn(logp, z.log_softmax(-1), 0.1, 20, 2.0), student)
    close(value.sum(), by_hand(teacher, student, 0.1, 20, 2.0))
    numeric = np.zeros_like(student)
    for at in np.ndindex(*student.shape):
        step = np.zeros_like(student)
        step[at] = 1e-6
        above, below = (by_hand(teacher, student + s * step, 0.1, 20, 2.0) for s in (1, -1))
        numeric[at] = (above - below) / 2e-6
    close(gradient, numeric, 1e-6)


def test_sinkhorn_couples_the_rows():
    teacher, student = np.random.default_rng(1).normal(size=(2, 3, 5))
    whole = sinkhorn(*(as_tensor(x).log_softmax(-1) for x in (teacher, student))).sum()
    alone = sum(
        sinkhorn(*(as_tensor(x[i : i + 1]).log_softmax(-1) for x in (teacher, student))).sum() for i in range(3)
    )
    assert abs(float(whole - alone)) > 1e-3


def test_standardised_kl_by_hand_and_nothing_from_one_token():
    teacher, student = np.random.default_rng(2).normal(size=(2, 5, 4))
    logs = [as_tensor(x).log_softmax(-1) for x in (teacher, student)]
    p, q = ((x.numpy() - x.numpy().mean(0)) / np.sqrt(x.numpy().var(0) + 1e-6) for x in logs)
    p, q = softmax(p), softmax(q)
    close(standardised_kl(*logs), (p * np.log(p / q)).sum(-1))
    close(standardised_kl(logs[0][:1], logs[1][:1]), [0.0])


def test_blocks_are_runs_of_kept_tokens_of_one_response():
    keep = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1]).bool()
    rows = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2])
    ids = block_ids(keep, rows, 2)[keep].tolist()
    assert [ids.index(i) for i in ids] == [0, 0, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_a_chunk_begins_only_where_it_may(size: int):
    starts = [0, 3, 4, 9]
    found = chunks(11, 7, size, starts)
    assert [part.start for part in found] == [s for s in starts if s in {p.start for p in found}]
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(11))
    assert all(part.stop - part.start <= max(size, 5) for part in found)
    assert chunks(0, 7, size, [0]) == []


@pytest.mark.parametrize("loss", ["sinkhorn", "standardised_kl"])
def test_chunks_change_nothing_because_no_block_is_cut(loss: str):
    random = torch.Generator().manual_seed(3)
    hidden, weight, teacher = (
        torch.randn(n, m, generator=random, dtype=torch.float64) for n, m in ((11, 4), (9, 4), (11, 9))
    )
    block = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, -1])
    starts = [0, 3, 4, 9, 10]
    term = BatchDistill(BatchDistillConfig.model_validate({"loss": loss}))

    def compare(logq: torch.Tensor, part: slice) -> torch.Tensor:
        tokens = tokens_of(teacher[part].log_softmax(-1), logq, data={"block": block[part]})
        return term.compare(tokens, logq)

    results = []
    for size in (1, 4, 100):
        leaf = hidden.clone().requires_grad_()
        found = score_tokens(
            Head(weight),
            leaf,
            torch.zeros(11, dtype=torch.long),
            comparisons=[compare],
            chunk_tokens=size,
            starts=starts,
        ).losses_N[0][:, 0]
        found.sum().backward()
        assert leaf.grad is not None
        results.append((found.detach(), leaf.grad))
    assert float(results[0][0][10]) == 0.0, "a token that the term does not keep is in no block"
    for value, gradient in results[1:]:
        close(value, results[0][0])
        close(gradient, results[0][1])


@pytest.mark.parametrize(
    ("loss", "says"), [("sinkhorm", "sinkhorn"), ({"sinkhorn": {"epsilom": 1}}, "epsilon"), ({}, "no block loss")]
)
def test_wrong_names_and_settings_are_refused(loss: Any, says: str):
    with pytest.raises(ValidationError, match=says):
        BatchDistillConfig.model_validate({"loss": loss})
