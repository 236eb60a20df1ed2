"""The policy-gradient term: verifiable rewards, with GRPO's variants as settings."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdrl.config import Config
from kdrl.objectives.base import TERMS, Needs, ScheduleField, Term, TermConfig, TokenView
from kdrl.objectives.logspace import finite
from kdrl.objectives.policy import Advantage, Clip, clipped_loss, sequence_mean
from kdrl.objectives.schedules import Moment, Schedule


class TeacherAnchor(Config):
    """The teacher in the trust region: a ratio against pi_old^alpha p_teacher^(1-alpha) (TRRD, 2602.22495)."""

    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the old policy in the anchor: 1 is the ordinary ratio, 0 the teacher alone."""
    clamp: float | None = Field(default=1.0, gt=0.0)
    """Bound on |log pi - log p_teacher|; its gradient vanishes beyond. The paper's value is not known."""


class OffPolicy(Config):
    """Responses of other writers inside the group, shaped so that unlikely tokens are learned (LUFFY, 2504.14945)."""

    shape: float = Field(default=0.1, gt=0.0)
    """gamma of f(p) = p / (p + gamma), which stands where the ratio does: the writer's probability counts as 1."""


class Modulation(Config):
    """The teacher's size, the reward's sign: A ((1-s) + s clip((p/q)^sign A, 1-c, 1+c)) (RLSD, 2604.03128)."""

    share: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """s, the teacher's part in the weight."""
    clip: float = Field(default=0.2, gt=0.0, le=1.0)
    """c, how far the teacher may move an advantage."""
    skip_eos: bool = False
    """Leave the final end-of-sequence token's advantage as it is (teacher and student that end differently)."""


class TeacherReward(Config):
    """weight x R is added to a token's advantage, R = log p - log q as data; a number is the weight."""

    weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """What R is multiplied by before it is added."""
    low: float | None = -10.0
    """R is not below this; log(l / (1-l)) is REOPOLD's bound (2603.11137); null for none."""
    high: float | None = 10.0
    """R is not above this; null for none."""
    skip_eos: bool = False
    """Add nothing at the final end-of-sequence token (teacher and student that end differently)."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        named = isinstance(raw, dict) and set(raw) <= set(cls.model_fields)
        return raw if named or isinstance(raw, cls) else {"weight": raw}

    @model_validator(mode="after")
    def _check(self) -> TeacherReward:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError("teacher_reward.low must lie below teacher_reward.high")
        return self


class PolicyGradientConfig(TermConfig):
    """GRPO and its variants."""

    advantage: Advantage = Advantage()
    """grpo, dr_grpo, rloo, reinforce, batch_std, or {baseline, scale, calibrate}."""
    ratio: Literal["token", "sequence", "none"] | TeacherAnchor = "token"
    """Importance ratio per token, per sequence (GSPO, 2507.18071), none, or {alpha: ...} for the TRRD anchor."""
    clip: Clip = Clip()
    """Symmetric {low: .2, high: .2}, clip-higher {high: .28}, {dual: 3}, {kind: cispo, cap: 5}, or {kind: none}."""
    positive_weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Factor on positive advantages."""
    negative_weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Factor on negative advantages; 0.5 in OREAL's code (2502.06781)."""
    off_policy: OffPolicy | None = None
    """{shape: 0.1} to learn from a teacher's responses in the group as well; `on` must then name them."""
    modulate: Modulation | None = None
    """{share: 1, clip: 0.2}: the teacher scales each token's advantage and never turns its sign."""
    teacher_reward: TeacherReward | None = None
    """A weight, or {weight, low, high}: R joins the advantage inside the clipped surrogate (2609.04108, 2601.02780)."""

    @model_validator(mode="after")
    def _check(self) -> PolicyGradientConfig:
        if self.ratio == "none" and self.clip != Clip():
            raise ValueError("clip bounds the importance ratio, and `ratio: none` has none; leave clip out")
        asked = {
            "ratio {alpha: ...}": isinstance(self.ratio, TeacherAnchor),
            "modulate": self.modulate is not None,
            "teacher_reward": self.teacher_reward is not None,
        }
        found = [name for name, used in asked.items() if used]
        if self.off_policy is not None and found:
            raise ValueError(
                f"{found[0]} reads the teacher on the student's own samples, and off_policy adds the teacher's; "
                "use one of them"
            )
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} each put the teacher into the policy gradient; use one of them")
        return self


@TERMS.add("policy_gradient")
class PolicyGradient(Term[PolicyGradientConfig]):
    """Verifiable-reward policy gradient (GRPO, 2402.03300, and variants by advantage, ratio, clip and reduce)."""

    name, family, Config = "policy_gradient", "rl", PolicyGradientConfig

    @property
    def needs(self) -> Needs:
        """Rewards, and teacher log-probs of the sampled tokens where a setting reads them."""
        config = self.config
        asks = isinstance(config.ratio, TeacherAnchor) or config.modulate or config.teacher_reward
        return Needs(teacher="token" if asks else None, rewards=True)

    @property
    def whole_rows(self) -> bool:
        """GSPO's ratio is that of the whole response."""
        return self.config.ratio == "sequence"

    @property
    def idle_at_zero(self) -> bool:  # type: ignore[override]
        """Whether an advantage of zero leaves neither loss nor gradient; a teacher's reward would add to it."""
        return self.config.teacher_reward is None

    @property
    def asks_by_verdict(self) -> bool:
        """Where responses without advantage are left out."""
        return self.idle_at_zero or super().asks_by_verdict

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

    def advantage(self, view: TokenView) -> Tensor:
        """What each token is worth `[N]`: its response's advantage by sign, and what the teacher makes of it."""
        assert view.advantage_N is not None
        config = self.config
        up, down = config.positive_weight.at(view.moment), config.negative_weight.at(view.moment)
        worth_N = torch.where(view.advantage_N > 0, up * view.advantage_N, down * view.advantage_N)
        if config.modulate is not None:
            R_N = _log_ratio_to_teacher(view, config.modulate.skip_eos)
            return modulated(config.modulate, worth_N, R_N, view.moment)
        if config.teacher_reward is not None:
            R_N = _log_ratio_to_teacher(view, config.teacher_reward.skip_eos)
            return worth_N + teacher_reward(config.teacher_reward, R_N, view.moment)
        return worth_N

    def clipped(self, view: TokenView) -> tuple[Tensor, Tensor]:
        """Loss and held tokens, both `[N]`."""
        worth_N = self.advantage(view)
        if self.config.ratio == "none":
            loss_N, held_N = -worth_N * view.logq_N, torch.zeros_like(view.keep_N)
        else:
            loss_N, held_N = clipped_loss(self.config.clip, self.log_ratio(view), worth_N, view.logq_N)
        if self.config.off_policy is None:
            return loss_N, held_N
        assert view.foreign_N is not None
        shaped_N = -worth_N * shaped_probability(view.logq_N, self.config.off_policy.shape)
        return torch.where(view.foreign_N, shaped_N, loss_N), held_N & ~view.foreign_N

    def loss(self, view: TokenView) -> Tensor:
        """Negative clipped objective per token."""
        return self.clipped(view)[0]


def _log_ratio_to_teacher(view: TokenView, skip_eos: bool) -> Tensor:
    """R = log p - log q of the sampled tokens `[N]`, as data; 0 at a final token that is skipped."""
    assert view.teacher_N is not None
    R_N = finite(view.teacher_N) - view.logq_N.detach()
    return R_N.masked_fill(view.last_N, 0.0) if skip_eos else R_N


def modulated(spec: Modulation, advantage_N: Tensor, R_N: Tensor, moment: Moment) -> Tensor:
    """Advantages `[N]` scaled by the bounded teacher ratio, larger where the teacher agrees with their sign."""
    share = spec.share.at(moment)
    ratio_N = torch.exp((torch.sign(advantage_N) * R_N).clamp(max=10.0)).clamp(1.0 - spec.clip, 1.0 + spec.clip)
    return advantage_N * ((1.0 - share) + share * ratio_N)


def teacher_reward(spec: TeacherReward, R_N: Tensor, moment: Moment) -> Tensor:
    """What the teacher adds to the advantages `[N]`: its bounded log-ratio, k1 in the place of a reward."""
    bounded_N = R_N.clamp(-torch.inf if spec.low is None else spec.low, torch.inf if spec.high is None else spec.high)
    return spec.weight.at(moment) * bounded_N


def shaped_probability(logq_N: Tensor, gamma: float) -> Tensor:
    """f(q) = q / (q + gamma) from log q, `[N]`; its slope on log q is f (1 - f)."""
    return torch.sigmoid(logq_N - torch.log(torch.as_tensor(gamma, dtype=logq_N.dtype, device=logq_N.device)))
