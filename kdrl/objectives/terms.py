"""The terms of an objective: what each needs, which tokens it keeps, and its per-token loss.

A term never averages: `reduce.token_weights` does that for all of them. Terms see flat tokens of whole responses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from torch import Tensor

from kdrl.config import Config
from kdrl.errors import UserError
from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.estimators import importance_ratio, token_loss
from kdrl.objectives.masks import check_mask
from kdrl.objectives.policy import Advantage, Clip, clipped_loss, sequence_mean
from kdrl.objectives.reduce import Reduce
from kdrl.objectives.schedules import Schedule
from kdrl.objectives.specs import Divergence, Support, refuse_untaught
from kdrl.objectives.support import bucket, teacher_topk
from kdrl.registry import Registry

Origin = Literal["student", "gold", "teacher", "privileged"]
ScheduleField = Annotated[
    Schedule, PlainValidator(lambda v: v if isinstance(v, Schedule) else Schedule(v)), PlainSerializer(lambda v: v.spec)
]


@dataclass(frozen=True)
class TokenView:
    """The trained response tokens of a micro-batch, N of them in whole responses, as a term sees them.

    `logq_N` (and `entropy_N` for a term that asks) carry gradient; everything else is data.
    """

    logq_N: Tensor
    row_N: Tensor
    rows: int
    last_N: Tensor
    keep_N: Tensor
    reward_N: Tensor
    correct_N: Tensor
    advantage_N: Tensor | None = None
    old_N: Tensor | None = None
    teacher_N: Tensor | None = None
    reference_N: Tensor | None = None
    divergence_N: Tensor | None = None
    entropy_N: Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """What a term must be given beside the student's own log-probs."""

    teacher: Literal["token", "distribution"] | None = None
    reference: bool = False
    entropy: bool = False
    rewards: bool = False


class TermConfig(Config):
    """What every term has: a weight that may move, a mask, a reduction and the responses that it reads."""

    weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Coefficient of the term: a number or a schedule such as {linear: {from: 5.0e-3, to: 1.0e-3, steps: 80}}."""
    mask: Any = "all"
    """Tokens the term applies to: a mask's name, a list that must all hold, {not: m}, {any: []}, {top_entropy: s}."""
    reduce: Reduce = Reduce()
    """How the per-token losses are averaged; counts are taken once over the global batch."""
    on: tuple[Origin, ...] = ("student",)
    """Whose responses the term reads: student, gold, teacher, privileged."""

    @field_validator("mask")
    @classmethod
    def _mask(cls, spec: Any) -> Any:
        check_mask(spec)
        return spec


ConfigT = TypeVar("ConfigT", bound=TermConfig)


class Term(Generic[ConfigT]):
    """One entry of an objective; subclasses give `loss` and, where they need something, `needs`."""

    name: str
    family: Literal["rl", "kd", "other"] = "other"
    Config: type[TermConfig] = TermConfig

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        """What the trainer must provide in the view."""
        return Needs()

    def keep(self, last_N: Tensor) -> Tensor | None:
        """Tokens that the term leaves out beside its mask, as a bool to keep `[N]`, or None."""
        return None

    def compare(self, teacher_logp_MV: Tensor, logq_MV: Tensor) -> Tensor:
        """Per-token loss from full distributions, called inside the chunked head when `needs.teacher` asks."""
        raise TypeError(f"{self.name} compares no distributions")

    def loss(self, view: TokenView) -> Tensor:
        """Per-token loss `[N]` to minimise, differentiable in the student."""
        raise NotImplementedError(self.name)


TERMS: Registry[type[Term[Any]]] = Registry("objective term")


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


class DistillConfig(TermConfig):
    """A divergence from a frozen teacher."""

    divergence: Divergence = Divergence()
    """forward_kl, reverse_kl, {jsd: beta}, or {jsd: {beta: b, scale: paper}}."""
    support: Support = Support()
    """full, {topk: K} with a tail outcome, {token: k1|k2|k3}, or {token: {estimator: k3, as: loss}}."""
    clamp: float | None = Field(default=10.0, gt=0.0)
    """Bound on the log-ratio R inside a sampled-token gradient; null for none (token support only)."""
    teacher: Literal["teacher", "self"] = "teacher"
    """`teacher`, or `self`: the student as it is, reading the privileged prompt (HDPO, OPSD), without gradient."""
    skip_eos: bool = False
    """Leave the final end-of-sequence token out (teacher and student that end differently)."""
    on: tuple[Origin, ...] = ("student", "gold", "teacher")
    """Whose responses the term reads: student, gold, teacher, privileged."""

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        refuse_untaught(self.divergence, self.support)
        if self.teacher == "self" and self.on != ("privileged",):
            raise ValueError("teacher: self reads the privileged prompt, so it needs `on: [privileged]`")
        if self.support.kind != "token" and "clamp" in self.model_fields_set and self.clamp is not None:
            raise ValueError(
                f"clamp bounds a sampled-token ratio: it belongs to support {{token: ...}}, not to {self.support.kind}"
            )
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> dict[str, Any]:
        # A resolved recipe must read back: clamp is refused where it would do nothing.
        return {k: v for k, v in handler(self).items() if k != "clamp" or self.support.kind == "token"}


def distribution_loss(config: DistillConfig, logp: Tensor, logq: Tensor) -> Tensor:
    """Divergence over `full` or `topk` support from log-probs `[..., V]` to `[...]`."""
    if config.support.kind == "topk":
        assert config.support.k is not None
        ids = teacher_topk(logp, config.support.k)
        logp, logq = bucket(logp, ids), bucket(logq, ids)
    return divergence_of(config.divergence, logp, logq)


@TERMS.add("distill")
class Distill(Term[DistillConfig]):
    """Divergence to the teacher at every kept token, over the vocabulary or from the sampled token."""

    name, family, Config = "distill", "kd", DistillConfig

    @property
    def needs(self) -> Needs:
        """Teacher log-probs of the sampled tokens, or its distribution."""
        return Needs(teacher="token" if self.config.support.kind == "token" else "distribution")

    def keep(self, last_N: Tensor) -> Tensor | None:
        """All but the final token of a finished response under skip_eos."""
        return ~last_N if self.config.skip_eos else None

    def compare(self, teacher_logp_MV: Tensor, logq_MV: Tensor) -> Tensor:
        """Divergence `[M]` of one chunk."""
        return distribution_loss(self.config, teacher_logp_MV, logq_MV)

    def loss(self, view: TokenView) -> Tensor:
        """The divergence, or the sampled-token estimate times sg(pi_theta/pi_old) on stale samples."""
        if self.config.support.kind != "token":
            assert view.divergence_N is not None
            return view.divergence_N
        assert view.teacher_N is not None
        rho_N = importance_ratio(view.logq_N, view.old_N)
        return token_loss(self.config.support, view.logq_N, view.teacher_N, self.config.clamp, rho_N)


class CrossEntropyConfig(TermConfig):
    """Maximum likelihood of a text."""

    on: tuple[Origin, ...] = ("gold", "teacher")
    """Whose responses the term reads: student, gold, teacher, privileged."""


@TERMS.add("cross_entropy")
class CrossEntropy(Term[CrossEntropyConfig]):
    """Negative log-likelihood of gold or teacher text (SFT; SeqKD 1606.07947)."""

    name, Config = "cross_entropy", CrossEntropyConfig

    def loss(self, view: TokenView) -> Tensor:
        """-log q of each token in nats."""
        return -view.logq_N


class ReferenceKLConfig(TermConfig):
    """A leash to the policy that training started from."""

    estimator: Literal["k1", "k2", "k3"] = "k2"
    """Estimate of KL(policy||reference), each in its sound placement: k1 advantage, k2 loss, k3 straight-through."""
    clamp: float | None = Field(default=10.0, gt=0.0)
    """Bound on the log-ratio inside the gradient's coefficient; null for none."""


@TERMS.add("reference_kl")
class ReferenceKL(Term[ReferenceKLConfig]):
    """Reverse KL to the frozen initial student, estimated on the student's own samples; off unless listed."""

    name, Config = "reference_kl", ReferenceKLConfig

    @property
    def needs(self) -> Needs:
        """Log-probs of the sampled tokens under the initial student."""
        return Needs(reference=True)

    def loss(self, view: TokenView) -> Tensor:
        """The chosen estimate per token."""
        assert view.reference_N is not None
        support = Support.model_validate({"token": self.config.estimator})
        rho_N = importance_ratio(view.logq_N, view.old_N)
        return token_loss(support, view.logq_N, view.reference_N, self.config.clamp, rho_N)


@TERMS.add("entropy")
class EntropyBonus(Term[TermConfig]):
    """Entropy bonus: minus the policy's entropy at each token of the rollouts (nats)."""

    name = "entropy"

    @property
    def needs(self) -> Needs:
        """Entropy with gradient."""
        return Needs(entropy=True)

    def loss(self, view: TokenView) -> Tensor:
        """-H per token."""
        assert view.entropy_N is not None
        return -view.entropy_N


LossFunction = Callable[..., Tensor]


def _setting_fields(name: str, function: LossFunction) -> dict[str, Any]:
    """The keyword arguments of a term's function as configuration fields."""
    fields: dict[str, Any] = {}
    for p in list(inspect.signature(function).parameters.values())[1:]:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise UserError(f"the term {name!r} takes *{p.name}; name its settings one by one.")
        if p.name in TermConfig.model_fields:
            raise UserError(f"the term {name!r} has a setting {p.name!r}, which every term has; call it otherwise.")
        fields[p.name] = (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default)
    return fields


def _per_token(name: str, loss_N: Any, view: TokenView) -> Tensor:
    """The loss of a user's term; raises UserError unless it is one number per token, since a term never averages."""
    shape = tuple(loss_N.shape) if isinstance(loss_N, Tensor) else type(loss_N).__name__
    if shape != tuple(view.logq_N.shape):
        raise UserError(
            f"the term {name!r} must return one loss per token, {tuple(view.logq_N.shape)}, but gave {shape}; "
            "the recipe's `reduce` averages."
        )
    return loss_N


def register_term(name: str, *, teacher: bool = False, entropy: bool = False) -> Callable[[LossFunction], LossFunction]:
    """Register `fn(view: TokenView, **settings) -> loss [N]` as a term of one's own.

    Its keyword arguments become recipe keys beside weight, mask, reduce and on, checked by their annotations;
    `teacher` and `entropy` ask for `view.teacher_N` (log-probs of the sampled tokens) and `view.entropy_N` (with
    gradient).
    """

    def register(function: LossFunction) -> LossFunction:
        fields = _setting_fields(name, function)
        config = create_model(
            f"{name}_config", __base__=TermConfig, __doc__=function.__doc__, __module__=function.__module__, **fields
        )

        class Registered(Term[TermConfig]):
            family, Config = ("kd" if teacher else "other"), config

            @property
            def needs(self) -> Needs:
                return Needs(teacher="token" if teacher else None, entropy=entropy)

            def loss(self, view: TokenView) -> Tensor:
                loss_N = function(view, **{key: getattr(self.config, key) for key in fields})
                return _per_token(name, loss_N, view)

        Registered.name = name
        Registered.__doc__ = function.__doc__
        TERMS.add(name, of=function)(Registered)
        return function

    return register
