"""The chunked LM head: the only place where logits exist, and never more than one chunk of tokens of them.

Every chunk but the last is recomputed in the backward pass, so that N x V logits are held neither forward nor backward,
unless they are very few; see `kdrl.objectives.passes`. Left out: vocabulary chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrl.objectives import products
from kdrl.objectives.kernels import log_softmax_
from kdrl.objectives.logspace import entropy as entropy_of
from kdrl.objectives.passes import Comparison, Pass, run

__all__ = ["CHUNK_ELEMENTS", "Comparison", "Head", "LowRank", "TokenScores", "chunks", "entropy_of", "score_tokens"]

# Elements of one chunk of logits: 32 MiB in float32, below what glibc takes from the system anew for every array. A GPU
# is not kept busy by so few tokens of a large vocabulary.
CHUNK_ELEMENTS = 1 << 23
CHUNK_ELEMENTS_ON_GPU = 1 << 25
# All chunks wait for the backward pass where they have no more elements than this: 4 MiB an array.
KEPT_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class LowRank:
    """An adapter of the head (LoRA, 2106.09685): scale (hidden A^T) B^T is added to hidden W^T."""

    a_RD: Tensor
    b_VR: Tensor
    scale: float


@dataclass(frozen=True)
class Head:
    """A model's output projection: logits = softcap(scale (hidden W^T + adapters + b)), the first `rows` tokens."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None
    adapters: tuple[LowRank, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Rows that are real tokens; padded rows beyond them have no probability."""
        return self.weight_VD.shape[0] if self.rows is None else min(self.rows, self.weight_VD.shape[0])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, in the order that `with_tensors` takes them."""
        factors = (factor for low in self.adapters for factor in (low.a_RD, low.b_VR))
        return (self.weight_VD, *([] if self.bias_V is None else [self.bias_V]), *factors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Head:
        """The same head of other tensors."""
        weight_VD, *rest = tensors
        bias_V = None if self.bias_V is None else rest.pop(0)
        pairs = zip(self.adapters, rest[::2], rest[1::2], strict=True)
        adapters = tuple(LowRank(a_RD, b_VR, low.scale) for low, a_RD, b_VR in pairs)
        return replace(self, weight_VD=weight_VD, bias_V=bias_V, adapters=adapters)

    def map(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The same head with every tensor changed: detached, copied, widened."""
        return self.with_tensors([change(tensor) for tensor in self.tensors])

    def packed(self, rows: int) -> Head:
        """The same head for products with about so many rows, a copy of its weights; without gradients."""
        cut = replace(self, rows=None, bias_V=None if self.bias_V is None else self.bias_V[: self.vocab_size])
        adapters = tuple(replace(low, b_VR=low.b_VR[: self.vocab_size]) for low in self.adapters)
        weight_VD = products.packed(self.weight_VD[: self.vocab_size], rows)
        return replace(cut, weight_VD=weight_VD, adapters=adapters)

    def merged(self) -> Head:
        """The same head without adapters, their product added to the weights and rounded to their format."""
        if not self.adapters:
            return self
        weight_VD = self.weight_VD
        wide = products.wide_of(weight_VD)
        for low in self.adapters:
            weight_VD = weight_VD.to(wide) + low.scale * (low.b_VR.to(wide) @ low.a_RD.to(wide))
        return replace(self, weight_VD=weight_VD.to(self.weight_VD.dtype), adapters=())

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits `[N, V]` before temperature; float32 or better from low-precision hidden states and weights."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            rows = self.vocab_size
            times = _tracked if torch.is_grad_enabled() else products.rows_by_columns
            whole = rows == len(self.weight_VD)  # packed weights cannot be cut
            logits_NV = times(hidden_ND, self.weight_VD if whole else self.weight_VD[:rows])
            for low in self.adapters:
                inner_NR = times(hidden_ND, low.a_RD) * low.scale
                logits_NV = logits_NV.to(inner_NR.dtype).addmm_(inner_NR, low.b_VR[:rows].to(inner_NR.dtype).T)
            if self.bias_V is not None:
                logits_NV += self.bias_V[:rows]
            if self.scale != 1.0:
                logits_NV *= self.scale
            if self.softcap is None:
                return logits_NV
            capped_NV = logits_NV.div_(self.softcap).tanh_()
            return capped_NV * self.softcap if capped_NV.requires_grad else capped_NV.mul_(self.softcap)

    def logp(self, hidden_ND: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities `[N, V]` at a temperature; float32 or better from low-precision hidden states."""
        logits_NV = self.logits(hidden_ND)
        if temperature != 1.0:
            logits_NV /= temperature
        return logits_NV.log_softmax(-1) if logits_NV.requires_grad else log_softmax_(logits_NV)


def _tracked(x_CD: Tensor, w_VD: Tensor) -> Tensor:
    """x w^T with autograd where it is wanted."""
    if not (x_CD.requires_grad or w_VD.requires_grad):
        return products.rows_by_columns(x_CD, w_VD)
    wide = products.wide_of(x_CD, w_VD)
    return x_CD.to(wide) @ w_VD.to(wide).T


@dataclass(frozen=True)
class TokenScores:
    """What one pass over the head gives for N tokens."""

    logp_N: Tensor
    entropy_N: Tensor | None
    losses_N: tuple[Tensor, ...]


def chunks(
    tokens: int, vocab_size: int, chunk_tokens: int | None = None, starts: Sequence[int] | None = None
) -> list[slice]:
    """Consecutive slices of at most `chunk_tokens` tokens (default: near 32 MiB, and never all tokens at once).

    With `starts`, sorted and with 0, a slice begins only there, and is longer where two of them lie further apart.
    """
    size = chunk_tokens or max(16, min(CHUNK_ELEMENTS // max(1, vocab_size), (tokens + 1) // 2))
    if starts is None:
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
    ends, begin = [], 0
    for start, after in zip(starts, [*starts[1:], tokens], strict=True):
        if after - begin > size and start > begin:
            ends.append(start)
            begin = start
    return [slice(a, b) for a, b in zip([0, *ends], [*ends, tokens], strict=True)] if tokens else []


def score_tokens(
    head: Head,
    hidden_ND: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    comparisons: Sequence[Comparison] = (),
    chunk_tokens: int | None = None,
    starts: Sequence[int] | None = None,
) -> TokenScores:
    """Log-prob of each target, entropy and divergences in one chunked pass; differentiable in hidden and head.

    Also in what comparisons read that is trained. `starts` are the only places where a chunk may begin, for comparisons
    that couple neighbouring tokens. Raises IndexError when a target is outside the head's vocabulary.
    """
    if len(targets_N):
        low, high = (int(x) for x in targets_N.aminmax())
        if low < 0 or high >= head.vocab_size:
            raise IndexError(f"tokens {low} to {high} are not all inside the vocabulary of {head.vocab_size}")
    if chunk_tokens is None and hidden_ND.is_cuda:
        chunk_tokens = max(16, CHUNK_ELEMENTS_ON_GPU // head.vocab_size)
    parts = chunks(len(targets_N), head.vocab_size, chunk_tokens, starts)
    if not parts:
        empty = (hidden_ND.sum() * 0.0).expand(0)
        return TokenScores(empty, empty if entropy else None, tuple(empty for _ in comparisons))
    few = chunk_tokens is None and len(targets_N) * head.vocab_size <= KEPT_ELEMENTS
    keep = len(parts) if few else 1
    work = Pass(head, targets_N, temperature, tuple(comparisons), parts, keep)
    logp_N, entropy_N, *losses_N = run(work, hidden_ND)
    return TokenScores(logp_N, entropy_N if entropy else None, tuple(losses_N))
