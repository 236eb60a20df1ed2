"""The reducer by hand, and that splitting or reordering a step changes neither loss nor gradient of any term."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdrl.objectives.reduce import Reduce, token_weights
from kdrl.objectives.terms import TERMS, Term, TokenView

from .reference import Array, as_tensor, close, quick, token_view, tokens_of

# Response 0 keeps two of three tokens, response 1 its only one, response 2 none of two; response 3 has no tokens.
KEEP = torch.tensor([True, False, True, True, False, False])
ROWS = torch.tensor([0, 0, 0, 1, 2, 2])
HAND = [
    ("sum", [1, 0, 1, 1, 0, 0]),
    ("batch_tokens", [1 / 6, 0, 1 / 6, 1 / 6, 0, 0]),
    ("token_global", [1 / 3, 0, 1 / 3, 1 / 3, 0, 0]),
    ("sequence_mean", [1 / 4, 0, 1 / 4, 1 / 2, 0, 0]),
    ({"constant": 5.0}, [1 / 20, 0, 1 / 20, 1 / 20, 0, 0]),
]
KINDS = [kind for kind, _ in HAND]


def weights(kind: Any, keep: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    return token_weights(Reduce.model_validate(kind), keep, rows_N, rows, torch.float64)


@pytest.mark.parametrize(("kind", "expected"), HAND, ids=str)
def test_each_kind_by_hand(kind: Any, expected: list[float]):
    found = weights(kind, KEEP, ROWS, 4)
    assert found.dtype == torch.float64
    close(found, expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_without_kept_tokens_weighs_nothing(kind: Any):
    close(weights(kind, torch.zeros_like(KEEP), ROWS, 4), np.zeros(6))
    assert weights(kind, KEEP[:0], ROWS[:0], 0).shape == (0,)
    assert weights(kind, KEEP[:0], ROWS[:0], 3).shape == (0,)


tokens_and_rows = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=12)


@given(tokens=tokens_and_rows)
@quick
def test_token_global_weighs_every_kept_token_alike_and_one_in_total(tokens: list[tuple[bool, int]]):
    keep, rows_N = (torch.tensor(column) for column in zip(*tokens, strict=True))
    found = weights("token_global", keep, rows_N, 4)
    close(found, keep.double() / max(1, keep.sum()))


@given(tokens=tokens_and_rows)
@quick
def test_sequence_mean_weighs_every_response_with_kept_tokens_alike(tokens: list[tuple[bool, int]]):
    keep, rows_N = (torch.tensor(column) for column in zip(*tokens, strict=True))
    found = weights("sequence_mean", keep, rows_N, 4)
    used = rows_N[keep].unique()
    for row in used:
        mine = keep & (rows_N == row)
        close(found[mine], np.full(mine.sum(), 1 / (mine.sum().item() * len(used))))
    close(found.sum(), float(keep.any()))


def test_a_float32_step_of_many_tokens_counts_them_all():
    rows_N = torch.arange(100_000) // 1000
    found = token_weights(Reduce(), torch.ones(100_000, dtype=torch.bool), rows_N, 100, torch.float32)
    close(found.double().sum(), 1.0, 1e-6)


@pytest.mark.parametrize("raw", [*KINDS, {"constant": 7}], ids=str)
def test_written_back_as_it_was_read(raw: Any):
    parsed = Reduce.model_validate(raw)
    assert parsed.model_dump() == raw
    assert Reduce.model_validate(parsed.model_dump()) == parsed


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("constant", "needs the length L"),
        ({"constant": None}, "needs the length L"),
        ({"kind": "sum", "length": 3}, "only it takes one"),
        ({"constant": 0}, "greater than 0"),
        ({"constant": -2}, "greater than 0"),
        ("token_globl", "token_global"),
        ({"constnt": 4}, "constnt"),
    ],
    ids=str,
)
def test_bad_reductions_are_refused(raw: Any, says: str):
    with pytest.raises(ValidationError, match=says):
        Reduce.model_validate(raw)


# --- splitting changes nothing ----------------------------------------------------------------------------------------

LENGTHS = [3, 1, 4, 2, 1, 3]
ROW_N = np.repeat(np.arange(6), LENGTHS)
VOCABULARY = 4
TERM_SPECS: list[tuple[str, dict[str, Any]]] = [
    ("policy_gradient", {}),
    ("policy_gradient", {"ratio": "sequence", "clip": {"low": 0.05, "high": 0.05}}),
    ("policy_gradient", {"ratio": {"alpha": 0.5}}),
    ("policy_gradient", {"clip": {"kind": "cispo", "cap": 1.1}}),
    ("policy_gradient", {"clip": {"dual": 1.2}}),
    ("distill", {"support": {"token": "k1"}}),
    ("distill", {"support": {"token": "k2"}}),
    ("distill", {"support": {"token": "k3"}, "clamp": 0.5}),
    ("distill", {"divergence": "forward_kl", "support": {"token": {"estimator": "k3", "as": "loss"}}}),
    ("distill", {"support": "full", "divergence": {"jsd": 0.5}}),
    ("distill", {"support": {"topk": 2}}),
    ("cross_entropy", {}),
    ("reference_kl", {}),
    ("entropy", {}),
]


class Step:
    """One optimizer step: six responses, the student's logits at every token, and everything the terms read."""

    def __init__(self, stale: bool) -> None:
        random = np.random.default_rng(12)
        size = len(ROW_N)
        self.logits_NV = random.normal(size=(size, VOCABULARY))
        self.teacher_NV = as_tensor(random.normal(size=(size, VOCABULARY))).log_softmax(-1)
        self.token_N = torch.as_tensor(random.integers(VOCABULARY, size=size))
        self.data: dict[str, Tensor] = {
            "advantage_N": as_tensor(random.normal(size=6))[ROW_N],
            "teacher_N": self.teacher_NV.gather(-1, self.token_N[:, None])[:, 0],
            "reference_N": as_tensor(-random.exponential(size=size)),
            "last_N": torch.as_tensor(np.append(np.diff(ROW_N) > 0, True)),
            "reward_N": torch.zeros(size, dtype=torch.float64),
        }
        self.keep_N = torch.as_tensor(random.random(size) < 0.7)
        if stale:
            own = as_tensor(self.logits_NV).log_softmax(-1).gather(-1, self.token_N[:, None])[:, 0]
            self.data["old_N"] = own + 0.3 * as_tensor(random.normal(size=size))

    def view(self, term: Term[Any], z_NV: Tensor, tokens: Array, rows: list[int]) -> TokenView:
        """The given tokens, whose responses are numbered by their place in `rows`."""
        logq_NV = z_NV[tokens].log_softmax(-1)
        place = {row: i for i, row in enumerate(rows)}
        extra = {}
        if term.needs.teacher == "distribution":
            extra["divergence_N"] = term.compare(tokens_of(self.teacher_NV[tokens], logq_NV), logq_NV)[:, 0]
        if term.needs.entropy:
            extra["entropy_N"] = -(logq_NV.exp() * logq_NV).sum(-1)
        view = token_view(
            logq_NV.gather(-1, self.token_N[tokens, None])[:, 0],
            [place[row] for row in ROW_N[tokens]],
            **{key: value[tokens] for key, value in self.data.items()},
            **extra,
        )
        return dataclasses.replace(view, keep_N=self.keep_N[tokens], rows=len(rows))

    def run(self, term: Term[Any], parts: list[list[int]]) -> tuple[float, Array]:
        """Loss and gradient when the responses are seen in these micro-batches, in this order."""
        z_NV = as_tensor(self.logits_NV).requires_grad_()
        weight_N = token_weights(term.config.reduce, self.keep_N, torch.as_tensor(ROW_N), 6, torch.float64)
        total = 0.0
        for rows in parts:
            tokens = np.concatenate([np.flatnonzero(row == ROW_N) for row in rows])
            loss = (weight_N[tokens] * term.loss(self.view(term, z_NV, tokens, rows))).sum()
            loss.backward()
            total += loss.item()
        assert z_NV.grad is not None
        return total, z_NV.grad.numpy()


@st.composite
def partitions(draw: st.DrawFn) -> list[list[int]]:
    order = draw(st.permutations(range(6)))
    cuts = sorted(draw(st.sets(st.integers(1, 5))))
    return [list(part) for part in np.split(np.array(order), cuts)]


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("name", "spec"), TERM_SPECS, ids=str)
@given(parts=partitions(), kind=st.sampled_from(KINDS))
@quick
def test_micro_batches_and_row_order_leave_loss_and_gradient(
    name: str, spec: dict[str, Any], stale: bool, parts: list[list[int]], kind: Any
):
    made = TERMS.get(name)
    term = made(made.Config.model_validate(spec | {"reduce": kind}))
    step = Step(stale)
    whole_loss, whole_gradient = step.run(term, [list(range(6))])
    loss, gradient = step.run(term, parts)
    close(loss, whole_loss)
    close(gradient, whole_gradient)
    assert np.abs(whole_gradient).max() > 1e-3
