"""The chunked head as one differentiable pass: what it compares, whose gradients it makes, and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrl.bench.allocations import Allocations
from kdrl.objectives import head as head_module
from kdrl.objectives import logspace
from kdrl.objectives.distill import distribution_loss as term_loss
from kdrl.objectives.head import Head, LowRank, entropy_of, score_tokens
from kdrl.objectives.logspace import relative_entropy
from kdrl.objectives.scores import Tokens
from kdrl.objectives.terms import DistillConfig

from .head_case import Case, same
from .reference import close, distribution_loss

KINDS: list[Any] = [
    "forward_kl",
    "reverse_kl",
    "tv",
    {"jsd": 0.3},
    {"skew_kl": 0.2},
    {"skew_reverse_kl": 0.2},
    {"symmetric": 0.4},
    {"alpha_beta": {"alpha": 0.4, "beta": 0.7}},
    {"arms": [{"of": "p||q", "gate": "entropy_p"}, {"of": "q||r"}], "assistant": {"a": 0.5, "share": 0.3}},
    {"pair": ["teacher", "uniform"]},
    {"preference": 0.5},
]


@pytest.mark.parametrize(
    ("kind", "support"),
    [(kind, "full") for kind in KINDS] + [(kind, {"topk": 3}) for kind in KINDS[:-2]],
    ids=str,
)
def test_every_divergence_has_the_gradient_of_full_logits(kind: Any, support: Any):
    config = DistillConfig.model_validate({"divergence": kind, "support": support})
    case = Case(7, vocabulary=9, width=4)

    def compare(logq: Tensor, part: slice) -> Tensor:
        tokens = Tokens(
            data={},
            logq_C=logq.detach().gather(-1, case.targets[part, None])[:, 0],
            logp_CV=case.teacher[part],
            logq_CV=logq.detach(),
            token_C=case.targets[part],
        )
        return term_loss(config, tokens, logq)[:, 0]

    def chunked(hidden: Tensor, weight: Tensor, bias: None, size: int | None) -> list[Tensor]:
        scores = score_tokens(Head(weight), hidden, case.targets, comparisons=[compare, compare], chunk_tokens=size)
        return [scores.logp_N, *scores.losses_N]

    def naive(hidden: Tensor, weight: Tensor, bias: None) -> list[Tensor]:
        logq = (hidden @ weight.T).log_softmax(-1)
        return [logq[range(7), case.targets], *(compare(logq, slice(0, 7)) for _ in range(2))]

    expected = case.with_gradients(naive)
    for size in (1, 3, 7, None):
        same(case.with_gradients(chunked, size=size), expected)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_what_a_loss_leaves_out_has_no_part_in_the_gradient(used: tuple[int, ...]):
    case = Case(7, bias=True)

    def some(way: Any) -> Any:
        return lambda *inputs: [x if i in used else torch.zeros_like(x) for i, x in enumerate(way(*inputs))]

    same(case.with_gradients(some(case.chunked)), case.with_gradients(some(case.naive)))


def test_what_is_less_than_a_chunk_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch):
    case, calls = Case(6), 0
    weight = case.weight.clone().requires_grad_()

    def counted(logq_MV: Tensor, part: slice) -> Tensor:
        nonlocal calls
        calls += 1
        return logq_MV.square().sum(-1)

    def gradient(elements: int) -> tuple[int, Tensor]:
        nonlocal calls
        calls = 0
        monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", elements)
        scores = score_tokens(Head(weight), case.hidden, case.targets, comparisons=[counted])
        (found,) = torch.autograd.grad(scores.losses_N[0].sum(), weight)
        return calls, found

    (kept, one), (remade, other) = gradient(6 * 7), gradient(6 * 7 - 1)
    assert (kept, remade) == (1, 2)
    close(one, other, 1e-12)


def test_comparisons_that_are_not_used_are_not_run_again():
    case, calls = Case(6), 0

    def counted(logq_MV: Tensor, part: slice) -> Tensor:
        nonlocal calls
        calls += 1
        return logq_MV.sum(-1)

    weight = case.weight.clone().requires_grad_()
    scores = score_tokens(Head(weight), case.hidden, case.targets, comparisons=[counted], chunk_tokens=3)
    scores.logp_N.sum().backward()
    assert calls == 2


@pytest.mark.parametrize("size", [1, 2, 7, None])
def test_tensors_that_comparisons_read_are_trained_too(size: int | None):
    case = Case(7, vocabulary=9)
    random = torch.Generator().manual_seed(5)
    start = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((9, 9), (7,), (9,))]

    def gradients(chunked: bool) -> list[Tensor]:
        inner, each, outer = leaves = [x.clone().requires_grad_() for x in start]
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        # Made outside of the comparison, from a leaf that it never sees.
        shift_V = outer.tanh() * 2.0

        def projected(logq: Tensor, part: slice) -> Tensor:
            return (case.teacher[part].exp() * ((logq @ inner + shift_V).log_softmax(-1))).sum(-1)

        def late(logq: Tensor, part: slice) -> Tensor:
            return logq.exp()[:, 0] if part.stop < 7 else logq.exp()[:, 0] * torch.ones_like(each[part]) + each[part]

        def own(logq: Tensor, part: slice) -> Tensor:
            return each[part] * 3.0

        if chunked:
            scores = score_tokens(
                Head(weight), hidden, case.targets, comparisons=[projected, late, own], chunk_tokens=size
            )
            values = scores.losses_N
        else:
            logq = (hidden @ weight.T).log_softmax(-1)
            parts = [slice(i, min(i + (size or 7), 7)) for i in range(0, 7, size or 7)]
            values = [torch.cat([f(logq[part], part) for part in parts]) for f in (projected, late, own)]
        (torch.stack(list(values)) * case.pull).sum().backward()
        found = [x.grad for x in (hidden, weight, *leaves)]
        assert all(g is not None and g.abs().sum() > 0 for g in found)
        return [g for g in found if g is not None]

    same(gradients(True), gradients(False))


def test_comparisons_train_what_they_read_when_the_head_is_frozen():
    case, trained = Case(5), torch.ones((), dtype=torch.float64, requires_grad=True)
    scores = score_tokens(
        Head(case.weight),
        case.hidden,
        case.targets,
        comparisons=[lambda logq, part: trained * logq[:, 0]],
        chunk_tokens=2,
    )
    scores.losses_N[0].sum().backward()
    close(trained.grad, (case.hidden @ case.weight.T).log_softmax(-1)[:, 0].sum())
    with torch.no_grad():
        without = score_tokens(
            Head(case.weight), case.hidden, case.targets, comparisons=[lambda q, part: trained * q[:, 0]]
        )
    assert not without.losses_N[0].requires_grad


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_comparisons_that_couple_neighbours_are_whole_wherever_chunks_may_begin(size: int):
    case, starts = Case(13), [0, 2, 3, 7, 8, 12]

    def coupled(logq: Tensor, part: slice) -> Tensor:
        inside = [start - part.start for start in starts if part.start <= start < part.stop]
        assert inside[0] == 0
        blocks = torch.tensor_split(logq, inside[1:])
        return torch.cat([block.exp() @ block.mean(0) for block in blocks])

    def chunked(hidden: Tensor, weight: Tensor, bias: None) -> list[Tensor]:
        scores = score_tokens(
            Head(weight), hidden, case.targets, entropy=True, comparisons=[coupled], chunk_tokens=size, starts=starts
        )
        assert scores.entropy_N is not None
        return [scores.logp_N, scores.entropy_N, *scores.losses_N]

    def naive(hidden: Tensor, weight: Tensor, bias: None) -> list[Tensor]:
        logq = (hidden @ weight.T).log_softmax(-1)
        return [logq[range(13), case.targets], entropy_of(logq), coupled(logq, slice(0, 13))]

    same(case.with_gradients(chunked), case.with_gradients(naive))


@pytest.mark.parametrize("size", [2, None])
def test_a_graph_can_be_kept_and_a_second_derivative_or_a_changed_weight_is_refused(size: int | None):
    case = Case(5)
    weight = case.weight.clone().requires_grad_()
    scores = score_tokens(
        Head(weight), case.hidden, case.targets, comparisons=[lambda q, part: q.square().sum(-1)], chunk_tokens=size
    )
    total = (scores.logp_N + scores.losses_N[0]).sum()
    (first,) = torch.autograd.grad(total, weight, retain_graph=True)
    (again,) = torch.autograd.grad(total, weight, retain_graph=True)
    close(first, again, 1e-12)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(total, weight, create_graph=True)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_tied_weights_have_both_gradients():
    case = Case(6, vocabulary=8)
    ids = torch.arange(6)

    def gradient(way: Any) -> Tensor:
        weight = case.weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(ids, weight)
        (torch.stack(way(hidden, weight, None)) * case.pull).sum().backward()
        assert weight.grad is not None
        return weight.grad

    close(gradient(case.chunked), gradient(case.naive))


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


def distilled(chunked: bool) -> None:
    """Reverse KL over the whole vocabulary, forward and backward."""
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
            chunk_tokens=FIXED_CHUNK,
        )
        loss = scores.losses_N[0].mean()
    else:
        logq = (hidden @ weight.T).log_softmax(-1)
        logp = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
        loss = (logq.exp() * (logq - logp)).sum(-1).mean()
    loss.backward()


def test_peak_memory_of_distillation_is_a_twentieth_of_full_logits(monkeypatch: pytest.MonkeyPatch):
    peaks = {}
    # The share of a chunk that is worked on at a time, as it is at full size.
    monkeypatch.setattr(logspace, "_CACHED", FIXED_CHUNK * FIXED_VOCABULARY // 16)
    for chunked in (True, False):
        # The weight's gradient, and with it a head of that size, is on both sides.
        with Allocations(beside={FIXED_VOCABULARY * 16 * 4}) as seen:
            distilled(chunked)
        peaks[chunked] = seen.peak
    logits = 4 * FIXED_TOKENS * FIXED_VOCABULARY
    assert peaks[False] >= 5 * logits
    assert peaks[True] <= 5 * logits / 20


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
