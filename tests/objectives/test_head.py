"""The chunked head against the naive full-logits computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdrl.objectives.head import CHUNK_ELEMENTS, Head, chunks, entropy_of, score_tokens

from .head_case import Case, same
from .reference import close, quick


@given(
    case=st.builds(
        Case,
        tokens=st.sampled_from([0, 1, 2, 5, 13]),
        width=st.sampled_from([1, 3, 4]),
        vocabulary=st.sampled_from([2, 7, 11]),
        padded=st.sampled_from([0, 1, 5]),
        bias=st.booleans(),
        scale=st.sampled_from([1.0, 0.25, 3.0]),
        softcap=st.sampled_from([None, 1.5, 30.0]),
        temperature=st.sampled_from([1.0, 0.6, 2.0]),
        ranks=st.sampled_from([(), (2,), (1, 3)]),
        seed=st.integers(0, 99),
    ),
    size=st.none() | st.integers(1, 15),
)
@quick
def test_values_and_gradients_equal_the_naive_computation(case: Case, size: int | None):
    same(case.with_gradients(case.chunked, size=size), case.with_gradients(case.naive))


@pytest.mark.parametrize(
    "case",
    [
        Case(0),
        Case(0, bias=True),
        Case(1),
        Case(5),
        Case(5, bias=True),
        Case(5, bias=True, scale=3.0),
        Case(5, softcap=1.5),
        Case(5, softcap=1.5, scale=0.5, bias=True),
        Case(5, padded=3),
        Case(5, padded=3, bias=True),
        Case(5, temperature=0.6),
        Case(5, temperature=0.6, softcap=1.5),
        Case(0, ranks=(2,)),
        Case(5, ranks=(2,)),
        Case(5, ranks=(1, 3), bias=True, scale=0.25, temperature=0.6),
        Case(5, ranks=(2,), softcap=1.5, padded=3),
    ],
    ids=str,
)
def test_each_option_of_the_head(case: Case):
    for size in (1, 2, 4, 5, 99, None):
        same(case.with_gradients(case.chunked, size=size), case.with_gradients(case.naive))
    with torch.no_grad():
        inputs = (case.hidden, case.weight, case.bias_V, *case.factors)
        same(case.chunked(*inputs, size=2), case.naive(*inputs))


def test_padded_rows_have_no_probability_and_no_gradient():
    case = Case(4, padded=3, bias=True)
    found = case.with_gradients(case.chunked, size=3)
    close(found[4][case.vocabulary :], np.zeros((3, 3)))
    close(found[5][case.vocabulary :], np.zeros(3))
    assert case.head(case.weight, None).vocab_size == 7
    assert Head(case.weight, rows=99).vocab_size == 10
    close(case.head(case.weight, case.bias_V).logp(case.hidden).exp().sum(-1), np.ones(4))


def test_comparisons_see_their_own_tokens_once_and_in_order():
    seen: list[slice] = []

    def numbered(logq_MV: Tensor, part: slice) -> Tensor:
        seen.append(part)
        return torch.arange(7, dtype=torch.float64)[part] + 0 * logq_MV.sum(-1)

    def picked(logq_MV: Tensor, part: slice) -> Tensor:
        return logq_MV[range(len(logq_MV)), case.targets[part]]

    case = Case(7)
    scores = score_tokens(Head(case.weight), case.hidden, case.targets, comparisons=[numbered, picked], chunk_tokens=3)
    assert [(part.start, part.stop) for part in seen] == [(0, 3), (3, 6), (6, 7)]
    assert scores.losses_N[0].tolist() == list(range(7))
    close(scores.losses_N[1].detach(), scores.logp_N.detach())
    assert scores.entropy_N is None


def test_a_head_merges_its_adapters_and_changes_all_its_tensors():
    case = Case(4, padded=3, bias=True, ranks=(2, 1))
    head = case.head(case.weight, case.bias_V, *case.factors)
    close(head.merged().logp(case.hidden), head.logp(case.hidden), 1e-12)
    assert head.merged().adapters == ()
    doubled = head.map(lambda tensor: 2.0 * tensor)
    for one, other in zip(doubled.tensors, head.tensors, strict=True):
        close(one, 2.0 * other)
    assert (doubled.rows, [low.scale for low in doubled.adapters]) == (7, [0.5, 0.5])


def test_a_heads_log_probs_are_differentiable_outside_of_a_pass_too():
    case = Case(4, bias=True, softcap=2.0, scale=0.5, temperature=0.7, ranks=(2,))

    def plain(*inputs: Any) -> list[Tensor]:
        hidden, weight, bias, *factors = inputs
        logp = case.head(weight, bias, *factors).logp(hidden, case.temperature)
        picked = logp[range(case.tokens), case.targets]
        return [picked, entropy_of(logp), (case.teacher.exp() * (case.teacher - logp)).sum(-1)]

    same(case.with_gradients(plain), case.with_gradients(case.naive))


def test_entropy_by_hand_also_of_impossible_outcomes():
    logp = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25] * 4], dtype=torch.float64).log()
    leaf = logp.clone().requires_grad_()
    entropy = entropy_of(leaf)
    close(entropy.detach(), np.log(2) * np.array([1.5, 0.0, 2.0]))
    entropy.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@given(tokens=st.integers(0, 50), vocabulary=st.integers(1, 200_000), size=st.none() | st.integers(1, 60))
@quick
def test_chunks_tile_the_tokens(tokens: int, vocabulary: int, size: int | None):
    parts = chunks(tokens, vocabulary, size)
    assert [i for part in parts for i in range(tokens)[part]] == list(range(tokens))
    assert all(part.stop - part.start <= (size or max(16, CHUNK_ELEMENTS // vocabulary)) for part in parts)


def test_the_default_chunk_bounds_the_logits_of_a_large_vocabulary():
    longest = max(part.stop - part.start for part in chunks(100_000, 151_936))
    assert longest >= 16
    assert longest * 151_936 <= CHUNK_ELEMENTS
    assert len(chunks(100, 10)) > 1, "also where all logits would fit"


# --- low precision ----------------------------------------------------------------------------------------------------


def low_precision(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 16, generator=random).bfloat16()
    return hidden, torch.randn(32, 16, generator=random).bfloat16(), torch.randint(32, (tokens,), generator=random)


def test_bfloat16_weights_give_float32_log_probs():
    hidden, weight, targets = low_precision(50)
    exact = score_tokens(Head(weight.double()), hidden.double(), targets, entropy=True)
    found = score_tokens(Head(weight), hidden, targets, entropy=True, chunk_tokens=7)
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    bound = 2e-5
    assert found.logp_N.dtype == torch.float32
    assert (found.logp_N - exact.logp_N).abs().max() < bound
    assert (rounded - exact.logp_N).abs().max() > 100 * bound, "logits in bfloat16 would be far outside the bound"
    assert found.entropy_N is not None
    assert exact.entropy_N is not None
    assert (found.entropy_N - exact.entropy_N).abs().max() < bound


def test_autocast_around_the_head_does_not_lower_its_precision():
    hidden, weight, targets = (x if x.dtype == torch.long else x.float() for x in low_precision(50))
    plain = score_tokens(Head(weight), hidden, targets).logp_N
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = weight.clone().requires_grad_()
        found = score_tokens(Head(leaf), hidden, targets).logp_N
    found.sum().backward()
    close(found.detach(), plain, 1e-6)
    exact = weight.clone().requires_grad_()
    score_tokens(Head(exact), hidden, targets).logp_N.sum().backward()
    close(leaf.grad, exact.grad, 1e-5)


@pytest.mark.parametrize("chunk", [512, 64, 4])
def test_bfloat16_gradients_are_rounded_once_whatever_the_chunk(chunk: int):
    # Rounding the sum once costs at most 2^-9 of each entry; summing chunks in bfloat16 costs a rounding per chunk.
    hidden, weight, targets = low_precision(512)
    gradients = []
    for dtype, size in ((torch.float64, 512), (torch.bfloat16, chunk)):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        score_tokens(Head(w), h, targets, chunk_tokens=size).logp_N.sum().backward()
        gradients.append([x.grad.double() for x in (h, w) if x.grad is not None])
    for exact, found in zip(*gradients, strict=True):
        assert (found - exact).norm() / exact.norm() < 2.0**-8 * 0.6


@pytest.mark.parametrize(("target", "rows"), [(5, None), (4, 4), (-100, None)])
def test_a_target_outside_the_vocabulary_is_refused_as_documented(target: int, rows: int | None):
    with pytest.raises(IndexError):
        score_tokens(Head(torch.randn(5, 3), rows=rows), torch.randn(2, 3), torch.tensor([0, target]))
