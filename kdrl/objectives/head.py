"""The chunked LM head: the only place where logits exist, and never more than one chunk of tokens of them.

Every chunk is recomputed in the backward pass, so that N x V logits are held neither forward nor backward.
Left out here: a fused kernel, and vocabulary chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdrl.objectives.logspace import entropy as entropy_of

# Elements of one chunk of logits: 16 MiB in float32.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Head:
    """A model's output projection: logits = softcap(scale (hidden W^T + b)), the first `rows` vocabulary rows."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None

    @property
    def vocab_size(self) -> int:
        """Rows that are real tokens; padded rows beyond them have no probability."""
        return self.weight_VD.shape[0] if self.rows is None else min(self.rows, self.weight_VD.shape[0])

    def logp(self, hidden_ND: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities `[N, V]` at a temperature; float32 or better from low-precision hidden states."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            wide = torch.promote_types(torch.promote_types(hidden_ND.dtype, self.weight_VD.dtype), torch.float32)
            logits_NV = hidden_ND.to(wide) @ self.weight_VD[: self.vocab_size].to(wide).T
            if self.bias_V is not None:
                logits_NV = logits_NV + self.bias_V[: self.vocab_size].to(wide)
            if self.scale != 1.0:
                logits_NV = logits_NV * self.scale
            if self.softcap is not None:
                logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
            return torch.log_softmax(logits_NV / temperature, dim=-1)


# fn(logq_MV, token slice) -> numbers [M, ...]: one comparison of the student's distribution with a teacher's evidence.
Comparison = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class TokenScores:
    """What one pass over the head gives for N tokens."""

    logp_N: Tensor
    entropy_N: Tensor | None
    losses_N: tuple[Tensor, ...]


def chunks(
    tokens: int, vocab_size: int, chunk_tokens: int | None = None, starts: Sequence[int] | None = None
) -> list[slice]:
    """Consecutive slices of at most `chunk_tokens` tokens (default: near 16 MiB, and never all tokens at once).

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

    `starts` are the only places where a chunk may begin, for comparisons that couple neighbouring tokens.
    Raises IndexError when a target is outside the head's vocabulary.
    """
    if len(targets_N):
        low, high = (int(x) for x in targets_N.aminmax())
        if low < 0 or high >= head.vocab_size:
            raise IndexError(f"tokens {low} to {high} are not all inside the vocabulary of {head.vocab_size}")
    # Widened once: the head's gradient then adds up over chunks in float32 and is rounded a single time.
    wide = torch.promote_types(torch.promote_types(hidden_ND.dtype, head.weight_VD.dtype), torch.float32)
    weight_VD = head.weight_VD[: head.vocab_size].to(wide)

    def one(hidden_MD: Tensor, weight_VD: Tensor, part: slice) -> tuple[Tensor, ...]:
        logp_MV = replace(head, weight_VD=weight_VD).logp(hidden_MD, temperature)
        out = [logp_MV.gather(-1, targets_N[part, None]).squeeze(-1)]
        if entropy:
            out.append(entropy_of(logp_MV))
        return (*out, *(compare(logp_MV, part) for compare in comparisons))

    pieces: list[tuple[Tensor, ...]] = []
    for part in chunks(len(targets_N), head.vocab_size, chunk_tokens, starts):
        if torch.is_grad_enabled():
            piece = checkpoint(one, hidden_ND[part], weight_VD, part, use_reentrant=False, preserve_rng_state=False)
        else:
            piece = one(hidden_ND[part], weight_VD, part)
        pieces.append(piece)
    if not pieces:
        empty = (hidden_ND.sum() * 0.0).expand(0)
        return TokenScores(empty, empty if entropy else None, tuple(empty for _ in comparisons))
    columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
    return TokenScores(columns[0], columns[1] if entropy else None, tuple(columns[1 + entropy :]))
