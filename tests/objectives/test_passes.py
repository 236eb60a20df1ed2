"""The chunked head as one differentiable pass: what it compares, and whose gradients it makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl.objectives import head as head_module
from kdrl.objectives.distill import distribution_loss as term_loss
from kdrl.objectives.head import Head, entropy_of, score_tokens
from kdrl.objectives.scores import Tokens
from kdrl.objectives.terms import DistillConfig

from .head_case import Case, same
from .reference import close

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


@pytest.mark.parametrize(("few", "chunk", "runs"), [(140, None, 2), (139, None, 3), (140, 1, 39), (0, 20, 1)])
def test_few_logits_or_the_last_chunk_are_kept_for_the_backward_pass(
    few: int, chunk: int | None, runs: int, monkeypatch: pytest.MonkeyPatch
):
    """Two chunks, or twenty of one token: all but what is kept are compared twice, once in each direction."""
    case, calls = Case(20), 0
    weight = case.weight.clone().requires_grad_()

    def counted(logq_MV: Tensor, part: slice) -> Tensor:
        nonlocal calls
        calls += 1
        return logq_MV.square().sum(-1)

    def loss(chunk: int | None) -> Tensor:
        scores = score_tokens(Head(weight), case.hidden, case.targets, comparisons=[counted], chunk_tokens=chunk)
        return scores.losses_N[0].sum()

    monkeypatch.setattr(head_module, "KEPT_ELEMENTS", few)
    kept = loss(chunk)
    (found,) = torch.autograd.grad(kept, weight, retain_graph=True)
    assert calls == runs
    (again,) = torch.autograd.grad(kept, weight)
    close(again, found, 1e-12)
    plain_NV = (case.hidden @ weight.T).log_softmax(-1).square().sum()
    close(found, torch.autograd.grad(plain_NV, weight)[0], 1e-12)


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
