"""How likely teacher and student find the same chunk of text (ALM, 2503.20083): two outcomes, so log-probs will do.

A token's probability says also that it is not a part of a longer one, which differs between tokenizers. Debiasing adds
to both sides the probability that a new word begins after the chunk; a threshold joins chunks until it is likely. Both
as in tokenkit. Left out: its hidden-state term and its balancing of gradient magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdrl.objectives.base import TERMS, Needs, TokenView
from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.logspace import finite
from kdrl.objectives.scores import Tokens
from kdrl.objectives.specs import Divergence
from kdrl.vocab.terms import OverlapConfig, VocabTerm, VocabTokens

# A chunk that is certain leaves its complement no probability; nearer than this the complement is taken as this.
LEAST = 1.0e-12


class ChunkDistillConfig(OverlapConfig):
    """A divergence between how likely teacher and student find each chunk of text."""

    divergence: Divergence = Divergence(kind="forward_kl")
    """Of the two outcomes `this chunk` and `anything else`: forward_kl, reverse_kl, tv, {jsd: b} and the others."""
    tau: float | Literal["inf"] = 100.0
    """Log-likelihoods are divided by it first; inf is the limit of tau times the loss, A log(A/B) - A + B of the
    surprisals A and B (forward_kl alone). The gradient falls as 1/tau, but for inf."""
    debias: bool = False
    """Multiply both sides by the probability that the next token begins with a space, tab or newline or is special, as
    the end of the chunk (ALM's outcome debiasing); needs the teacher's distribution."""
    threshold: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Join a chunk with the next one unless the teacher gives that probability more than this (ALM: 1e-4, or 0.1 for
    models of two families); needs its distribution. null: the smallest chunks."""

    @model_validator(mode="after")
    def _check_tau(self) -> ChunkDistillConfig:
        if self.divergence.kind in ("pair", "preference"):
            raise ValueError(f"{self.divergence.kind} compares tokens of one vocabulary, and a chunk is one outcome")
        if self.tau != "inf" and self.tau <= 0.0:
            raise ValueError("tau divides log-likelihoods and must be above 0 (1 for plain probabilities, 100 in ALM)")
        if self.tau == "inf" and self.divergence.kind != "forward_kl":
            raise ValueError("tau: inf is the limit of forward_kl; give a number for another divergence")
        return self

    @property
    def looks_ahead(self) -> bool:
        """Whether the loss reads what comes after a chunk."""
        return self.debias or self.threshold is not None


def with_complement(log_chance: Tensor) -> Tensor:
    """Log-probs `[..., 2]` of an event and of its not happening."""
    log_chance = log_chance.clamp(max=-LEAST)
    return torch.stack([log_chance, torch.log(-torch.expm1(log_chance))], -1)


@dataclass(frozen=True)
class Joined:
    """Chunks joined to outcomes: the outcome of each token, whether it opens one, and whether the token before it ends
    the one before (in the same run of chunks)."""

    outcome_N: Tensor
    opens_N: Tensor
    closes_N: Tensor

    def sums(self, values_N: Tensor, ahead_N: Tensor | None) -> Tensor:
        """The sum over its outcome at each token, with `ahead` of the token after the outcome, `[N]` in float64."""
        wide_N = values_N.double()
        total = wide_N.new_zeros(len(values_N) + 1).index_add(0, self.outcome_N, wide_N)
        if ahead_N is not None and len(values_N):
            before_N = self.outcome_N.roll(1)
            total = total.index_add(0, before_N, torch.where(self.closes_N, ahead_N.double(), 0.0))
        return total[self.outcome_N]


def join(view: TokenView, threshold: float | None) -> Joined:
    """The outcomes of a view whose rows hold all tokens of their chunks."""
    first_N, inside_N, place_N = view.data["chunk_first"], view.data["chunk_size"] > 0, view.data["index"]
    follows_N = torch.zeros_like(inside_N)
    follows_N[1:] = inside_N[:-1] & (view.row_N[1:] == view.row_N[:-1]) & (place_N[1:] == place_N[:-1] + 1)
    closes_N = first_N & follows_N
    if threshold is not None:
        closes_N &= view.data["chunk_space"] > math.log(threshold)
    # A token outside all chunks is an outcome of its own, which nobody reads.
    opens_N = (first_N & (closes_N | ~follows_N)) | ~inside_N
    return Joined(opens_N.long().cumsum(0), opens_N & first_N, closes_N)


@TERMS.add("chunk_distill")
class ChunkDistill(VocabTerm[ChunkDistillConfig]):
    """Approximate likelihood matching (ALM, 2503.20083): how likely is this chunk of text to both?

    The loss stands at a chunk's first token, so that every chunk counts once (joined ones as often as before, in
    `reduce`). For chunks of one token at tau 1 it is DKD's target part for the written token.
    """

    name, Config = "chunk_distill", ChunkDistillConfig

    @property
    def needs(self) -> Needs:
        """Teacher log-probs of what was written, or its distributions to look ahead."""
        return Needs(teacher="distribution" if self.config.looks_ahead else "token", vocabulary=True)

    @property
    def compared(self) -> bool:
        """What `compare` gives is no loss."""
        return False

    @property
    def spaces(self) -> bool:  # type: ignore[override]
        """Whether the end of a chunk is looked at."""
        return self.config.looks_ahead

    def usable_N(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The first token of each chunk."""
        return columns["chunk_first"]

    def compare(self, tokens: Tokens, logq_CV: Tensor) -> Tensor:
        """The student's log-prob that a word begins at each token, in place of a loss, and no masses, `[C, 3]`."""
        assert isinstance(tokens, VocabTokens)
        assert tokens.spaces_K is not None
        begins_C = logq_CV[:, tokens.spaces_K].logsumexp(-1).clamp(max=0.0)
        return torch.stack([begins_C, torch.ones_like(begins_C), torch.ones_like(begins_C)], -1)

    def loss(self, view: TokenView) -> Tensor:
        """The divergence of the two-outcome distributions, at a chunk's first token."""
        assert view.teacher_N is not None
        joined = join(view, self.config.threshold)
        ahead: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.config.debias:
            ahead = (view.data["chunk_space"], view.divergence_N)
        p_N, q_N = (joined.sums(finite(x), s) for x, s in zip((view.teacher_N, view.logq_N), ahead, strict=True))
        if self.config.tau == "inf":
            a_N, b_N = (-x.clamp(max=-LEAST) for x in (p_N, q_N))
            loss_N = a_N * (a_N / b_N).log() - a_N + b_N
        else:
            two_p, two_q = (with_complement(x / self.config.tau) for x in (p_N, q_N))
            loss_N = divergence_of(self.config.divergence, two_p, two_q, view.moment)
        return torch.where(joined.opens_N, loss_N, 0.0).to(view.logq_N.dtype)
