"""The chunked head against the naive full-logits computation, and that N x V logits never exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.head import CHUNK_ELEMENTS, Head, chunks, entropy_of, score_tokens
from kdrl.objectives.specs import Divergence
from kdrl.objectives.terms import DistillConfig

from .reference import close, distribution_loss, quick


@dataclass
class Case:
    """A head, hidden states and targets in float64, and what a naive pass over full logits gives."""

    tokens: int
    width: int = 3
    vocabulary: int = 7
    padded: int = 0
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        rows = self.vocabulary + self.padded
        self.hidden = torch.randn(self.tokens, self.width, generator=random, dtype=torch.float64)
        self.weight = torch.randn(rows, self.width, generator=random, dtype=torch.float64)
        self.bias_V = torch.randn(rows, generator=random, dtype=torch.float64) if self.bias else None
        self.targets = torch.randint(self.vocabulary, (self.tokens,), generator=random)
        self.teacher = torch.randn(self.tokens, self.vocabulary, generator=random, dtype=torch.float64).log_softmax(-1)
        self.pull = torch.randn(3, self.tokens, generator=random, dtype=torch.float64)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.scale, self.softcap, self.vocabulary if self.padded else None)

    def naive(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        logits = torch.einsum("nd,vd->nv", hidden, weight)
        logits = self.scale * (logits if bias is None else logits + bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        prob = torch.softmax(logits[:, : self.vocabulary] / self.temperature, -1)
        entropy = -(prob * prob.log()).sum(-1)
        kl = (self.teacher.exp() * (self.teacher - prob.log())).sum(-1)
        return [prob[range(self.tokens), self.targets].log(), entropy, kl]

    def chunked(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int | None) -> list[Tensor]:
        scores = score_tokens(
            self.head(weight, bias),
            hidden,
            self.targets,
            temperature=self.temperature,
            entropy=True,
            comparisons=[lambda logq, part: divergence_of(Divergence(kind="forward_kl"), self.teacher[part], logq)],
            chunk_tokens=size,
        )
        assert scores.entropy_N is not None
        return [scores.logp_N, scores.entropy_N, *scores.losses_N]

    def with_gradients(self, way: Any, *settings: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias_V) if x is not None]
        hidden, weight, bias = (*leaves, None)[:3]
        values = way(hidden, weight, bias, *settings)
        (self.pull * torch.stack(values)).sum().backward()
        return [*(v.detach() for v in values), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


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
        seed=st.integers(0, 99),
    ),
    size=st.none() | st.integers(1, 15),
)
@quick
def test_values_and_gradients_equal_the_naive_computation(case: Case, size: int | None):
    same(case.with_gradients(case.chunked, size), case.with_gradients(case.naive))


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
    ],
    ids=str,
)
def test_each_option_of_the_head(case: Case):
    for size in (1, 2, 4, 5, 99, None):
        same(case.with_gradients(case.chunked, size), case.with_gradients(case.naive))
    with torch.no_grad():
        same(case.chunked(case.hidden, case.weight, case.bias_V, 2), case.naive(case.hidden, case.weight, case.bias_V))


def test_padded_rows_have_no_probability_and_no_gradient():
    case = Case(4, padded=3, bias=True)
    found = case.with_gradients(case.chunked, 3)
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


# --- memory: B x T x V is never materialised --------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as mode:
        yield mode


TOKENS, VOCABULARY, WIDTH, CHUNK = 64, 97, 8, 16
EVERY_SUPPORT = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": {"jsd": 0.5}},
    {"divergence": "reverse_kl", "support": {"topk": 4}},
]


def largest_tensors(chunk: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Most elements of a tensor made in the forward and in the backward pass, teacher head included."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    weight, teacher_weight = torch.randn(2, VOCABULARY, WIDTH, dtype=dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    teacher = Head(teacher_weight)
    configs = [DistillConfig.model_validate(spec) for spec in EVERY_SUPPORT]
    comparisons = [
        lambda logq, part, c=config: distribution_loss(c, teacher.logp(teacher_hidden[part]), logq)
        for config in configs
    ]
    with largest() as forward:
        scores = score_tokens(
            Head(weight, softcap=5.0),
            hidden,
            torch.zeros(TOKENS, dtype=torch.long),
            entropy=True,
            comparisons=comparisons,
            chunk_tokens=chunk,
        )
        assert scores.entropy_N is not None
        loss = torch.stack([scores.logp_N, scores.entropy_N, *scores.losses_N]).sum()
    with largest() as backward:
        loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return forward.elements, backward.elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_tokens_by_vocabulary_exists_forward_or_backward(dtype: torch.dtype):
    bound = max(CHUNK * VOCABULARY, VOCABULARY * WIDTH, TOKENS * WIDTH)
    assert bound < TOKENS * VOCABULARY
    assert largest_tensors(CHUNK, dtype) == (bound, bound)


def test_the_probe_sees_full_logits_where_they_exist():
    assert largest_tensors(TOKENS) == (TOKENS * VOCABULARY, TOKENS * VOCABULARY)


def test_forward_keeps_no_chunk_of_logits_for_the_backward_pass():
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept = max(kept, tensor.numel())
        return tensor

    hidden, weight = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score_tokens(Head(weight), hidden, torch.zeros(TOKENS, dtype=torch.long), entropy=True, chunk_tokens=CHUNK)
    assert kept < CHUNK * VOCABULARY


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
