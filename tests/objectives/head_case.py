"""Inputs of the chunked head in float64, and what a naive pass over full logits gives for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.head import Head, LowRank, score_tokens
from kdrl.objectives.specs import Divergence

from .reference import close


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
    ranks: tuple[int, ...] = ()
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
        shapes = [shape for rank in self.ranks for shape in ((rank, self.width), (rows, rank))]
        self.factors = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]

    def head(self, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Head:
        adapters = tuple(LowRank(a, b, 0.5) for a, b in zip(factors[::2], factors[1::2], strict=True))
        return Head(weight, bias, self.scale, self.softcap, self.vocabulary if self.padded else None, adapters)

    def naive(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> list[Tensor]:
        for a, b in zip(factors[::2], factors[1::2], strict=True):
            weight = weight + 0.5 * b @ a
        logits = torch.einsum("nd,vd->nv", hidden, weight)
        logits = self.scale * (logits if bias is None else logits + bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        prob = torch.softmax(logits[:, : self.vocabulary] / self.temperature, -1)
        entropy = -(prob * prob.log()).sum(-1)
        kl = (self.teacher.exp() * (self.teacher - prob.log())).sum(-1)
        return [prob[range(self.tokens), self.targets].log(), entropy, kl]

    def chunked(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor, size: int | None = None
    ) -> list[Tensor]:
        scores = score_tokens(
            self.head(weight, bias, *factors),
            hidden,
            self.targets,
            temperature=self.temperature,
            entropy=True,
            comparisons=[lambda logq, part: divergence_of(Divergence(kind="forward_kl"), self.teacher[part], logq)],
            chunk_tokens=size,
        )
        assert scores.entropy_N is not None
        return [scores.logp_N, scores.entropy_N, *scores.losses_N]

    def with_gradients(self, way: Any, **settings: Any) -> list[Tensor]:
        given = [self.hidden, self.weight, self.bias_V, *self.factors]
        inputs = [None if x is None else x.clone().requires_grad_() for x in given]
        leaves = [x for x in inputs if x is not None]
        values = way(*inputs, **settings)
        (self.pull * torch.stack(values)).sum().backward()
        return [*(v.detach() for v in values), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-10)
