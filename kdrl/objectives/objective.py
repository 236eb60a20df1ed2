"""A list of terms with their weights: which tokens each keeps at a step, what it needs, and the summed loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Rollouts
from kdrl.objectives.masks import MaskContext, evaluate_mask, reads_entropy
from kdrl.objectives.policy import advantages
from kdrl.objectives.reduce import token_weights
from kdrl.objectives.schedules import START, Moment
from kdrl.objectives.scores import Tokens, column
from kdrl.objectives.terms import Distill, PolicyGradient, Term, TokenView, VocabTerm


@dataclass(frozen=True)
class Active:
    """A term at one step: its weight, the tokens it may read, those its mask keeps, and its advantages."""

    name: str
    term: Term[Any]
    weight: float
    eligible_N: Tensor
    keep_N: Tensor
    advantage_B: Tensor | None
    moment: Moment = START

    @property
    def teacher(self) -> str | None:
        """Which teacher the term asks: `teacher`, one of several by name, `self`, or none."""
        if self.term.needs.teacher is None:
            return None
        return self.term.config.teacher if isinstance(self.term, Distill | VocabTerm) else "teacher"

    def wanted_N(self, row_N: Tensor, rows: int) -> Tensor:
        """Tokens whose log-probs the term reads: those kept, or all trained ones of their responses.

        Responses without advantage are left out where they cannot change loss or gradient, but for a step of no others:
        its gradient of zero still moves the optimizer.
        """
        keep_N = self.keep_N
        if self.advantage_B is not None and self.term.idle_at_zero and bool(self.advantage_B[row_N[keep_N]].any()):
            keep_N = keep_N & (self.advantage_B != 0)[row_N]
        if not self.term.whole_rows:
            return keep_N
        touched_B = torch.zeros(rows, dtype=torch.bool, device=row_N.device)
        touched_B[row_N[keep_N]] = True
        return touched_B[row_N] & self.eligible_N


class Objective:
    """The terms of a run; `names` tell two of a kind apart as `distill.0`, `distill.1`.

    With `drop_flat` (dynamic sampling) policy gradients leave out groups of equal rewards.
    """

    def __init__(self, terms: Sequence[Term[Any]], *, drop_flat: bool = False) -> None:
        self.terms = tuple(terms)
        self.drop_flat = drop_flat
        kinds = [t.name for t in self.terms]
        self.names = [k if kinds.count(k) == 1 else f"{k}.{kinds[:i].count(k)}" for i, k in enumerate(kinds)]

    def weights(self, moment: Moment) -> list[float]:
        """Each term's weight at a moment of the run."""
        return [t.config.weight.at(moment) for t in self.terms]

    @property
    def wants_entropy_mask(self) -> bool:
        """Whether a mask needs token entropies before the update."""
        return any(reads_entropy(t.config.mask) for t in self.terms)

    def activate(
        self,
        rollouts: Rollouts,
        moment: Moment,
        entropy_N: Tensor | None = None,
        logq_N: Tensor | None = None,
        *,
        judged: bool = True,
    ) -> list[Active]:
        """The terms of nonzero weight, with masks and advantages taken over the whole step's rollouts.

        Before they are `judged`, only those of whose tokens no reward and no verdict decides.
        """
        context = MaskContext(
            rollouts.correct_B,
            rollouts.reward_B,
            rollouts.group_B,
            rollouts.truncated_B,
            rollouts.row_N,
            rollouts.last_N,
            entropy_N,
            logq_N,
            token_data(rollouts),
            moment,
        )
        found = []
        for name, term, weight in zip(self.names, self.terms, self.weights(moment), strict=True):
            if weight == 0.0 or (term.asks_by_verdict and not judged):
                continue
            eligible_N = rollouts.trained_N & rollouts.origin_N(term.config.on)
            keep_N = eligible_N & evaluate_mask(term.config.mask, context)
            if self.drop_flat and isinstance(term, PolicyGradient):
                # Kept for a distillation term's sake; the policy gradient is DAPO's, which never saw them.
                keep_N = keep_N & _mixed(rollouts)[rollouts.row_N]
            more = term.keep(rollouts.last_N)
            keep_N = keep_N if more is None else keep_N & more
            found.append(Active(name, term, weight, eligible_N, keep_N, _advantages(term, rollouts), moment))
        return found


def token_data(rollouts: Rollouts) -> dict[str, Tensor]:
    """Columns that scores may read, `[N]` each: place in the response, its length, reward, verdict, group's rate.

    `right_length` is the mean length of the group's right responses, 0 where it has none.
    """
    row_N, length_B = rollouts.row_N, torch.bincount(rollouts.row_N, minlength=rollouts.rows)
    start_B = length_B.cumsum(0) - length_B
    _, group_B = rollouts.group_B.unique(return_inverse=True)
    right_B = rollouts.correct_B.float()
    count_G = torch.bincount(group_B)
    right_G = torch.zeros_like(count_G, dtype=right_B.dtype).index_add(0, group_B, right_B)
    long_G = torch.zeros_like(right_G).index_add(0, group_B, right_B * length_B)
    return {
        "index": torch.arange(rollouts.tokens, device=row_N.device) - start_B[row_N],
        "length": length_B[row_N],
        "reward": rollouts.reward_B[row_N],
        "correct": rollouts.correct_B[row_N],
        "group_rate": (right_G / count_G)[group_B][row_N],
        "right_length": (long_G / right_G.clamp(min=1.0))[group_B][row_N],
    }


def _mixed(rollouts: Rollouts) -> Tensor:
    """Responses of groups whose rewards differ, bool `[B]`."""
    mixed_B = torch.zeros_like(rollouts.correct_B)
    for group in rollouts.group_B.unique():
        mine = rollouts.group_B == group
        rewards = rollouts.reward_B[mine]
        mixed_B[mine] = (rewards != rewards[0]).any()
    return mixed_B


def _advantages(term: Term[Any], rollouts: Rollouts) -> Tensor | None:
    """Advantages over the responses that the term reads; zero for the others."""
    if not isinstance(term, PolicyGradient):
        return None
    mine = torch.tensor([r.origin in term.config.on for r in rollouts.responses], device=rollouts.reward_B.device)
    out_B = torch.zeros_like(rollouts.reward_B)
    out_B[mine] = advantages(term.config.advantage, rollouts.reward_B[mine], rollouts.group_B[mine])
    return out_B


def reduction(active: Active, rollouts: Rollouts, rows: Sequence[int]) -> Tensor:
    """Weight of each token of one optimizer step's `rows` under the term's `reduce`, zero elsewhere, `[N]`.

    Importance weights multiply it and do not enter the counts, so that the estimate stays unbiased.
    """
    inside_B = torch.zeros(rollouts.rows, dtype=torch.bool, device=rollouts.row_N.device)
    inside_B[list(rows)] = True
    inside_N = inside_B[rollouts.row_N]
    out_N = torch.zeros(rollouts.tokens, dtype=torch.float32, device=rollouts.row_N.device)
    rank_B = inside_B.cumsum(0) - 1
    out_N[inside_N] = token_weights(
        active.term.config.reduce,
        active.keep_N[inside_N],
        rank_B[rollouts.row_N[inside_N]],
        len(rows),
        torch.float32,
    )
    return out_N * rollouts.importance_N


def view_tokens(view: TokenView) -> Tokens:
    """What a score may see of a term's tokens when no distribution is at hand."""
    return Tokens(
        data=view.data,
        logq_C=view.logq_N.detach(),
        logp_C=view.teacher_N,
        entropy_C=view.entropy_N,
        measured=view.measured,
        moment=view.moment,
    )


def weighted_loss(active: Active, view: TokenView, weight_M: Tensor) -> Tensor:
    """The term's share of a micro-batch's loss, before its coefficient: sum of weight x per-token loss.

    `weight` holds the reduction and the importance weights of tokens that another policy sampled.

    Tokens of zero weight are left out, not multiplied by zero: a log-prob of -inf there must not make NaN.
    """
    loss_M = active.term.loss(view)
    if not active.term.compared and active.term.config.scale.constant != 1.0:
        # A term over distributions has applied its scale where it had them.
        loss_M = loss_M * column(active.term.config.scale(view_tokens(view)), loss_M)
    return torch.where(weight_M != 0, loss_M * weight_M, 0.0).sum()
