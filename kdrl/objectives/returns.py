"""The long-range part of a whole sequence's reverse KL, by policy gradient (MiniLLM, 2306.08543).

grad KL(q||p) over sequences = E_q sum_t [ grad KL(q_t||p_t) - (sum of R over later tokens) grad log q_t ]. The first
part is a `distill` term with `divergence: reverse_kl` (support full: exactly); the second is this term.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kdrl.batch import Origin
from kdrl.objectives.base import TERMS, Needs, ScheduleField, Term, TermConfig, TokenView
from kdrl.objectives.logspace import finite
from kdrl.objectives.policy import Clip, clipped_loss
from kdrl.objectives.schedules import Schedule


def discounted_sum(values_N: Tensor, row_N: Tensor, discount: float) -> Tensor:
    """Sum over s >= t of discount^(s-t) values_s within each response, `[N]`; a response's tokens stand together."""
    out_N, step = values_N, 1
    while step < len(row_N):
        together = row_N[step:] == row_N[:-step]
        if not bool(together.any()):
            break
        # Doubling: what reached `step` tokens ahead now reaches twice as far.
        ahead = torch.where(together, out_N[step:], 0.0) * discount**step
        out_N = out_N + torch.cat([ahead, out_N.new_zeros(step)])
        step *= 2
    return out_N


def later_rewards(reward_N: Tensor, row_N: Tensor, discount: float, length_norm: bool) -> Tensor:
    """Sum over s > t of discount^(s-t) reward_s in each response, `[N]`, divided by the number of later tokens."""
    later_N = discounted_sum(reward_N, row_N, discount) - reward_N
    if not length_norm:
        return later_N
    ones_N = torch.ones_like(reward_N)
    return later_N / (discounted_sum(ones_N, row_N, 1.0) - 1.0).clamp(min=1.0)


class SequenceKLConfig(TermConfig):
    """What a token does to the teacher's opinion of the tokens after it."""

    discount: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Weight of a reward one token later, 0 to 1; at 1 this and the single-step term are the sequence's reverse KL."""
    length_norm: bool = False
    """Divide the sum of later rewards by their number, against the pull towards short responses."""
    reward_scale: float = Field(default=1.0, gt=0.0)
    """What R = log p - log q is multiplied by before it is clipped."""
    reward_clip: float | None = Field(default=100.0, gt=0.0)
    """Bound on a token's scaled reward; null for none."""
    clip: Clip = Clip(kind="none")
    """Clip of the importance ratio where rollouts serve several updates: {low: .2, high: .2}, or {kind: none}."""
    on: tuple[Origin, ...] = ("student", "mixed")
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""


@TERMS.add("sequence_kl")
class SequenceKL(Term[SequenceKLConfig]):
    """Policy gradient of the later tokens' log-ratio to the teacher: the part of MiniLLM that single steps leave out.

    Left out: whitening of the returns over a batch, which MiniLLM's code does and its paper does not say.
    """

    name, family, Config = "sequence_kl", "kd", SequenceKLConfig

    @property
    def needs(self) -> Needs:
        """Teacher log-probs of the sampled tokens."""
        return Needs(teacher="token")

    @property
    def whole_rows(self) -> bool:
        """A token's return is over all later ones, also those that the mask leaves out."""
        return True

    def returns(self, view: TokenView) -> Tensor:
        """Clipped rewards of the later tokens, discounted and summed, as data `[N]`."""
        assert view.teacher_N is not None
        reward_N = self.config.reward_scale * (finite(view.teacher_N) - view.logq_N.detach())
        if self.config.reward_clip is not None:
            reward_N = reward_N.clamp(-self.config.reward_clip, self.config.reward_clip)
        discount = self.config.discount.at(view.moment)
        return later_rewards(reward_N, view.row_N, discount, self.config.length_norm)

    def loss(self, view: TokenView) -> Tensor:
        """Minus return times ratio, whose gradient on-policy is minus return times that of log q."""
        old_N = view.logq_N.detach() if view.old_N is None else view.old_N
        return clipped_loss(self.config.clip, view.logq_N - old_N, self.returns(view), view.logq_N)[0]
