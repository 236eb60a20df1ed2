"""The distillation term: a divergence from a frozen teacher at every kept token."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from kdrl.batch import Origin
from kdrl.objectives.base import TERMS, Needs, Term, TermConfig, TokenView
from kdrl.objectives.divergence import divergence_of
from kdrl.objectives.estimators import importance_ratio, token_loss
from kdrl.objectives.specs import Divergence, Support, refuse_untaught
from kdrl.objectives.support import bucket, teacher_topk


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
    on: tuple[Origin, ...] = ("student", "gold", "teacher", "buffer", "speculative", "mixed", "corrupt")
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""

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
