"""What the chunked head holds at once: B x T x V is never materialised, and a GPU does the same as a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrl.bench.allocations import Allocations, Recorded
from kdrl.objectives import logspace
from kdrl.objectives.head import CHUNK_ELEMENTS, Head, LowRank, score_tokens
from kdrl.objectives.logspace import relative_entropy
from kdrl.objectives.terms import DistillConfig

from .reference import distribution_loss


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


def test_a_frozen_head_has_no_gradient_and_no_array_of_its_size():
    hidden, weight = torch.randn(TOKENS, 64, requires_grad=True), torch.randn(4000, 64)
    low = LowRank(torch.randn(2, 64, requires_grad=True), torch.randn(4000, 2, requires_grad=True), 1.0)
    with Allocations() as seen:
        targets = torch.zeros(TOKENS, dtype=torch.long)
        score_tokens(Head(weight, adapters=(low,)), hidden, targets, chunk_tokens=4).logp_N.sum().backward()
    assert low.a_RD.grad is not None
    assert seen.peak < 4 * weight.numel() / 2


# The proportions of 1,024 tokens and 151,936 outcomes with chunks of 55, made small.
FIXED_TOKENS, FIXED_VOCABULARY, FIXED_CHUNK = 1024, 1500, 55


def distilled(chunked: bool, chunk: int | None = None) -> Tensor:
    """Reverse KL over the whole vocabulary, forward and backward; the gradient of the weights."""
    random = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, FIXED_TOKENS, 16, generator=random)
    weight, teacher_weight = torch.randn(2, FIXED_VOCABULARY, 16, generator=random)
    hidden.requires_grad_()
    weight.requires_grad_()
    config = DistillConfig.model_validate({"divergence": "reverse_kl"})
    if chunked:
        teacher = Head(teacher_weight)
        scores = score_tokens(
            Head(weight),
            hidden,
            torch.zeros(FIXED_TOKENS, dtype=torch.long),
            entropy=True,
            comparisons=[lambda q, part: distribution_loss(config, teacher.logp(teacher_hidden[part]), q)],
            chunk_tokens=chunk,
        )
        loss = scores.losses_N[0].mean()
    else:
        logq = (hidden @ weight.T).log_softmax(-1)
        logp = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
        loss = (logq.exp() * (logq - logp)).sum(-1).mean()
    loss.backward()
    assert weight.grad is not None
    return weight.grad


def test_peak_memory_of_distillation_is_a_twentieth_of_full_logits(monkeypatch: pytest.MonkeyPatch):
    peaks = {}
    # The share of a chunk that is worked on at a time, as it is at full size.
    monkeypatch.setattr(logspace, "_CACHED", FIXED_CHUNK * FIXED_VOCABULARY // 16)
    for chunked in (True, False):
        with Recorded() as seen:
            gradient = distilled(chunked, FIXED_CHUNK)
        peaks[chunked] = seen.peak_above(gradient)
    logits = 4 * FIXED_TOKENS * FIXED_VOCABULARY
    assert peaks[False] >= 5 * logits
    assert peaks[True] <= 5 * logits / 20


def test_at_the_default_size_half_of_the_tokens_have_logits_at_once(monkeypatch: pytest.MonkeyPatch):
    """Far below a chunk's 32 MiB too: student, teacher and two to work in."""
    monkeypatch.setattr(logspace, "_CACHED", FIXED_CHUNK * FIXED_VOCABULARY // 16)
    half = 4 * FIXED_TOKENS * FIXED_VOCABULARY // 2
    assert half < 4 * CHUNK_ELEMENTS
    with Recorded() as seen, largest() as made:
        gradient = distilled(True)
    assert made.elements == FIXED_TOKENS * FIXED_VOCABULARY // 2
    assert seen.peak_above(gradient) <= 4.2 * half


def test_what_waits_for_the_backward_pass_is_one_chunk():
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(2000, 8, requires_grad=True)
    with Allocations() as seen:
        scores = score_tokens(Head(weight), hidden, torch.zeros(1024, dtype=torch.long), chunk_tokens=128)
        assert seen.live <= 1.1 * 4 * 128 * 2000
    assert scores.logp_N.requires_grad


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_a_twentieth_of_full_logits():
    peaks = {}
    for chunked in (True, False):
        torch.manual_seed(0)
        hidden, teacher_hidden = torch.randn(2, 4096, 512, device="cuda")
        weight, teacher_weight = torch.randn(2, 151_936, 512, device="cuda") / 16
        hidden.requires_grad_()
        weight.requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if chunked:
            teacher = Head(teacher_weight)
            scores = score_tokens(
                Head(weight),
                hidden,
                torch.zeros(4096, dtype=torch.long, device="cuda"),
                comparisons=[lambda q, part, t=teacher, h=teacher_hidden: relative_entropy(q, t.logp(h[part]))],
            )
            scores.losses_N[0].mean().backward()
        else:
            logq = (hidden @ weight.T).log_softmax(-1)
            logp = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
            (logq.exp() * (logq - logp)).sum(-1).mean().backward()
        peaks[chunked] = torch.cuda.max_memory_allocated() - before - 4 * weight.numel()
    assert peaks[True] <= peaks[False] / 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_pass_equals_float64_on_the_cpu(dtype: torch.dtype):
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=random).to(dtype) for n in (70, 3001))
    targets = torch.randint(3001, (70,), generator=random)
    teacher = torch.randn(70, 3001, generator=random).log_softmax(-1)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        h, w = (x.to(device, kind).requires_grad_() for x in (hidden, weight))
        p = teacher.to(device, torch.promote_types(kind, torch.float32))
        scores = score_tokens(
            Head(w),
            h,
            targets.to(device),
            entropy=True,
            comparisons=[lambda q, part, p=p: relative_entropy(q, p[part])],
        )
        assert scores.entropy_N is not None
        values = [scores.logp_N, scores.entropy_N, *scores.losses_N]
        torch.stack(values).sum().backward()
        results.append([x.detach().double().cpu() for x in (*values, h.grad, w.grad) if x is not None])
    bound = 1e-3 if dtype == torch.float32 else 2.0**-7
    for exact, found in zip(*results, strict=True):
        assert (found - exact).norm() / exact.norm() < bound
