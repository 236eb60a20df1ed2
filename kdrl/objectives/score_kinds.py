"""The scores that come with kdrl. p is the teacher, q the student, y the response's token; entropies in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrl.objectives.logspace import entropy, finite
from kdrl.objectives.scores import Tokens, register_score


@register_score("max_p")
def max_p(tokens: Tokens) -> Tensor:
    """The teacher's largest probability (CAKLD, 2402.10631; Bridge-Garden, 2605.26246)."""
    return tokens.both()[0].amax(-1).exp()


@register_score("max_q")
def max_q(tokens: Tokens) -> Tensor:
    """The student's largest probability."""
    return tokens.both()[1].amax(-1).exp()


@register_score("entropy_p")
def entropy_p(tokens: Tokens) -> Tensor:
    """The teacher's entropy (EOPD, 2603.07079)."""
    return entropy(tokens.both()[0])


@register_score("relative_entropy_p")
def relative_entropy_p(tokens: Tokens) -> Tensor:
    """The teacher's entropy as a share of log V."""
    logp = tokens.both()[0]
    return entropy(logp) / math.log(max(2, logp.shape[-1]))


@register_score("entropy_q", reads="student", verdicts=False)
def entropy_q(tokens: Tokens) -> Tensor:
    """The student's entropy."""
    if tokens.logq_CV is not None:
        return entropy(tokens.logq_CV.detach())
    assert tokens.entropy_C is not None
    return tokens.entropy_C.detach()


@register_score("entropy_gap")
def entropy_gap(tokens: Tokens) -> Tensor:
    """H(p) - H(q) (BD-KD, 2212.12965)."""
    logp, logq = tokens.both()
    return entropy(logp) - entropy(logq)


@register_score("head_gap")
def head_gap(tokens: Tokens, mu: float = 0.5) -> Tensor:
    """Share of sum |p - q| in the teacher's head, the fewest likeliest tokens of mass >= mu (AKL, 2404.02657)."""
    logp, logq = tokens.both()
    p, order = logp.exp().sort(-1, descending=True)
    gap = (p - logq.exp().gather(-1, order)).abs()
    head = (p.cumsum(-1) - p) < mu
    inside, total = (gap * head).sum(-1), gap.sum(-1)
    return torch.where(total > 0, inside / total.clamp(min=1e-30), 0.5)


@register_score("forward_kl")
def score_forward_kl(tokens: Tokens) -> Tensor:
    """KL(p||q)."""
    logp, logq = (finite(x) for x in tokens.both())
    return (logp.exp() * (logp - logq)).sum(-1)


@register_score("reverse_kl")
def score_reverse_kl(tokens: Tokens) -> Tensor:
    """KL(q||p) (AdaKD's token difficulty, 2510.11615)."""
    logp, logq = (finite(x) for x in tokens.both())
    return (logq.exp() * (logq - logp)).sum(-1)


@register_score("disagreement")
def disagreement(tokens: Tokens) -> Tensor:
    """Total variation of teacher and student, 0 to 1."""
    logp, logq = tokens.both()
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


@register_score("top_k_hit")
def top_k_hit(tokens: Tokens, k: float = 5) -> Tensor:
    """1 where the student's likeliest token is among the teacher's k likeliest (SelecTKD, 2510.24021)."""
    logp, logq = tokens.both()
    best = logp.gather(-1, logq.argmax(-1, keepdim=True))
    return ((logp > best).sum(-1) < k).to(logp.dtype)


@register_score("power_sum_p")
def power_sum_p(tokens: Tokens, gamma: float = 0.2) -> Tensor:
    """Sum of p^gamma (WTTM's weight, 2402.11148)."""
    return (gamma * tokens.both()[0]).logsumexp(-1).exp()


@register_score("mft")
def mft(tokens: Tokens, tau: float = 0.2) -> Tensor:
    """(max p - p_y + tau) / (1 + max p - p_y), the least label mix that lifts y above the rest (MFT, 2506.15702)."""
    logp = tokens.both()[0]
    assert tokens.token_C is not None
    gap = logp.amax(-1).exp() - logp.gather(-1, tokens.token_C[:, None]).squeeze(-1).exp()
    return ((gap + tau) / (1.0 + gap)).clamp(0.0, 1.0)


@register_score("sigmoid_log_ratio", reads="entries")
def sigmoid_log_ratio(logp: Tensor, logq: Tensor) -> Tensor:
    """p / (p + q) of every entry (ToDi, 2505.16297)."""
    return torch.sigmoid(finite(logp) - finite(logq))


@register_score("sigmoid_log_ratio_q", reads="entries")
def sigmoid_log_ratio_q(logp: Tensor, logq: Tensor) -> Tensor:
    """q / (p + q) of every entry (ToDi's other arm)."""
    return torch.sigmoid(finite(logq) - finite(logp))


@register_score("label_p", reads="teacher")
def label_p(tokens: Tokens) -> Tensor:
    """The teacher's probability of the token."""
    assert tokens.logp_C is not None
    return tokens.logp_C.detach().exp()


@register_score("label_q", reads="student", verdicts=False)
def label_q(tokens: Tokens) -> Tensor:
    """The student's probability of the token."""
    return tokens.logq_C.detach().exp()


@register_score("ce_p", reads="teacher")
def ce_p(tokens: Tokens) -> Tensor:
    """-log p(y), the teacher's surprise."""
    assert tokens.logp_C is not None
    return -finite(tokens.logp_C.detach())


@register_score("ce_q", reads="student", verdicts=False)
def ce_q(tokens: Tokens) -> Tensor:
    """-log q(y), the student's surprise."""
    return -finite(tokens.logq_C.detach())


@register_score("log_ratio", reads="teacher")
def log_ratio(tokens: Tokens) -> Tensor:
    """R = log p(y) - log q(y)."""
    assert tokens.logp_C is not None
    return finite(tokens.logp_C.detach()) - finite(tokens.logq_C.detach())


@register_score("density_ratio", reads="teacher")
def density_ratio(tokens: Tokens, power: float = 1.0, mix: float = 0.0) -> Tensor:
    """(r / (1 - mix + mix r))^power with r = p(y)/q(y): f-distill's h = f''(r) r^2 up to a constant (2502.15681).

    1 and 0 give forward KL's r, mix 0.5 Jensen-Shannon's 2r/(1+r), power 0.5 Hellinger's, mix 1 reverse KL's 1;
    log r is held within 30.
    """
    log_r_C = log_ratio(tokens).clamp(-30.0, 30.0)
    return (power * (log_r_C - torch.log1p(mix * log_r_C.expm1()))).exp()


@register_score("position", reads="data", verdicts=False)
def position(tokens: Tokens) -> Tensor:
    """Place of the token in its response, from 0 at the first to 1 after the last."""
    return tokens.of("index") / tokens.of("length").clamp(min=1)


@register_score("length", reads="data", verdicts=False)
def length(tokens: Tokens) -> Tensor:
    """Tokens of the response."""
    return tokens.of("length")


@register_score("reward", reads="data")
def reward(tokens: Tokens) -> Tensor:
    """The response's reward."""
    return tokens.of("reward")


@register_score("correct", reads="data")
def correct(tokens: Tokens) -> Tensor:
    """1 where the verifier accepts the response."""
    return tokens.of("correct")


@register_score("group_rate", reads="data")
def group_rate(tokens: Tokens) -> Tensor:
    """Share of right responses in the group."""
    return tokens.of("group_rate")


@register_score("dads", reads="data")
def dads(tokens: Tokens) -> Tensor:
    """1 - exp(-e x group_rate) on right responses of groups not all right, else 1 (APO's KL weight, 2506.21655)."""
    rate_C = tokens.of("group_rate")
    shaped = (tokens.of("correct") > 0) & (rate_C < 1.0)
    return torch.where(shaped, 1.0 - torch.exp(-math.e * rate_C), 1.0)


@register_score("stcr", reads="data")
def stcr(tokens: Tokens, base: float = 1.00001) -> Tensor:
    """2 - base^-d on wrong responses d tokens longer than their group's mean right one, else 1 (APO, 2506.21655)."""
    right_C = tokens.of("right_length")
    longer_C = (tokens.of("length") - right_C).clamp(min=0.0)
    shaped = (tokens.of("correct") <= 0) & (right_C > 0)
    return torch.where(shaped, 2.0 - torch.exp(-math.log(base) * longer_C), 1.0)


@register_score("signed", reads="data")
def signed(tokens: Tokens, right: float = 1.0, wrong: float = -1.0) -> Tensor:
    """`right` on right responses and `wrong` on wrong ones; a negative one pushes away (REDI, 2505.24850)."""
    number = tokens.logq_C.new_tensor
    return torch.where(tokens.of("correct") > 0, number(right), number(wrong))


@register_score("above", reads="data", verdicts=False)
def above(tokens: Tokens, of: Tensor, value: float) -> Tensor:
    """1 where the score exceeds `value`."""
    return (torch.as_tensor(of) > value).to(tokens.logq_C.dtype)


@register_score("below", reads="data", verdicts=False)
def below(tokens: Tokens, of: Tensor, value: float) -> Tensor:
    """1 where the score is below `value`."""
    return (torch.as_tensor(of) < value).to(tokens.logq_C.dtype)


@register_score("one_minus", reads="data", verdicts=False)
def one_minus(tokens: Tokens, of: Tensor) -> Tensor:
    """1 - the score."""
    return 1.0 - of


@register_score("choose", reads="data", verdicts=False)
def choose(tokens: Tokens, where: Tensor, then: float, otherwise: float) -> Tensor:
    """`then` where the score is above one half (or true), else `otherwise`."""
    number = tokens.logq_C.new_tensor
    return torch.where(torch.as_tensor(where) > 0.5, number(then), number(otherwise))


@register_score("affine", reads="data", verdicts=False)
def affine(tokens: Tokens, of: Tensor, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """scale x the score + offset; a weight b + (1-b) s is {affine: {of: s, scale: 1-b, offset: b}}."""
    return scale * of + offset


@register_score("times", reads="data", verdicts=False)
def times(tokens: Tokens, of: Tensor, by: Tensor) -> Tensor:
    """The product of two scores."""
    return of * by


@register_score("clip", reads="data", verdicts=False)
def clip(tokens: Tokens, of: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """The score held between `low` and `high`."""
    return torch.clamp(torch.as_tensor(of), low, high)


@register_score("top_share", reads="batch")
def top_share(values_N: Tensor, row_N: Tensor, share: float) -> Tensor:
    """1 on the `share` of the step's tokens with the highest score, ties included (ATKD, AdaKD)."""
    count = round(share * len(values_N))
    if count <= 0:
        return torch.zeros_like(values_N)
    return (values_N >= values_N.topk(min(count, len(values_N))).values[-1]).to(values_N.dtype)


@register_score("over_median", reads="batch")
def over_median(values_N: Tensor, row_N: Tensor, c: float = 0.5, base: float = 1.0) -> Tensor:
    """base exp(-c tanh(log(score / median))), below `base` on hard tokens (AdaKD's temperature, 2510.11615)."""
    if not len(values_N):
        return values_N
    ratio = values_N.clamp(min=1e-12) / values_N.median().clamp(min=1e-12)
    return base * torch.exp(-c * torch.tanh(ratio.log()))


@register_score("softmax", reads="batch")
def softmax(values_N: Tensor, row_N: Tensor, temperature: float = 10.0) -> Tensor:
    """Softmax of score/temperature over the tokens of each response, times their number (TSLD)."""
    rows = int(row_N.max()) + 1 if len(row_N) else 0
    scaled = (values_N / temperature).double()
    top = scaled.new_full((rows,), -torch.inf).scatter_reduce(0, row_N, scaled, "amax")
    weight = (scaled - top[row_N]).exp()
    total = weight.new_zeros(rows).index_add(0, row_N, weight)
    count = torch.bincount(row_N, minlength=rows).to(weight.dtype)
    return (weight / total[row_N] * count[row_N]).to(values_N.dtype)


@register_score("mean_one", reads="batch")
def mean_one(values_N: Tensor, row_N: Tensor) -> Tensor:
    """The score divided by its mean over the step, so that a weight changes no learning rate."""
    mean = values_N.mean() if len(values_N) else values_N.sum()
    return torch.where(mean != 0, values_N / mean, values_N)


@register_score("early", reads="batch")
def early(values_N: Tensor, row_N: Tensor, gamma: float = 0.5) -> Tensor:
    """1 + gamma (1 - sum of |score| up to the token / sum over its response) (IW-OPD, 2606.22600)."""
    rows = int(row_N.max()) + 1 if len(row_N) else 0
    size = values_N.abs().double()
    total = size.new_zeros(rows).index_add(0, row_N, size)
    running = size.cumsum(0)
    before = torch.cat([total.new_zeros(1), total.cumsum(0)])[:-1]
    share = (running - before[row_N]) / total[row_N].clamp(min=1e-30)
    return (1.0 + gamma * (1.0 - share)).to(values_N.dtype)
