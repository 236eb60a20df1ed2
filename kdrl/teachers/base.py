"""What a teacher is asked for and what it gives back, tokens of a step's rollouts at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kdrl.batch import Rollouts
from kdrl.objectives.head import Comparison, Head
from kdrl.objectives.terms import Term

# `token`: log-probs of the sampled tokens; `distribution`: hidden states and head too, never N x V logits.
Need = Literal["token", "distribution"]


@dataclass(frozen=True)
class Evidence:
    """A teacher's scores of some of a step's N response tokens.

    `logp_N` is the sampled token's log-prob (0 where not scored), `where_N` the row of each token in `hidden_MD` or -1.
    """

    logp_N: Tensor
    where_N: Tensor
    calls: int
    hidden_MD: Tensor | None = None
    head: Head | None = None
    temperature: float = 1.0

    @property
    def scored_N(self) -> Tensor:
        """Tokens that the teacher scored, bool `[N]`."""
        return self.where_N >= 0

    def comparison(self, term: Term, index_M: Tensor) -> Comparison:
        """A function for the chunked head: the term's divergence at tokens `index_M`, 0 where not scored."""
        hidden_MD, head = self.hidden_MD, self.head
        if hidden_MD is None or head is None:
            raise TypeError("this evidence holds no distribution")
        where_M = self.where_N[index_M]

        def compare(logq_CV: Tensor, part: slice) -> Tensor:
            where_C = where_M[part]
            have_C = where_C >= 0
            with torch.no_grad():
                logp = head.logp(hidden_MD[where_C[have_C]].to(logq_CV.device), self.temperature).to(logq_CV.dtype)
            loss_C = logq_CV.new_zeros(len(logq_CV))
            return loss_C.index_put((have_C.nonzero().squeeze(1),), term.compare(logp, logq_CV[have_C]))

        return compare


class Teacher(Protocol):
    """Scores response tokens; never trained."""

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Score the tokens that `keep_N` marks, and only responses that have one."""
        ...
