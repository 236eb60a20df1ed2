"""Terms without a teacher beside the policy gradient: likelihood of a text, the leash, the entropy bonus."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from kdrl.batch import Origin
from kdrl.objectives.base import TERMS, Needs, Term, TermConfig, TokenView
from kdrl.objectives.estimators import importance_ratio, token_loss
from kdrl.objectives.specs import Support


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
