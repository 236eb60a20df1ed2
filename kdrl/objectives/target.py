"""What is done to teacher and student before they are compared: temperatures, powers, the label, a product.

In this order: product with the initial student, standardised logits, temperature, power, label boost, label mix.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdrl.config import Config
from kdrl.objectives.base import ScheduleField
from kdrl.objectives.logspace import finite
from kdrl.objectives.schedules import Moment
from kdrl.objectives.scores import ScoreField, Tokens, column


class Decouple(Config):
    """The label against all others, and the others among themselves, each with its own weight (DKD, 2203.08679)."""

    label: ScoreField
    """Weight of the two-outcome part (y or not y)."""
    rest: ScoreField
    """Weight of the part over the other tokens, renormalised; (1 - p_y) in the plain divergence, free here."""
    label_only: bool = False
    """Keep of the two-outcome part only the label's own -p_y log q_y (NKD, 2303.13005)."""


class Target(Config):
    """Transforms of the teacher's and the student's distribution; nothing is changed by default."""

    teacher_temperature: ScoreField | None = None
    """Softmax temperature of the teacher in the loss instead of rollout.temperature; a number, schedule or score."""
    student_temperature: ScoreField | None = None
    """Softmax temperature of the student in the loss instead of rollout.temperature."""
    rescale: bool = False
    """Multiply the loss by teacher_temperature x student_temperature, Hinton's T^2."""
    power: ScheduleField | None = None
    """gamma in p^gamma, normalised: a teacher temperature of 1/gamma (TTM, 2402.11148)."""
    standardise: bool = False
    """Give both sides' logits mean 0 and standard deviation 1 over the vocabulary first."""
    label_mix: ScoreField | None = None
    """rho in (1 - rho) p + rho e_y; a number, schedule or score (Bridge-Garden 2605.26246, PS-KD, MFT)."""
    label_boost: float | None = Field(default=None, gt=0.0)
    """epsilon in the target (p + e_y)^epsilon - e_y (OFA-KD); it is no distribution, so forward_kl only."""
    product: ScheduleField | None = None
    """eta in ref^(1-eta) p^eta, ref the initial student; above 1 it goes beyond the teacher (G-OPD, 2602.12125)."""
    decouple: Decouple | None = None
    """Weigh label and other tokens apart: {label: 1, rest: 8}."""

    @model_validator(mode="after")
    def _check(self) -> Target:
        if self.rescale and self.teacher_temperature is None and self.student_temperature is None:
            raise ValueError("rescale multiplies by the temperatures, and none is given")
        if self.label_mix is not None and self.student_temperature is not None:
            raise ValueError(
                "a label mixed into the target is cross-entropy plus distillation only while the student's temperature "
                "is 1; write a cross_entropy term of its own beside this one"
            )
        if self.label_mix is not None and self.label_boost is not None:
            raise ValueError("label_mix and label_boost both put the label into the target; choose one")
        return self

    @property
    def changes(self) -> set[str]:
        """Which transforms are on."""
        return {name for name in type(self).model_fields if getattr(self, name) not in (None, False)}


def _temper(logits: Tensor, scale: Tensor | float) -> Tensor:
    """log softmax of logits times a positive number or `[C]`."""
    scale = scale[:, None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale
    return (finite(logits) * scale).log_softmax(-1)


def _standardise(logp_CV: Tensor) -> Tensor:
    """Logits of mean 0 and standard deviation 1 over the tokens that are not ruled out."""
    real = ~torch.isneginf(logp_CV)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(real, logp_CV, 0.0).sum(-1, keepdim=True) / count
    centred = torch.where(real, logp_CV - mean, 0.0)
    spread = (centred.square().sum(-1, keepdim=True) / count + 1e-12).sqrt()
    return torch.where(real, centred / spread, -torch.inf)


def teacher_view(target: Target, tokens: Tokens) -> Tensor:
    """log p~ `[C, V]` of the transformed teacher."""
    logp_CV, _ = tokens.both()
    if target.product is not None:
        assert tokens.reference_CV is not None
        eta = target.product.at(tokens.moment)
        logp_CV = (eta * finite(logp_CV) + (1.0 - eta) * finite(tokens.reference_CV)).log_softmax(-1)
    if target.standardise:
        logp_CV = _standardise(logp_CV)
    if target.teacher_temperature is not None:
        logp_CV = _temper(logp_CV, tokens.temperature / column(target.teacher_temperature(tokens), logp_CV))
    elif target.standardise:
        logp_CV = logp_CV.log_softmax(-1)
    if target.power is not None:
        logp_CV = _temper(logp_CV, target.power.at(tokens.moment))
    if target.label_boost is not None or target.label_mix is not None:
        logp_CV = _with_label(target, tokens, logp_CV)
    return logp_CV


def _with_label(target: Target, tokens: Tokens, logp_CV: Tensor) -> Tensor:
    assert tokens.token_C is not None
    label_C1 = tokens.token_C[:, None]
    label_p = logp_CV.gather(-1, label_C1).exp()
    if target.label_boost is not None:
        boosted = ((1.0 + label_p) ** target.label_boost - 1.0).clamp(min=1e-30).log()
        return (target.label_boost * finite(logp_CV)).scatter(-1, label_C1, boosted)
    assert target.label_mix is not None
    rho = column(target.label_mix(tokens), logp_CV).clamp(0.0, 1.0)
    rho_C1 = rho.expand(len(label_C1))[:, None]
    mixed = finite(logp_CV) + torch.log1p(-rho_C1)
    return finite(mixed).scatter(-1, label_C1, ((1.0 - rho_C1) * label_p + rho_C1).log())


def student_view(target: Target, tokens: Tokens, logq_CV: Tensor) -> Tensor:
    """log q~ `[C, V]` of the transformed student, with gradient."""
    if target.standardise:
        logq_CV = _standardise(logq_CV)
    if target.student_temperature is not None:
        return _temper(logq_CV, tokens.temperature / column(target.student_temperature(tokens), logq_CV))
    return logq_CV.log_softmax(-1) if target.standardise else logq_CV


def rescaling(target: Target, tokens: Tokens, like: Tensor) -> Tensor | float:
    """Teacher temperature times student temperature under `rescale`, else 1."""
    if not target.rescale:
        return 1.0
    temperatures = (target.teacher_temperature, target.student_temperature)
    one, two = (tokens.temperature if t is None else column(t(tokens), like) for t in temperatures)
    return one * two


def sampled_target(target: Target, logp_N: Tensor, reference_N: Tensor | None, moment: Moment) -> Tensor:
    """log p~ of sampled tokens, of which only a product can be had; its normaliser is left out.

    That is a constant of the state, which the expected gradient of an estimator does not see.
    """
    if target.product is None:
        return logp_N
    assert reference_N is not None
    eta = target.product.at(moment)
    return eta * logp_N + (1.0 - eta) * reference_N


def label_and_rest(logp_CV: Tensor, token_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y and log(1 - p_y) `[C, 2]`, log of the others renormalised `[C, V-1]`, and log(1 - p_y) `[C]`."""
    label_C1 = logp_CV.gather(-1, token_C[:, None])
    size = logp_CV.shape[-1]
    others = torch.arange(size - 1, device=logp_CV.device).expand(len(token_C), -1)
    rest_CV = finite(logp_CV.gather(-1, others + (others >= token_C[:, None])))
    mass_C1 = rest_CV.logsumexp(-1, keepdim=True)
    return torch.cat([label_C1, mass_C1], -1), rest_CV - mass_C1, mass_C1.squeeze(-1)
