"""MultiLevelOT against the released computation in a few lines, whatever the split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import assert_near, gradient, plain_gradient
from torch import Tensor

from kdrl.models import LoadedModel
from kdrl.objectives import head
from kdrl.vocab.multilevel import MultilevelConfig, multilevel

from .pairs import model_of, scored, teacher_of, written
from .test_terms import chunks_of, loss_of


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return model_of("byte-level", 1, trainable=True)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return model_of("characters", 2)


def released(logits_p: Tensor, logits_q: Tensor, top: int, cross: float = 0.1, transport: float = 1e-4) -> Tensor:
    """The loss of one response: a mean over its positions, and the sum of the transport."""
    sides = []
    for logits in (logits_p, logits_q):
        p = torch.softmax(logits / (logits.std(dim=-1, keepdim=True) + 0.0001), dim=-1)
        p = p[:, torch.argsort(p.sum(0), descending=True)[:top]]
        sides.append(torch.cat([p, p.new_zeros(len(p), top - p.shape[1])], 1) if p.shape[1] < top else p)
    p, q = sides
    level = (q - p).abs().sum(-1).mean()
    level = level - cross * (torch.softmax(q, -1) * torch.log_softmax(p, -1)).sum(-1).mean()
    x, y = torch.softmax(p / 2, -1), torch.softmax(q / 2, -1)
    cost = torch.cdist(x, y, p=1)
    plan = torch.exp(-cost / 0.1)
    for _ in range(10):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return level + transport * (plan * cost).sum()


@pytest.mark.parametrize("transport", [1e-4, 3.0])
@pytest.mark.parametrize("top", [5, 50])
def test_against_the_released_computation(top: int, transport: float, student: LoadedModel, teacher: LoadedModel):
    losses = []
    for i, r in enumerate(responses := written(student)):
        chunks = chunks_of(student, teacher, [r])
        p, q = torch.stack([c.all_theirs for c in chunks]), torch.stack([c.all_mine for c in chunks])
        losses.append(released(p + i, q - 2 * i, top, transport=transport))  # logits are known up to a constant
    entry = {"multilevel_distill": {"top": top, "transport": transport, "reduce": "sequence_mean"}}
    found = scored(student, teacher_of(student, teacher), responses, [entry])
    want = torch.stack(losses).mean()
    assert loss_of(student, found) == pytest.approx(float(want.detach()), rel=1e-5)
    assert_near(gradient(student, found), plain_gradient(student, lambda: want))


def test_gradient_by_finite_differences():
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(4, 7, generator=draw, dtype=torch.float64).log_softmax(-1)
    z = torch.randn(4, 9, generator=draw, dtype=torch.float64, requires_grad=True)
    config = MultilevelConfig(top=8, transport=0.3)
    assert torch.autograd.gradcheck(lambda z: multilevel(p, z.log_softmax(-1), config), (z,))


def test_a_common_order_keeps_what_sorting_each_token_forgets(student: LoadedModel):
    """Blind to a permutation of the vocabulary, not to one that differs from token to token."""
    draw = torch.Generator().manual_seed(1)
    logq = (2 * torch.randn(5, 9, generator=draw, dtype=torch.float64)).log_softmax(-1)
    config = MultilevelConfig(cross=0.0, transport=0.0)
    order = torch.randperm(9, generator=draw)
    assert float(multilevel(logq[:, order], logq, config).max()) < 1e-12
    each = torch.stack([row[torch.randperm(9, generator=draw)] for row in logq])
    assert float(multilevel(each, logq, config).min()) > 0.01


@pytest.mark.parametrize("block", [3, 64])
def test_splitting_padding_and_head_chunks_leave_the_gradient(
    block: int, student: LoadedModel, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    given: dict[str, Any] = {"block": block, "transport": 0.5, "mask": {"top_entropy": 0.7}, "scale": "label_p"}
    found = scored(student, teacher_of(student, teacher), written(student), [{"multilevel_distill": given}])
    whole = gradient(student, found)
    assert_near(gradient(student, found, budget=1), whole)
    assert_near(gradient(student, found, budget=70), whole)
    cut = head.chunks
    monkeypatch.setattr(head, "chunks", lambda tokens, vocab, size, starts: cut(tokens, vocab, 3, starts))
    assert_near(gradient(student, found, budget=70), whole)
