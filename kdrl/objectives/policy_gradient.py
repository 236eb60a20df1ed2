"""The policy-gradient term: verifiable rewards, with GRPO's variants as settings."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdrl.config import Config
from kdrl.objectives.base import TERMS, Needs, Term, TermConfig, TokenView
from kdrl.objectives.policy import Advantage, Clip, clipped_loss, sequence_mean


class TeacherAnchor(Config):
    """The teacher in the trust region: a ratio against pi_old^alpha p_teacher^(1-alpha) (TRRD, 2602.22495)."""

    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the old policy in the anchor: 1 is the ordinary ratio, 0 the teacher alone."""
    clamp: float | None = Field(default=1.0, gt=0.0)
    """Bound on |log pi - log p_teacher|; its gradient vanishes beyond. The paper's value is not known."""


class PolicyGradientConfig(TermConfig):
    """GRPO and its variants."""

    advantage: Advantage = Advantage()
    """grpo, dr_grpo, rloo, reinforce, batch_std, or {baseline, scale}."""
    ratio: Literal["token", "sequence", "none"] | TeacherAnchor = "token"
    """Importance ratio per token, per sequence (GSPO, 2507.18071), none, or {alpha: ...} for the TRRD anchor."""
    clip: Clip = Clip()
    """Symmetric {low: .2, high: .2}, clip-higher {high: .28}, {dual: 3}, {kind: cispo, cap: 5}, or {kind: none}."""

    @model_validator(mode="after")
    def _check(self) -> PolicyGradientConfig:
        if self.ratio == "none" and self.clip != Clip():
            raise ValueError("clip bounds the importance ratio, and `ratio: none` has none; leave clip out")
        return self


@TERMS.add("policy_gradient")
class PolicyGradient(Term[PolicyGradientConfig]):
    """Verifiable-reward policy gradient (GRPO, 2402.03300, and variants by advantage, ratio, clip and reduce)."""

    name, family, Config = "policy_gradient", "rl", PolicyGradientConfig

    @property
    def needs(self) -> Needs:
        """Rewards, and teacher log-probs of the sampled tokens under a TRRD anchor."""
        anchored = isinstance(self.config.ratio, TeacherAnchor)
        return Needs(teacher="token" if anchored else None, rewards=True)

    @property
    def whole_rows(self) -> bool:
        """GSPO's ratio is that of the whole response."""
        return self.config.ratio == "sequence"

    def log_ratio(self, view: TokenView) -> Tensor:
        """Log importance ratio per token `[N]`, zero in value on-policy except under a TRRD anchor."""
        old_N = view.logq_N.detach() if view.old_N is None else view.old_N
        plain_N = view.logq_N - old_N
        ratio = self.config.ratio
        if ratio == "sequence":
            return sequence_mean(plain_N, view.row_N, view.rows)
        if isinstance(ratio, TeacherAnchor):
            assert view.teacher_N is not None
            gap_N = view.logq_N - view.teacher_N
            gap_N = gap_N if ratio.clamp is None else gap_N.clamp(-ratio.clamp, ratio.clamp)
            return ratio.alpha * plain_N + (1.0 - ratio.alpha) * gap_N
        return plain_N

    def clipped(self, view: TokenView) -> tuple[Tensor, Tensor]:
        """Loss and held tokens, both `[N]`."""
        assert view.advantage_N is not None
        if self.config.ratio == "none":
            return -view.advantage_N * view.logq_N, torch.zeros_like(view.keep_N)
        return clipped_loss(self.config.clip, self.log_ratio(view), view.advantage_N, view.logq_N)

    def loss(self, view: TokenView) -> Tensor:
        """Negative clipped objective per token."""
        return self.clipped(view)[0]
