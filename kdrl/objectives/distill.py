"""The distillation term: a divergence from a frozen teacher at every kept token."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdrl.batch import Origin
from kdrl.objectives.base import TERMS, Needs, Term, TermConfig, TokenView
from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.estimators import importance_ratio, token_loss
from kdrl.objectives.logspace import finite
from kdrl.objectives.scores import Score, Tokens, column
from kdrl.objectives.specs import Divergence
from kdrl.objectives.support import Covered, Few, cover, cover_few, draw_weights, drawn_forward_kl, listwise
from kdrl.objectives.support_specs import Support, refuse_untaught
from kdrl.objectives.target import Target, label_and_rest, rescaling, sampled_target, student_view, teacher_view


class DistillConfig(TermConfig):
    """A divergence from a frozen teacher."""

    divergence: Divergence = Divergence()
    """forward_kl, reverse_kl, tv, {jsd: b}, {skew_kl: a}, {skew_reverse_kl: a}, {symmetric: g}, {alpha_beta: {alpha,
    beta}}, {arms: [...], assistant: {...}}, {pair: [...]}, {preference: b} or rank."""
    support: Support = Support()
    """full, {topk: K}, {topk: {k, of, rest, top_p}}, {draws: n}, {token: k1|k2|k3}, or {token: {estimator: k3, as:
    loss}}."""
    target: Target = Target()
    """Temperatures, power, label mix, decoupling, product with the initial student."""
    clamp: float | None = Field(default=10.0, gt=0.0)
    """Bound on the log-ratio R inside a sampled-token gradient; null for none (token support only)."""
    teacher: str = "teacher"
    """`teacher`, one of `teachers` by name, or `self`: the student as it is, reading the privileged prompt (HDPO,
    OPSD), without gradient."""
    skip_eos: bool = False
    """Leave the final end-of-sequence token out (teacher and student that end differently)."""
    on: tuple[Origin, ...] = ("student", "gold", "teacher", "buffer", "speculative", "mixed", "corrupt")
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        refuse_untaught(self.divergence, self.support)
        self._check_target()
        if self.support.kind != "token" and "clamp" in self.model_fields_set and self.clamp is not None:
            raise ValueError(
                f"clamp bounds a sampled-token ratio: it belongs to support {{token: ...}}, not to {self.support.kind}"
            )
        for score in self.expressions:
            gate = any(score is arm.gate for arm in self.divergence.arms)
            inner = any("entries" in part.reads for part in score.batch_parts())
            if "entries" in score.reads and (inner or not gate):
                raise ValueError(f"{score.spec} judges single entries of the vocabulary; it can only gate an arm")
        return self

    def _check_target(self) -> None:
        changes, kind = self.target.changes, self.divergence.kind
        if self.support.kind == "token" and changes - {"product"}:
            raise ValueError(
                f"target.{min(changes - {'product'})} needs whole distributions; it does not go with support "
                "{token: ...}, use `full` or {topk: K}"
            )
        if self.support.kind == "token" and changes and kind == "forward_kl":
            raise ValueError("k3 as a loss needs a normalised target, which a product from one token is not; use full")
        for name in ("label_mix", "label_boost"):
            if name in changes and (kind != "forward_kl" or self.support.kind not in ("full", "topk")):
                raise ValueError(
                    f"target.{name} stands for cross-entropy beside distillation only under divergence: forward_kl "
                    "with full or topk support; write a cross_entropy term beside this one instead"
                )
        if "decouple" in changes and (self.support.kind != "full" or not self.divergence.of_arms):
            raise ValueError("target.decouple splits a divergence with arms over full support")
        if "decouple" in changes and any(gate.constant is None for gate in self.divergence.gates):
            raise ValueError("target.decouple weighs label and rest by scores of its own; an arm takes no gate there")
        if "decouple" in changes and self.target.decouple and self.target.decouple.label_only and kind != "forward_kl":
            raise ValueError("decouple.label_only is a part of forward_kl")

    @property
    def unsaid(self) -> set[str]:
        """A resolved recipe must read back: clamp is refused where it would do nothing."""
        found = super().unsaid | (set() if self.support.kind == "token" else {"clamp"})
        return found if self.target.changes else found | {"target"}

    @property
    def few(self) -> Literal["topk", "draws"] | None:
        """Whether the teacher's likeliest tokens, or draws of it, are all that this reads of its distribution."""
        reads = set[str]().union(*(score.reads for score in self.expressions))
        support, kind = self.support, self.divergence.kind
        if self.target.changes or reads & {"distributions", "entries"} or kind in ("rank", "preference"):
            return None
        if support.kind == "draws":
            return "draws"
        return "topk" if support.kind == "topk" and support.of == "teacher" else None

    @property
    def expressions(self) -> list[Score]:
        """Every score expression of the term."""
        target, decouple = self.target, self.target.decouple
        found = [self.scale, target.teacher_temperature, target.student_temperature, target.label_mix]
        found += [] if decouple is None else [decouple.label, decouple.rest]
        return [score for score in [*found, *self.divergence.gates] if score is not None]


def _compare(config: DistillConfig, tokens: Tokens, logp: Tensor, logq: Tensor) -> tuple[Tensor, Covered]:
    """Divergence of the transformed distributions over the support, and what the support covered."""

    def gate_of(gate: Score, logx: Tensor, logy: Tensor) -> Tensor | float:
        if "entries" in gate.reads:
            # Entry gates look at the outcomes as the support left them.
            return gate(replace(tokens, logp_CV=logx, logq_CV=logy))
        return gate(tokens)

    if config.divergence.kind == "rank":
        assert tokens.token_C is not None
        assert config.support.k is not None
        return listwise(logp, logq, tokens.token_C, config.support.k)
    if config.support.kind == "draws":
        assert tokens.uniform_CK is not None
        drawn = drawn_forward_kl(config.support, logp, logq, tokens.uniform_CK)
        return (draw_weights(config.support, logp, drawn) * (finite(drawn.logp) - finite(drawn.logq))).sum(-1), drawn
    covered = cover(config.support, logp, logq)
    return divergence_of(config.divergence, covered.logp, covered.logq, tokens.moment, gate_of), covered


def _from_few(config: DistillConfig, few: Few, tokens: Tokens, logq_CV: Tensor) -> tuple[Tensor, Covered]:
    """The divergence from a teacher that gives some outcomes alone."""
    if few.weight_NK is not None:
        logq_CK = logq_CV.gather(-1, few.ids_NK)
        loss = (few.weight_NK * (finite(few.logp_NK) - finite(logq_CK))).sum(-1)
        real = few.weight_NK > 0
        return loss, Covered(few.logp_NK, logq_CK, *((x.detach().exp() * real).sum(-1) for x in (few.logp_NK, logq_CK)))
    covered = cover_few(config.support, few, logq_CV)
    gated = divergence_of(config.divergence, covered.logp, covered.logq, tokens.moment, lambda gate, p, q: gate(tokens))
    return gated, covered


def _decoupled(config: DistillConfig, tokens: Tokens, logp: Tensor, logq: Tensor) -> Tensor:
    decouple, moment = config.target.decouple, tokens.moment
    assert decouple is not None
    assert tokens.token_C is not None
    two_p, rest_p, _ = label_and_rest(logp, tokens.token_C)
    two_q, rest_q, _ = label_and_rest(logq, tokens.token_C)
    if decouple.label_only:
        two = two_p[:, 0].exp() * (finite(two_p[:, 0]) - finite(two_q[:, 0]))
    else:
        two = divergence_of(config.divergence, two_p, two_q, moment)
    rest = divergence_of(config.divergence, rest_p, rest_q, moment)
    return column(decouple.label(tokens), two) * two + column(decouple.rest(tokens), rest) * rest


def distribution_loss(config: DistillConfig, tokens: Tokens, logq_CV: Tensor) -> Tensor:
    """Divergence, teacher mass and student mass covered, `[C, 3]`, over `full`, `topk` or `draws` support."""
    if tokens.few is not None:
        loss, covered = _from_few(config, tokens.few, tokens, logq_CV)
        loss = column(config.scale(tokens), loss) * loss
        return torch.stack([loss, covered.mass_p.to(loss.dtype), covered.mass_q.to(loss.dtype)], -1)
    logp, logq = teacher_view(config.target, tokens), student_view(config.target, tokens, logq_CV)
    if config.target.decouple is not None:
        loss, one = _decoupled(config, tokens, logp, logq), torch.ones_like(logq[:, 0])
        mass_p = mass_q = one
    else:
        loss, covered = _compare(config, tokens, logp, logq)
        mass_p, mass_q = covered.mass_p, covered.mass_q
    factor = rescaling(config.target, tokens, loss)
    scale = column(config.scale(tokens), loss)
    return torch.stack([scale * factor * loss, mass_p.to(loss.dtype), mass_q.to(loss.dtype)], -1)


@TERMS.add("distill")
class Distill(Term[DistillConfig]):
    """Divergence to the teacher at every kept token, over the vocabulary or from the sampled token."""

    name, family, Config = "distill", "kd", DistillConfig

    @property
    def needs(self) -> Needs:
        """Teacher log-probs of the sampled tokens, or its distribution; the initial student's under a product."""
        need = "token" if self.config.support.kind == "token" else "distribution"
        few = self.config.few
        count = (self.config.support.k or self.config.support.n or 0) if few else 0
        return Needs(
            teacher=need, few=few, few_count=count, reference=None if self.config.target.product is None else need
        )

    @property
    def expressions(self) -> list[Score]:
        """Every score that the term evaluates."""
        return self.config.expressions

    @property
    def draws(self) -> int:
        """Random numbers per token."""
        return self.config.support.n or 0

    def keep(self, last_N: Tensor) -> Tensor | None:
        """All but the final token of a finished response under skip_eos."""
        return ~last_N if self.config.skip_eos else None

    def compare(self, tokens: Tokens, logq_CV: Tensor) -> Tensor:
        """Divergence and covered masses `[C, 3]` of one chunk."""
        return distribution_loss(self.config, tokens, logq_CV)

    def loss(self, view: TokenView) -> Tensor:
        """The divergence, or the sampled-token estimate times sg(pi_theta/pi_old) on stale samples."""
        if self.config.support.kind != "token":
            assert view.divergence_N is not None
            return view.divergence_N
        assert view.teacher_N is not None
        target_N = sampled_target(self.config.target, view.teacher_N, view.reference_N, view.moment)
        rho_N = importance_ratio(view.logq_N, view.old_N)
        return token_loss(self.config.support, view.logq_N, target_N, self.config.clamp, rho_N)
