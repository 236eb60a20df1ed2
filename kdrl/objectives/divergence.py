"""Divergences between a teacher p and a student q over the last axis, in log-space.

One family: up to two arms D_{alpha,beta}(X||Y) over p, q and an assistant r between them, each with a gate; beside it
total variation, pairwise logit differences and a two-entry preference. Ranking is in `support`, which orders tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdrl.objectives.logspace import LOG_FLOOR, finite, relative_entropy
from kdrl.objectives.schedules import START, Moment
from kdrl.objectives.scores import Score
from kdrl.objectives.specs import ArmNow, AssistantNow, Divergence

# An exponent this near to zero is taken as zero (a power mean as the geometric one): rounding grows as its inverse.
NEAR_ZERO = 1.0e-4
# Two exponents below this are both taken as zero: there rounding grows as the inverse of their product.
BOTH_NEAR_ZERO = 3.0e-3

# fn(gate, log p, log q) -> its value [...] or [..., V]: how an arm's gate is evaluated.
GateOf = Callable[[Score, Tensor, Tensor], "Tensor | float"]


def alpha_beta_entries(logx: Tensor, logy: Tensor, alpha: float, beta: float) -> Tensor:
    """Entries `[..., V]` of D_{alpha,beta}(X||Y), whose sum is the divergence (ABKD, 2505.04560), alpha, beta >= 0.

    (1, 0) is KL(X||Y) and (0, 1) KL(Y||X), as bare x log(x/y); at other zero exponents it is the limit.
    """
    alpha, beta = (0.0 if exponent < NEAR_ZERO else exponent for exponent in (alpha, beta))
    if (alpha, beta) == (1.0, 0.0):
        return logx.exp() * (logx - logy)
    if (alpha, beta) == (0.0, 1.0):
        return logy.exp() * (logy - logx)
    if max(alpha, beta) < BOTH_NEAR_ZERO:
        return 0.5 * (logx - logy).square()
    if beta == 0.0 or alpha == 0.0:
        # D_{a,0} = sum x^a (a log x/y) - x^a + y^a, over a^2; D_{0,b} the same with x and y exchanged.
        a, logx, logy = (alpha, logx, logy) if beta == 0.0 else (beta, logy, logx)
        xa, ya = (a * logx).exp(), (a * logy).exp()
        return (xa * a * (logx - logy) - xa + ya) / (a * a)
    both = alpha + beta
    cross = (alpha * logx + beta * logy).exp()
    return -(cross - alpha / both * (both * logx).exp() - beta / both * (both * logy).exp()) / (alpha * beta)


def assistant(spec: AssistantNow, logp: Tensor, logq: Tensor) -> Tensor:
    """log r of the power mean M_{a,share}(p, q), normalised (AMiD, 2510.15982)."""
    logq = logq.detach() if spec.detach else logq
    if spec.share in (0.0, 1.0):
        logr = logp if spec.share else logq
    else:
        k, more, less = (1.0 - spec.a) / 2.0, math.log(spec.share), math.log1p(-spec.share)
        if abs(k) < NEAR_ZERO:
            logr = spec.share * logp + (1.0 - spec.share) * logq
        else:
            logr = torch.logaddexp(more + k * logp, less + k * logq) / k
    if spec.a == -1.0 and spec.power == 1.0:
        return logr  # the mean of two distributions is one
    return (spec.power * logr).log_softmax(-1)


def _ungated(gate: Score, logp: Tensor, logq: Tensor) -> Tensor | float:
    if gate.constant is None:
        raise TypeError("this divergence has a gate, and a gate needs tokens")
    return gate.constant


def arms_of(
    arms: list[ArmNow], between: AssistantNow | None, logp: Tensor, logq: Tensor, gate_of: GateOf = _ungated
) -> Tensor:
    """Sum of the arms, teacher `logp` and student `logq` `[..., V]` to `[...]`."""
    sides = {"p": logp, "q": logq}
    if between is not None:
        sides["r"] = assistant(between, finite(logp), finite(logq))
    total = logq.new_zeros(logq.shape[:-1])
    for arm in arms:
        x, y = sides[arm.x], sides[arm.y]
        if arm.gate is None and (arm.alpha, arm.beta) in ((1.0, 0.0), (0.0, 1.0)):
            value = relative_entropy(x, y) if arm.alpha else relative_entropy(y, x)
        else:
            value = _arm(arm, finite(x), finite(y), lambda gate: gate_of(gate, finite(logp), finite(logq)))
        total = total + arm.weight * value
    return total


def _arm(arm: ArmNow, x: Tensor, y: Tensor, gate_of: Callable[[Score], Tensor | float]) -> Tensor:
    entries = alpha_beta_entries(x, y, arm.alpha, arm.beta)
    if arm.gate is None:
        return entries.sum(-1)
    gate = torch.as_tensor(gate_of(arm.gate), dtype=entries.dtype, device=entries.device).detach()
    return (gate * entries).sum(-1) if gate.dim() == entries.dim() else gate * entries.sum(-1)


def total_variation(logp: Tensor, logq: Tensor) -> Tensor:
    """Half the sum of |p - q| (f-DISTILL, 2307.15190)."""
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def pair_differences(weights: tuple[str, str], logp: Tensor, logq: Tensor) -> Tensor:
    """Half the weighted sum over x, y of (d_x - d_y)^2, d = log q - log p (CSD, 2509.25837); the weights are data.

    Over part of the vocabulary the weights are normalised there. Uniform ones give the variance of d.
    """
    neither = torch.isneginf(logp) & torch.isneginf(logq)
    logp, logq = finite(logp), finite(logq)
    d = logq - logp
    of = {"teacher": logp, "student": logq.detach(), "uniform": torch.zeros_like(d).masked_fill(neither, LOG_FLOOR)}
    one, two = (of[name].softmax(-1) for name in weights)
    # Centred where the cross term vanishes; it also keeps the digits of a small spread around a large mean.
    squares = (d - (two * d).sum(-1, keepdim=True)).square()
    return 0.5 * ((one + two) * squares).sum(-1)


def preference(beta: float, logp: Tensor, logq: Tensor) -> Tensor:
    """-log sigmoid(beta ((log q_c - log q_r) - (log p_c - log p_r))), c the teacher's argmax, r the student's (DPKD).

    As released with 2406.19774; log 2 at p = q, where c = r and there is no gradient.
    """
    logp, logq = finite(logp), finite(logq)
    chosen, rejected = logp.argmax(-1, keepdim=True), logq.argmax(-1, keepdim=True)
    margin = (logq.gather(-1, chosen) - logq.gather(-1, rejected)) - (
        logp.gather(-1, chosen) - logp.gather(-1, rejected)
    )
    return -torch.nn.functional.logsigmoid(beta * margin.squeeze(-1))


def divergence_of(
    spec: Divergence, logp: Tensor, logq: Tensor, moment: Moment = START, gate_of: GateOf = _ungated
) -> Tensor:
    """The divergence that `spec` names at a moment of a run, log-probs `[..., V]` to `[...]`."""
    if spec.of_arms:
        return arms_of(*spec.now(moment), logp, logq, gate_of)
    if spec.kind == "tv":
        return total_variation(logp, logq)
    if spec.kind == "pair":
        assert spec.weights is not None
        return pair_differences(spec.weights, logp, logq)
    assert spec.kind == "preference", spec.kind
    assert spec.beta is not None
    return preference(spec.beta.at(moment), logp, logq)
