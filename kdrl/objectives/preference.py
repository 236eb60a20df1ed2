"""Preferences between whole responses: pairs inside a group, or each response against the policy's own drift.

The loss of a pair couples two responses, so `couple` sees all rows of the optimizer step and gives every token its
coefficient; micro-batches then change nothing. A response's log-probability is over the tokens that the mask keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdrl.batch import Origin
from kdrl.objectives.base import TERMS, Needs, ScheduleField, Term, TermConfig, TokenView
from kdrl.objectives.logspace import finite
from kdrl.objectives.reduce import Reduce
from kdrl.objectives.schedules import Moment, Schedule


class PreferenceConfig(TermConfig):
    """One response preferred to another, by reward or by who wrote it."""

    loss: Literal["logistic", "squared", "hinge", "kto"] = "logistic"
    """On D = score of the chosen minus the rejected: -log sigmoid(beta D - margin), (D - 1/(2 beta))^2 (IPO,
    2310.12036), max(0, margin - beta D), or `kto`, which judges each response alone (2402.01306)."""
    by: Literal["reward", "origin"] = "reward"
    """Who is chosen: the higher reward of two in a group, or another writer's text over the student's own."""
    reference: Literal["initial", "teacher", "none"] = "initial"
    """A score is log q - log reference: of the initial student (DPO, 2305.18290), the teacher (DPKD, 2406.19774), or
    log q alone (SimPO, 2405.14734)."""
    per_token: bool = False
    """Divide a response's score by its length, so that length alone does not win."""
    beta: ScheduleField = Field(default_factory=lambda: Schedule(0.1))
    """Scale of the difference of scores; must stay above 0."""
    margin: ScheduleField = Field(default_factory=lambda: Schedule(0.0))
    """What the scaled difference should exceed (logistic, hinge)."""
    positive_weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Weight of right responses (kto)."""
    negative_weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Weight of wrong responses (kto)."""
    reduce: Reduce = Reduce(kind="sum")
    """`sum` alone: the term is a mean over the groups that hold a pair, each the mean over its pairs."""
    on: tuple[Origin, ...] = ("student", "gold", "teacher", "privileged", "buffer")
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""

    @model_validator(mode="after")
    def _check(self) -> PreferenceConfig:
        if self.reduce.kind != "sum":
            raise ValueError("a preference is averaged over its pairs; leave reduce out")
        if self.scale.constant != 1.0:
            raise ValueError("a pair has one loss, and `scale` would weigh its tokens apart; use weight")
        if "mixed" in self.on:
            raise ValueError("importance weights belong to tokens, and a preference to pairs; leave mixed out of `on`")
        if self.loss in ("squared", "kto") and self.margin.spec != 0.0:
            raise ValueError(f"margin belongs to logistic and hinge, not to {self.loss}")
        weighed = [n for n in ("positive_weight", "negative_weight") if getattr(self, n).spec != 1.0]
        if self.loss != "kto" and weighed:
            raise ValueError(f"{weighed[0]} belongs to `loss: kto`; pairs have no weight of their own")
        if self.loss == "kto" and self.reference == "none":
            raise ValueError("kto measures how far the policy has drifted: set reference to initial or teacher")
        if self.loss == "kto" and self.by == "origin":
            raise ValueError("kto judges each response by its verdict; leave `by` out")
        if isinstance(self.beta.spec, int | float) and self.beta.spec <= 0:
            raise ValueError("beta must be above 0; at 0 the responses would not matter")
        return self


@dataclass(frozen=True)
class Responses:
    """The B responses of an optimizer step as a preference sees them; `count` is their kept tokens, 0 where none."""

    score_B: Tensor
    count_B: Tensor
    group_B: Tensor
    reward_B: Tensor
    correct_B: Tensor
    foreign_B: Tensor


def responses_of(config: PreferenceConfig, view: TokenView) -> Responses:
    """Scores and outcomes of all responses, from their kept tokens."""
    assert view.group_N is not None
    assert view.foreign_N is not None
    against_N = {"initial": view.reference_N, "teacher": view.teacher_N, "none": torch.zeros_like(view.logq_N)}
    reference_N = against_N[config.reference]
    assert reference_N is not None
    # In float64: a sum of thousands of log-probs decides by its small difference.
    gap_N = torch.where(view.keep_N, (view.logq_N - finite(reference_N)).double(), 0.0)
    score_B = gap_N.new_zeros(view.rows).index_add(0, view.row_N, gap_N)
    count_B = gap_N.new_zeros(view.rows).index_add(0, view.row_N, view.keep_N.double())

    def outcome(values_N: Tensor) -> Tensor:
        out_B = values_N.new_zeros(view.rows)
        out_B[view.row_N] = values_N
        return out_B

    return Responses(
        score_B=score_B / count_B.clamp(min=1.0) if config.per_token else score_B,
        count_B=count_B,
        group_B=outcome(view.group_N),
        reward_B=outcome(view.reward_N),
        correct_B=outcome(view.correct_N),
        foreign_B=outcome(view.foreign_N),
    )


def pair_weights(config: PreferenceConfig, found: Responses) -> Tensor:
    """Weight of chosen i over rejected j, `[B, B]`: equal inside a group, groups with a pair equal, their sum 1 or 0.

    Two of equal reward (or of the same kind of writer) make no pair.
    """
    there_B = found.count_B > 0
    same_BB = (found.group_B[:, None] == found.group_B[None, :]) & there_B[:, None] & there_B[None, :]
    if config.by == "reward":
        better_BB = found.reward_B[:, None] > found.reward_B[None, :]
    else:
        better_BB = found.foreign_B[:, None] & ~found.foreign_B[None, :]
    pairs_BB = (same_BB & better_BB).double()
    _, index_B = found.group_B.unique(return_inverse=True)
    of_group_G = pairs_BB.new_zeros(int(index_B.max()) + 1 if len(index_B) else 0)
    of_group_G = of_group_G.index_add(0, index_B, pairs_BB.sum(1))
    groups = (of_group_G > 0).sum().clamp(min=1)
    return pairs_BB / (of_group_G[index_B].clamp(min=1.0) * groups)[:, None]


def pair_loss(config: PreferenceConfig, difference: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
    """Value and slope of a pair's loss at a difference of scores."""
    beta, margin = config.beta.at(moment), config.margin.at(moment)
    if config.loss == "squared":
        gap = difference - 1.0 / (2.0 * beta)
        return gap.square(), 2.0 * gap
    lead = beta * difference - margin
    if config.loss == "hinge":
        return (-lead).clamp(min=0.0), -beta * (lead < 0).to(lead.dtype)
    return torch.nn.functional.softplus(-lead), -beta * torch.sigmoid(-lead)


def pairwise(config: PreferenceConfig, found: Responses, moment: Moment) -> tuple[Tensor, Tensor]:
    """Each response's share of the loss, half of each of its pairs, and the loss's slope on its score, both `[B]`."""
    weight_BB = pair_weights(config, found)
    value_BB, slope_BB = pair_loss(config, found.score_B[:, None] - found.score_B[None, :], moment)
    # Only pairs: elsewhere a value may be infinite.
    value_BB = torch.where(weight_BB > 0, weight_BB * value_BB, 0.0)
    slope_BB = torch.where(weight_BB > 0, weight_BB * slope_BB, 0.0)
    return 0.5 * (value_BB.sum(1) + value_BB.sum(0)), slope_BB.sum(1) - slope_BB.sum(0)


def unpaired(config: PreferenceConfig, found: Responses, moment: Moment) -> tuple[Tensor, Tensor]:
    """KTO's loss, w (1 - sigmoid(+-beta (score - z))), and its slope per response, both `[B]`.

    z = max(0, mean score of the student's own responses) estimates KL(q||reference) and is data; the paper takes it
    from mismatched prompts and responses instead.
    """
    beta = config.beta.at(moment)
    there_B = found.count_B > 0
    own_B = there_B & ~found.foreign_B
    drift = torch.where(own_B, found.score_B, 0.0).sum() / own_B.sum().clamp(min=1)
    right_B = found.correct_B.to(found.score_B.dtype)
    sign_B = 2.0 * right_B - 1.0
    up, down = config.positive_weight.at(moment), config.negative_weight.at(moment)
    weight_B = (up * right_B + down * (1.0 - right_B)) * there_B / there_B.sum().clamp(min=1)
    gain_B = torch.sigmoid(sign_B * beta * (found.score_B - drift.clamp(min=0.0)))
    return weight_B * (1.0 - gain_B), -weight_B * sign_B * beta * gain_B * (1.0 - gain_B)


@TERMS.add("preference")
class Preference(Term[PreferenceConfig]):
    """Pairs inside a group (DPO, IPO, SimPO, ranking, DPKD's sequence form), or responses one by one (KTO)."""

    name, Config, couples = "preference", PreferenceConfig, True

    def __init__(self, config: PreferenceConfig) -> None:
        super().__init__(config)
        taught = config.by == "origin" or config.reference == "teacher"
        self.family = "kd" if taught else "rl"

    @property
    def needs(self) -> Needs:
        """The reference's log-probs of the response, and rewards where they decide."""
        config = self.config
        return Needs(
            teacher="token" if config.reference == "teacher" else None,
            reference="token" if config.reference == "initial" else None,
            rewards=config.by == "reward",
        )

    def couple(self, view: TokenView) -> Tensor:
        """Each token's coefficient on log q and share of the loss, `[N, 2]`."""
        found = responses_of(self.config, view)
        both = unpaired if self.config.loss == "kto" else pairwise
        value_B, slope_B = both(self.config, found, view.moment)
        length_B = found.count_B.clamp(min=1.0)
        coefficient_B = slope_B / length_B if self.config.per_token else slope_B
        return torch.stack([coefficient_B, value_B / length_B], dim=-1)[view.row_N]

    def count(self, view: TokenView) -> dict[str, float]:
        """Pairs, and the share of groups that hold none (responses of one reward, or of one kind of writer)."""
        if self.config.loss == "kto":
            return {}
        found = responses_of(self.config, view)
        weight_BB = pair_weights(self.config, found)
        groups = found.group_B[found.count_B > 0].unique()
        paired = found.group_B[(weight_BB > 0).any(1)].unique()
        return {
            "pairs": float((weight_BB > 0).sum()),
            "groups_without_pair": 1.0 - len(paired) / len(groups) if len(groups) else 0.0,
        }

    def loss(self, view: TokenView) -> Tensor:
        """The token's share of its response's loss, with the gradient of the whole step's preference."""
        assert view.coupled_N is not None
        coefficient_N, value_N = view.coupled_N.unbind(-1)
        return value_N + coefficient_N * (view.logq_N - view.logq_N.detach())
