"""What a teacher is asked for and what it gives back, tokens of a step's rollouts at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from kdrl.batch import Rollouts
from kdrl.objectives.base import Needs
from kdrl.objectives.head import Comparison, Head
from kdrl.objectives.schedules import START, Moment
from kdrl.objectives.scores import Tokens
from kdrl.objectives.support import Few

# `token`: log-probs of the sampled tokens; `few`: some outcomes too; `distribution`: hidden states and head too, never
# N x V logits.
Need = Literal["token", "few", "distribution"]


@dataclass(frozen=True)
class Gives:
    """What a teacher can give beside log-probs of the sampled tokens."""

    distribution: bool = True
    topk: int = 0
    draws: int = 0

    def serves(self, needs: Needs) -> bool:
        """Whether a term that needs this can be trained with it."""
        if needs.teacher != "distribution" or self.distribution:
            return True
        return needs.few is not None and {"topk": self.topk, "draws": self.draws}[needs.few] >= needs.few_count

    def __str__(self) -> str:
        parts = ["log-probs of the sampled tokens"]
        parts += [f"its {self.topk} likeliest tokens"] if self.topk else []
        parts += [f"{self.draws} draws"] if self.draws else []
        parts += ["its whole distribution"] if self.distribution else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Given:
    """What a comparison may know of a step's N tokens beside the distributions."""

    tokens_N: Tensor
    data: Mapping[str, Tensor]
    reference: Evidence | None = None
    uniform_NK: Tensor | None = None
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    moment: Moment = START


@dataclass(frozen=True)
class Evidence:
    """A teacher's scores of some of a step's N response tokens.

    `logp_N` is the sampled token's log-prob (0 where not scored), `where_N` the row of each token in `hidden_MD` or
    `few`, or -1.
    """

    logp_N: Tensor
    where_N: Tensor
    calls: int
    hidden_MD: Tensor | None = None
    head: Head | None = None
    temperature: float = 1.0
    few: Few | None = None

    @property
    def scored_N(self) -> Tensor:
        """Tokens that the teacher scored, bool `[N]`."""
        return self.where_N >= 0

    @property
    def fan(self) -> int:
        """Teachers that each response was put to."""
        return 1

    @property
    def columns(self) -> Mapping[str, Tensor]:
        """More that a term may know of each token, `[N]` by name."""
        return {}

    def shares(self) -> dict[str, float]:
        """The share of the scored tokens of each teacher that they are divided among."""
        return {}

    def parts(self, name: str) -> Mapping[str, Evidence]:
        """The scores by teacher: itself under `name`, or those it is made of."""
        return {name: self}

    @torch.no_grad()
    def logp(self, index_C: Tensor, like: Tensor) -> Tensor:
        """Log-probs `[C, V]` of scored tokens, of the type and on the device of `like`."""
        if self.hidden_MD is None or self.head is None:
            raise TypeError("this evidence holds no distribution")
        hidden_CD = self.hidden_MD[self.where_N[index_C]]
        return self.head.logp(hidden_CD.to(like.device), self.temperature).to(like.dtype)

    def comparison(
        self, compare: Callable[[Tokens, Tensor], Tensor], index_M: Tensor, given: Given, width: int = 3
    ) -> Comparison:
        """A function for the chunked head: `compare` at tokens `index_M`, `[C, width]`, 0 where not scored."""
        where_M = self.where_N[index_M]

        def within(logq_CV: Tensor, part: slice) -> Tensor:
            have_C = where_M[part] >= 0
            if bool(have_C.all()):  # no copy of a chunk that is scored whole
                return compare(self._tokens(index_M[part], logq_CV.detach(), given), logq_CV)
            index_C, logq_KV = index_M[part][have_C], logq_CV[have_C]
            out_C = logq_CV.new_zeros(len(logq_CV), width)
            found_K = compare(self._tokens(index_C, logq_KV.detach(), given), logq_KV)
            return out_C.index_put((have_C.nonzero().squeeze(1),), found_K)

        return within

    def _tokens(self, index_C: Tensor, logq_CV: Tensor, given: Given) -> Tokens:
        few = None if self.few is None else self.few.at(self.where_N[index_C])
        logp_CV = self.logp(index_C, logq_CV) if few is None else None
        token_C = given.tokens_N[index_C]
        logq_C = logq_CV.gather(-1, token_C[:, None]).squeeze(-1)
        # From the distribution where there is one, so that both sides are rounded alike.
        stored_C = self.logp_N[index_C].to(logq_C.dtype)
        logp_C = self._of_written(logp_CV, token_C, stored_C)
        reference = given.reference
        known = reference is not None and reference.hidden_MD is not None
        return Tokens(
            data={name: values_N[index_C] for name, values_N in given.data.items()},
            logq_C=logq_C,
            logp_C=logp_C,
            token_C=token_C,
            logp_CV=logp_CV,
            logq_CV=logq_CV,
            reference_CV=reference.logp(index_C, logq_CV) if known and reference is not None else None,
            few=few,
            uniform_CK=None if given.uniform_NK is None else given.uniform_NK[index_C],
            temperature=self.temperature,
            measured={key: values_N[index_C] for key, values_N in given.measured.items()},
            moment=given.moment,
        )

    def _of_written(self, logp_CV: Tensor | None, token_C: Tensor, stored_C: Tensor) -> Tensor:
        """Log-probs of the written tokens, from the distribution where there is one."""
        return stored_C if logp_CV is None else logp_CV.gather(-1, token_C[:, None]).squeeze(-1)


class Teacher(Protocol):
    """Scores response tokens; never trained."""

    @property
    def gives(self) -> Gives:
        """What it can be asked for."""
        ...

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Score the tokens that `keep_N` marks, and only responses that have one."""
        ...
