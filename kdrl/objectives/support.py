"""Which outcomes a divergence sees: all, the likeliest k and what becomes of the rest, or unbiased draws.

What a truncation does to the gradient is stated at each; `Covered` says how much mass the chosen tokens hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl.objectives.logspace import finite
from kdrl.objectives.support_specs import Support


@dataclass(frozen=True)
class Covered:
    """Log-probs of teacher and student over the chosen outcomes `[..., S]`, and the mass of the chosen tokens."""

    logp: Tensor
    logq: Tensor
    mass_p: Tensor
    mass_q: Tensor


@dataclass(frozen=True)
class Few:
    """What a teacher gives that cannot give its distribution: some tokens `[N, K]` and their log-probs.

    Its likeliest ones in falling order; or draws, each distinct token once, with `weight` w for a sum of w (log p -
    log q) that is KL(p||q) in expectation (unused places have weight 0). `tail` is the log mass of all other tokens.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    weight_NK: Tensor | None = None
    tail_N: Tensor | None = None

    def at(self, index: Tensor) -> Few:
        """The rows of some tokens."""
        weight, tail = (None if x is None else x[index] for x in (self.weight_NK, self.tail_N))
        return Few(self.ids_NK[index], self.logp_NK[index], weight, tail)

    def outside(self, inside_NK: Tensor) -> Tensor:
        """Log mass `[N, 1]` of all but the likeliest tokens that `inside` marks.

        Without `tail` it is what these leave of one, which near a mass of one has few digits.
        """
        if self.tail_N is None:
            mass_N1 = (self.logp_NK.exp() * inside_NK).sum(-1, keepdim=True).clamp(max=1.0)
            return finite(torch.log1p(-mass_N1))
        rest_NK = torch.cat([self.logp_NK.masked_fill(inside_NK, -torch.inf), self.tail_N[:, None]], -1)
        return finite(rest_NK).logsumexp(-1, keepdim=True)


def _tail(logp_NV: Tensor, inside_NV: Tensor) -> Tensor:
    """Log mass outside, computed from the outcomes themselves and never as 1 - sum."""
    # Raised off -inf: a tail in which every outcome is ruled out would have a NaN gradient.
    return finite(logp_NV.masked_fill(inside_NV, -torch.inf)).logsumexp(-1, keepdim=True)


def _inside(logp_NV: Tensor, ids_NK: Tensor, kept_NK: Tensor | None = None) -> Tensor:
    kept_NK = torch.ones_like(ids_NK, dtype=torch.bool) if kept_NK is None else kept_NK
    return torch.zeros_like(logp_NV, dtype=torch.bool).scatter(-1, ids_NK, kept_NK)


def bucket(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities of the outcomes `ids` and of all others together: `[N, K+1]` (`[N, K]` when K = V).

    Inside the head and on the total tail mass its KL gradient equals the full one; the tail's shape is untouched.
    """
    head = logp_NV.gather(-1, ids_NK)
    if ids_NK.shape[-1] >= logp_NV.shape[-1]:
        return head
    return torch.cat([head, _tail(logp_NV, _inside(logp_NV, ids_NK))], dim=-1)


def teacher_topk(logp_NV: Tensor, k: int) -> Tensor:
    """Ids `[N, K]` of the teacher's k most likely tokens (all of them when k exceeds the vocabulary)."""
    return logp_NV.topk(min(k, logp_NV.shape[-1]), dim=-1).indices


def _nucleus(head_NK: Tensor, top_p: float) -> Tensor:
    """The fewest of the head's tokens (sorted) whose mass reaches top_p; the first always."""
    p_NK = head_NK.exp()
    return (p_NK.cumsum(-1) - p_NK) < top_p


def cover(support: Support, logp_NV: Tensor, logq_NV: Tensor) -> Covered:
    """Teacher and student over `full` or `topk` support.

    On logits z of q, with P and Q the masses of the k tokens K: `tail` has the exact KL(p||q) gradient q - p inside K
    and moves the rest as one; `renormalise_teacher` gives q - p_K/P, over-sharp by 1/P; `partial` P q - p_K, the same
    fixed point with smaller steps; `renormalise` zero outside K, so the student's mass there is free.
    """
    if support.kind == "full":
        one = torch.ones_like(logq_NV[..., 0])
        return Covered(logp_NV, logq_NV, one, one)
    assert support.k is not None
    ids_NK = teacher_topk(logp_NV if support.of == "teacher" else logq_NV.detach(), support.k)
    whole = ids_NK.shape[-1] == logp_NV.shape[-1]
    return _within(support, ids_NK, logp_NV.gather(-1, ids_NK), logq_NV, whole, lambda at_NV: _tail(logp_NV, at_NV))


def _within(
    support: Support,
    ids_NK: Tensor,
    logp_NK: Tensor,
    logq_NV: Tensor,
    whole: bool,
    tail_of_p: Callable[[Tensor], Tensor],
) -> Covered:
    """Both sides over the tokens `ids` and what `rest` says of all others; `whole` when there are no others."""
    logq_NK, kept_NK = logq_NV.gather(-1, ids_NK), None
    if support.top_p is not None:
        kept_NK = _nucleus(logp_NK, support.top_p)
        logp_NK, logq_NK = (x.masked_fill(~kept_NK, -torch.inf) for x in (logp_NK, logq_NK))
    mass_p, mass_q = (x.detach().exp().sum(-1) for x in (logp_NK, logq_NK))
    if support.rest == "renormalise_teacher":
        logp_NK = finite(logp_NK).log_softmax(-1)
    elif support.rest == "renormalise":
        logp_NK, logq_NK = (finite(x).log_softmax(-1) for x in (logp_NK, logq_NK))
    elif support.rest == "tail" and (not whole or kept_NK is not None):
        inside_NV = _inside(logq_NV, ids_NK, kept_NK)
        logp_NK = torch.cat([logp_NK, tail_of_p(inside_NV)], -1)
        logq_NK = torch.cat([logq_NK, _tail(logq_NV, inside_NV)], -1)
    return Covered(logp_NK, logq_NK, mass_p, mass_q)


def cover_few(support: Support, few: Few, logq_NV: Tensor) -> Covered:
    """`cover` from a teacher that gives its likeliest tokens alone; its tail is what they leave (see `Few.outside`)."""
    assert support.k is not None
    ids_NK, logp_NK = few.ids_NK[:, : support.k], few.logp_NK[:, : support.k]

    def tail_of_p(inside_NV: Tensor) -> Tensor:
        return few.outside(inside_NV.gather(-1, few.ids_NK))

    return _within(support, ids_NK, logp_NK, logq_NV, ids_NK.shape[-1] == logq_NV.shape[-1], tail_of_p)


def drawn_forward_kl(support: Support, logp_NV: Tensor, logq_NV: Tensor, uniform_NK: Tensor) -> Covered:
    """Draws from p^tau as `Covered`: log-probs of the drawn tokens, to be weighed by `draw_weights` (RS-KD).

    The mean over draws of w (log p - log q) is KL(p||q) in expectation, and its gradient that of KL(p||q).
    """
    ids_NK = draw_ids(logp_NV, support.tau, uniform_NK)
    inside_NV = _inside(logp_NV, ids_NK)
    mass_p, mass_q = ((x.detach().exp() * inside_NV).sum(-1) for x in (logp_NV, logq_NV))
    return Covered(logp_NV.gather(-1, ids_NK), logq_NV.gather(-1, ids_NK), mass_p, mass_q)


def draw_ids(logp_NV: Tensor, tau: float, uniform_NK: Tensor) -> Tensor:
    """Ids `[N, K]` from p^tau by inverting its cumulative sum, in float64 so that rare tokens keep their share."""
    cumulative_NV = (tau * logp_NV).double().softmax(-1).cumsum(-1)
    at_NK = uniform_NK.double() * cumulative_NV[..., -1:]
    return torch.searchsorted(cumulative_NV, at_NK, right=True).clamp(max=logp_NV.shape[-1] - 1)


def draw_weights(support: Support, logp_NV: Tensor, drawn: Covered) -> Tensor:
    """p / p^tau-normalised of each drawn token over the number of draws, `[N, K]`: 1/n at tau = 1."""
    if support.tau == 1.0:
        return torch.full_like(drawn.logp, 1.0 / drawn.logp.shape[-1])
    log_norm_N1 = (support.tau * logp_NV).logsumexp(-1, keepdim=True)
    return (drawn.logp - (support.tau * drawn.logp - log_norm_N1)).exp() / drawn.logp.shape[-1]


def listwise(logp_NV: Tensor, logq_NV: Tensor, token_N: Tensor, k: int) -> tuple[Tensor, Covered]:
    """Plackett-Luce loss of the ranking label first, then the teacher's likeliest (PLD, 2506.12542), over k tokens + y.

    sum_j p(pi_j) (-s(pi_j) + log sum_{l >= j} exp s(pi_l)), s the student's logits, p over the whole vocabulary. Not a
    divergence: at p = q it is not zero. The original ranks the whole vocabulary.
    """
    rest_NV = logp_NV.scatter(-1, token_N[:, None], -torch.inf)
    ids_NK = torch.cat([token_N[:, None], teacher_topk(rest_NV, min(k, logp_NV.shape[-1] - 1))], -1)
    logp_NK, logq_NK = finite(logp_NV.gather(-1, ids_NK)), finite(logq_NV.gather(-1, ids_NK))
    after_NK = logq_NK.flip(-1).logcumsumexp(-1).flip(-1)
    loss_N = (logp_NK.exp() * (after_NK - logq_NK)).sum(-1)
    masses = (x.detach().exp().sum(-1) for x in (logp_NK, logq_NK))
    return loss_N, Covered(logp_NK, logq_NK, *masses)
