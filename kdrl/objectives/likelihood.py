"""Terms without a teacher beside the policy gradient: likelihood of a text, the leash, the entropy bonus."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdrl.batch import Origin
from kdrl.config import Config
from kdrl.objectives.base import TERMS, Needs, Term, TermConfig, TokenView
from kdrl.objectives.estimators import importance_ratio, token_loss
from kdrl.objectives.logspace import finite
from kdrl.objectives.support_specs import Support


class CrossEntropyConfig(TermConfig):
    """Maximum likelihood of a text."""

    on: tuple[Origin, ...] = ("gold", "teacher")
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""


@TERMS.add("cross_entropy")
class CrossEntropy(Term[CrossEntropyConfig]):
    """Negative log-likelihood of gold or teacher text (SFT; SeqKD 1606.07947)."""

    name, Config = "cross_entropy", CrossEntropyConfig

    def loss(self, view: TokenView) -> Tensor:
        """-log q of each token in nats."""
        return -view.logq_N


class RewardPower(Config):
    """The exponent phi of the reference by verdict: pi_ref^phi, flatter below 1 and sharper above (2510.03865)."""

    right: float = Field(default=1.0, gt=0.0)
    """phi on responses that the verifier accepts."""
    wrong: float = Field(default=1.0, gt=0.0)
    """phi on responses that it rejects."""


class ReferenceKLConfig(TermConfig):
    """A leash to the policy that training started from."""

    direction: Literal["reverse", "forward"] = "reverse"
    """`reverse` is KL(policy||reference), `forward` KL(reference||policy), which keeps all that the reference does."""
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """Estimate of the reverse KL, each in its sound placement: k1 advantage, k2 loss, k3 straight-through."""
    clamp: float | None = Field(default=10.0, gt=0.0)
    """Bound on the log-ratio inside the gradient's coefficient; null for none."""
    power: RewardPower | None = None
    """{right: a, wrong: b}: temper the reference by the verdict (RAPO, 2510.03865); direction forward only."""

    @model_validator(mode="after")
    def _check(self) -> ReferenceKLConfig:
        if self.direction == "forward" and "estimator" in self.model_fields_set:
            raise ValueError("estimator chooses among those of the reverse KL; the forward one has a single estimate")
        if self.direction == "reverse" and self.power is not None:
            raise ValueError("power tempers the reference of `direction: forward`; set that, or leave power out")
        return self

    @property
    def unsaid(self) -> set[str]:
        """A resolved recipe must read back: estimator is refused where it chooses nothing."""
        return super().unsaid | ({"estimator"} if self.direction == "forward" else set())


def forward_estimate(logq: Tensor, log_reference: Tensor, clamp: float | None) -> Tensor:
    """u log u - u + 1 with u = reference/q on samples of q, given the gradient (1 - u) grad log q of KL(reference||q).

    Differentiating the value itself would descend E_reference[(log u)^2] / 2 instead. Where the reference sums to Z
    and not to 1, the gradient is Z times that of the normalised one's KL. The clamp bounds log u.
    """
    log_u = finite(log_reference.detach()) - logq.detach()
    log_u = log_u if clamp is None else log_u.clamp(-clamp, clamp)
    u = log_u.exp()
    return u * log_u - u + 1.0 + (1.0 - u) * (logq - logq.detach())


@TERMS.add("reference_kl")
class ReferenceKL(Term[ReferenceKLConfig]):
    """KL to or from the frozen initial student, estimated on the student's own samples; off unless listed."""

    name, Config = "reference_kl", ReferenceKLConfig

    @property
    def needs(self) -> Needs:
        """Log-probs of the sampled tokens under the initial student, and rewards where they temper it."""
        return Needs(reference="token", rewards=self.config.power is not None)

    def loss(self, view: TokenView) -> Tensor:
        """The chosen estimate per token."""
        assert view.reference_N is not None
        config = self.config
        rho_N = importance_ratio(view.logq_N, view.old_N)
        if config.direction == "reverse":
            support = Support.model_validate({"token": config.estimator})
            return token_loss(support, view.logq_N, view.reference_N, config.clamp, rho_N)
        log_reference_N = view.reference_N
        if config.power is not None:
            log_reference_N = torch.where(
                view.correct_N, config.power.right * log_reference_N, config.power.wrong * log_reference_N
            )
        loss_N = forward_estimate(view.logq_N, log_reference_N, config.clamp)
        return loss_N if rho_N is None else rho_N * loss_N


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
