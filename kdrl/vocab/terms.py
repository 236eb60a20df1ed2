"""Distillation from a teacher with another tokenizer: by chunks of text, by the tokens that both have, or by rank.

A chunk's R = log p(chunk) - log q(chunk) needs log-probs of the written tokens alone; the others need distributions,
which stand for each other only where both models have read the same text: at the first token of a chunk. The likelihood
of chunks (ALM) is in `likelihood`, MultiLevelOT in `multilevel`, DSKD in `dual`. Left out: NeMo-RL's projection matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdrl.batch import Origin
from kdrl.objectives.base import TERMS, Needs, Term, TermConfig, TokenView
from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.estimators import importance_ratio, token_loss
from kdrl.objectives.logspace import finite
from kdrl.objectives.scores import Tokens, column
from kdrl.objectives.specs import Divergence
from kdrl.objectives.support_specs import Estimator, Support


@dataclass(frozen=True)
class VocabTokens(Tokens):
    """What a comparison sees of tokens whose teacher has another vocabulary, `logp_CV` over that.

    `shared_2K` are ids of student and teacher that stand for the same text, `spaces_K` the student's that begin a word.
    """

    shared_2K: Tensor | None = None
    spaces_K: Tensor | None = None


class VocabConfig(TermConfig):
    """What every term has that reads a teacher of another tokenizer."""

    teacher: str = "teacher"
    """`teacher`, or one of `teachers` by name: a model, not a combination of several."""
    skip_eos: bool = False
    """Leave the final end-of-sequence token out; the two end tokens are otherwise taken as one."""
    on: tuple[Origin, ...] = ("student", "gold", "teacher", "buffer", "speculative", "mixed", "corrupt")
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""

    @model_validator(mode="after")
    def _check_scale(self) -> VocabConfig:
        if self.scale.reads & {"distributions", "entries"}:
            raise ValueError(
                f"scale {self.scale.spec} compares the two distributions entry by entry, and with another tokenizer "
                "they are over different tokens; use a score of tokens, such as log_ratio, or of data"
            )
        return self


class OverlapConfig(VocabConfig):
    """A divergence over the tokens that both vocabularies have."""

    divergence: Divergence = Divergence()
    """forward_kl, reverse_kl, tv, {jsd: b} and the others of `distill`, without gates."""

    @model_validator(mode="after")
    def _check(self) -> OverlapConfig:
        if self.divergence.kind == "rank" or any(gate.constant is None for gate in self.divergence.gates):
            raise ValueError("over the shared tokens a divergence has no ranks and no gates; use `scale` or a mask")
        return self


ConfigT = TypeVar("ConfigT", bound=VocabConfig)


class VocabTerm(Term[ConfigT], Generic[ConfigT]):
    """A term that reads a teacher through chunks; `view.data` and `tokens.data` hold their columns."""

    family = "kd"
    joined = False
    """Whether the tokens of a chunk must be compared together."""
    spaces = False
    """Whether the term asks how likely a new word begins at each chunk."""

    def usable_N(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Tokens of chunks that the term's loss stands at, bool `[N]`."""
        return columns["chunk_size"] > 0

    def keep(self, last_N: Tensor) -> Tensor | None:
        """All but the final token of a finished response under skip_eos."""
        return ~last_N if self.config.skip_eos else None

    @property
    def whole_rows(self) -> bool:
        """A chunk's probability is that of all its tokens, kept by the mask or not."""
        return True

    def scaled(self, tokens: Tokens, loss_C: Tensor) -> Tensor:
        """The loss as the chunked head wants it, `[C, 3]`, with the scale and no masses to report."""
        one_C = torch.ones_like(loss_C)
        return torch.stack([column(self.config.scale(tokens), loss_C) * loss_C, one_C, one_C], -1)


def chunk_sums(values_N: Tensor, chunk_N: Tensor) -> Tensor:
    """The sum over its chunk at each token, `[N]`, in float64."""
    _, place_N = chunk_N.unique(return_inverse=True)
    wide_N = values_N.double()
    return wide_N.new_zeros(len(values_N)).index_add(0, place_N, wide_N)[place_N]


class ChunkKLConfig(VocabConfig):
    """The reverse KL to the teacher, estimated from the student's own chunks of text."""

    estimator: Estimator = "k2"
    """k1 (advantage), k2 (loss) or k3 (straight-through): one gradient, three values."""
    share: Literal["chunk", "token"] = "chunk"
    """`chunk`: each token of a chunk gets the chunk's R, the policy gradient of the KL over chunks; `token`: R divided
    by the chunk's student tokens, which keeps long chunks from weighing more."""
    clamp: float | None = Field(default=10.0, gt=0.0)
    """Bound on R inside the gradient; null for none."""
    on: tuple[Origin, ...] = ("student",)
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""


@TERMS.add("chunk_kl")
class ChunkKL(VocabTerm[ChunkKLConfig]):
    """KDRL's token signal from a teacher with another tokenizer: each token carries its chunk's log-ratio.

    With the student's own tokenizer this is `distill` with support {token: ...}.
    """

    name, Config = "chunk_kl", ChunkKLConfig

    @property
    def needs(self) -> Needs:
        """Teacher log-probs of what was written."""
        return Needs(teacher="token", vocabulary=True)

    def loss(self, view: TokenView) -> Tensor:
        """The estimate from the chunk's R, times the chunk's importance ratio on stale samples."""
        assert view.teacher_N is not None
        chunk_N, logq_N = view.data["chunk"], finite(view.logq_N.detach())
        ratio_N = chunk_sums(finite(view.teacher_N) - logq_N, chunk_N)
        if self.config.share == "token":
            ratio_N = ratio_N / view.data["chunk_size"].clamp(min=1)
        rho_N = importance_ratio(view.logq_N, view.old_N)
        if rho_N is not None:
            rho_N = chunk_sums(rho_N.log(), chunk_N).exp().to(logq_N.dtype)
        support = Support.model_validate({"token": self.config.estimator})
        return token_loss(support, view.logq_N, logq_N + ratio_N.to(logq_N.dtype), self.config.clamp, rho_N)


class Distributions(VocabTerm[ConfigT], Generic[ConfigT]):
    """A term that reads the teacher's distribution over its own vocabulary."""

    @property
    def needs(self) -> Needs:
        """The teacher's distributions."""
        return Needs(teacher="distribution", vocabulary=True)

    def usable_N(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The first token of each chunk, where both have read the same text."""
        return columns["chunk_first"]

    def loss(self, view: TokenView) -> Tensor:
        """What `compare` found."""
        assert view.divergence_N is not None
        return view.divergence_N


def sides_of(tokens: Tokens, logq_CV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Teacher and student log-probs over their vocabularies, and the ids `[K]` of the student's and the teacher's
    tokens that stand for the same text."""
    assert isinstance(tokens, VocabTokens)
    assert tokens.logp_CV is not None
    assert tokens.shared_2K is not None
    return tokens.logp_CV, logq_CV, tokens.shared_2K[0], tokens.shared_2K[1]


@TERMS.add("overlap_distill")
class OverlapDistill(Distributions[OverlapConfig]):
    """A divergence over the tokens that both have, renormalised, where both wrote one token (KDFlow's simple CTKD).

    Student mass on tokens that the teacher lacks has no gradient; the row's support/student_mass says how much is left.
    """

    name, Config = "overlap_distill", OverlapConfig

    def usable_N(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Tokens that both tokenizations have."""
        return columns["chunk_single"]

    def compare(self, tokens: Tokens, logq_CV: Tensor) -> Tensor:
        """Divergence and both masses on the shared tokens, `[C, 3]`."""
        logp_CV, logq_CV, mine_K, theirs_K = sides_of(tokens, logq_CV)
        logp_CK, logq_CK = finite(logp_CV[:, theirs_K]), finite(logq_CV[:, mine_K])
        masses = [x.detach().exp().sum(-1) for x in (logp_CK, logq_CK)]
        loss_C = divergence_of(self.config.divergence, logp_CK.log_softmax(-1), logq_CK.log_softmax(-1), tokens.moment)
        return torch.stack([column(self.config.scale(tokens), loss_C) * loss_C, *masses], -1)


def sorted_difference(p_CV: Tensor, q_CU: Tensor, top: int | None = None) -> Tensor:
    """Sum of |p - q| of the two sorted and zero-padded (ULD, 2402.12030), of the `top` largest entries, `[C]`."""
    width = max(p_CV.shape[-1], q_CU.shape[-1])
    sides = []
    for x in (p_CV, q_CU):
        found = x.sort(-1, descending=True).values if top is None else x.topk(min(top, x.shape[-1]), -1).values
        want = width if top is None else min(top, width)
        sides.append(torch.nn.functional.pad(found, (0, want - found.shape[-1])))
    return (sides[0] - sides[1]).abs().sum(-1)


def merged(tokens: Tokens, logp_CV: Tensor, logq_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Both distributions at a chunk's first token times the probability of how the chunk went on (GOLD, bayesian)."""
    assert tokens.token_C is not None
    logq_C = finite(logq_CV.gather(-1, tokens.token_C[:, None]).squeeze(-1))
    later_C = torch.where(tokens.data["chunk_first"], 0.0, logq_C)
    rest_C = chunk_sums(later_C, tokens.data["chunk"]).to(logq_CV.dtype)
    return logp_CV + tokens.data["chunk_rest"].to(logp_CV.dtype)[:, None], logq_CV + rest_C[:, None]


class SortedConfig(VocabConfig):
    """The difference of two probability profiles, whatever tokens they belong to."""

    top: int | None = Field(default=None, ge=1)
    """Only the largest so many of each; null for all."""
    merge: bool = False
    """Multiply both by the probability of the rest of a chunk (GOLD's extended ULD); false compares the first tokens
    as they are."""


@TERMS.add("sorted_distill")
class SortedDistill(Distributions[SortedConfig]):
    """Universal logit distillation: the L1 distance of the sorted probabilities (ULD, 2402.12030).

    Blind to which token is likely: a teacher with its tokens permuted gives the same loss. Compared at the first tokens
    of chunks, where the original goes by position and drifts.
    """

    name, Config = "sorted_distill", SortedConfig

    @property
    def joined(self) -> bool:  # type: ignore[override]
        """Whether a chunk's tokens are multiplied."""
        return self.config.merge

    def compare(self, tokens: Tokens, logq_CV: Tensor) -> Tensor:
        """The distance at the first tokens of chunks, `[C, 3]`."""
        logp_CV, logq_CV, _, _ = sides_of(tokens, logq_CV)
        if self.config.merge:
            logp_CV, logq_CV = merged(tokens, logp_CV, logq_CV)
        return self.scaled(tokens, sorted_difference(logp_CV.exp(), logq_CV.exp(), self.config.top))


class GroupConfig(VocabConfig):
    """Shared tokens by a divergence, all others by rank."""

    divergence: Divergence = Divergence(kind="jsd", beta=0.5, scale="paper")  # type: ignore[arg-type]
    """On the shared tokens, not renormalised: {jsd: {beta: b, scale: paper}} as in GOLD, or forward_kl, reverse_kl."""
    matched: float | None = Field(default=None, ge=0.0, le=1.0)
    """Weight of the shared tokens' part, the other's is what it leaves of 1; null: the share of the teacher's
    vocabulary that both have."""

    @model_validator(mode="after")
    def _check(self) -> GroupConfig:
        if self.divergence.kind not in ("jsd", "forward_kl", "reverse_kl"):
            raise ValueError(f"on unnormalised shared tokens GOLD takes jsd and its ends, not {self.divergence.kind}")
        return self


@TERMS.add("group_distill")
class GroupDistill(Distributions[GroupConfig]):
    """GOLD's hybrid (TRL): a divergence on shared tokens and the sorted L1 distance on the rest, chunks merged.

    Over part of the vocabulary p and q are no distributions, so the divergence can be below zero.
    """

    name, Config, joined = "group_distill", GroupConfig, True

    def compare(self, tokens: Tokens, logq_CV: Tensor) -> Tensor:
        """Both parts weighed, and the masses on the shared tokens at the chunk's first token, `[C, 3]`."""
        logp_CV, logq_CV, mine_K, theirs_K = sides_of(tokens, logq_CV)
        masses = [x.detach().exp().sum(-1) for x in (logp_CV[:, theirs_K], logq_CV[:, mine_K])]
        share = self.config.matched
        share = len(theirs_K) / logp_CV.shape[-1] if share is None else share
        logp_CV, logq_CV = merged(tokens, logp_CV, logq_CV)
        loss_C = share * divergence_of(self.config.divergence, logp_CV[:, theirs_K], logq_CV[:, mine_K], tokens.moment)
        rest_C = sorted_difference(without(logp_CV, theirs_K).exp(), without(logq_CV, mine_K).exp())
        loss_C = loss_C + (1.0 - share) * rest_C
        return torch.stack([column(self.config.scale(tokens), loss_C) * loss_C, *masses], -1)


def without(logp_CV: Tensor, ids_K: Tensor) -> Tensor:
    """The columns that `ids` leaves out."""
    kept_V = torch.ones(logp_CV.shape[-1], dtype=torch.bool, device=logp_CV.device)
    kept_V[ids_K] = False
    return logp_CV[:, kept_V]


def vocabulary_terms(terms: Any) -> list[VocabTerm[Any]]:
    """Those of an objective's terms that read a teacher through chunks."""
    return [term for term in terms if isinstance(term, VocabTerm)]
