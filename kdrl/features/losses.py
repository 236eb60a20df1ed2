"""Losses between features of student and teacher: tensors in, one loss per token out. The teacher's are data.

Vectors are `[T, D]`, maps `[H, T, K]` of scores with the keys that count, bool `[T, K]`. What compares tokens with
each other does so within one response. Left out: negatives from other responses, learned critics.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from kdrl.features.config import Feature, FeatureLoss

VectorLoss = Callable[[Tensor, Tensor, FeatureLoss], Tensor]


def mse(student_TD: Tensor, teacher_TD: Tensor, spec: FeatureLoss) -> Tensor:
    """Mean squared difference over the width (TinyBERT, 1909.10351)."""
    return (student_TD - teacher_TD).square().mean(-1)


def smooth_l1(student_TD: Tensor, teacher_TD: Tensor, spec: FeatureLoss) -> Tensor:
    """Huber's loss of width 1, averaged over the width."""
    return smooth_l1_loss(student_TD, teacher_TD, reduction="none").mean(-1)


def cosine(student_TD: Tensor, teacher_TD: Tensor, spec: FeatureLoss) -> Tensor:
    """1 - cos of the two vectors."""
    return 1.0 - (normalize(student_TD, dim=-1) * normalize(teacher_TD, dim=-1)).sum(-1)


def norm_and_direction(student_TD: Tensor, teacher_TD: Tensor, centre_TD: Tensor) -> Tensor:
    """1 - s . c / (|c| max(|s|, |t|)): towards the class centre c, with a norm no smaller than t's (ND, 2305.17007).

    Not zero where student and teacher are equal, but where the student lies along c with at least the teacher's norm.
    """
    longest_T = torch.maximum(student_TD.norm(dim=-1), teacher_TD.norm(dim=-1)).clamp(min=1e-12)
    return 1.0 - (student_TD * normalize(centre_TD, dim=-1)).sum(-1) / longest_T


def _critic(student_TD: Tensor, teacher_TD: Tensor, temperature: float) -> Tensor:
    """f(s_i, t_j) = cos / temperature, `[T, T]` with students in rows."""
    return normalize(student_TD, dim=-1) @ normalize(teacher_TD, dim=-1).T / temperature


def infonce(student_TD: Tensor, teacher_TD: Tensor, spec: FeatureLoss) -> Tensor:
    """-log softmax of the right student token among those of the response, for each teacher token (CRD, 1910.10699).

    0 for a response of one token. The critic is the cosine over the temperature; there is no memory bank.
    """
    score_TT = _critic(student_TD, teacher_TD, spec.temperature)
    return score_TT.logsumexp(0) - score_TT.diagonal()


def mi_alpha(student_TD: Tensor, teacher_TD: Tensor, spec: FeatureLoss) -> Tensor:
    """Minus the alpha bound of mutual information (Poole 1905.06922, eq. 14; Distiller 2109.11105).

    With m(t) = mean_i e^f(s_i, t), b(t) = alpha m(t) + 1 - alpha, and m', b' without t's own student:
    -1 - f(s_t, t) + log b(t) + m'(t) / b'(t). The baseline q is 1 and the critic not learned (both differ from
    Distiller, which states neither). alpha = 1 is InfoNCE less log T; 0 for a response of one token.
    """
    score_TT = _critic(student_TD, teacher_TD, spec.temperature)
    count = len(score_TT)
    if count < 2:
        return score_TT.diagonal() * 0.0
    others_TT = score_TT.masked_fill(torch.eye(count, dtype=torch.bool, device=score_TT.device), -math.inf)
    mean_T = score_TT.logsumexp(0) - math.log(count)
    without_T = others_TT.logsumexp(0) - math.log(count - 1)
    joint_T = score_TT.diagonal() - _log_mix(mean_T, spec.alpha)
    return -1.0 - joint_T + (without_T - _log_mix(without_T, spec.alpha)).exp()


def _log_mix(log_T: Tensor, alpha: float) -> Tensor:
    """log(alpha e^x + 1 - alpha)."""
    if alpha == 1.0:
        return log_T
    rest = torch.full_like(log_T, math.log1p(-alpha))
    return rest if alpha == 0.0 else torch.logaddexp(log_T + math.log(alpha), rest)


def sinkhorn(student_TD: Tensor, teacher_TD: Tensor, spec: FeatureLoss) -> Tensor:
    """T sum_j P_ij (1 - cos(s_i, t_j)) under the smoothed optimal plan P (WCoRD's local loss, 2012.08674).

    P has equal marginals, comes from `iterations` rounds in log-space and is held fixed (the envelope's gradient). With
    smoothing the loss of equal features is above zero.
    """
    cost_TT = 1.0 - _critic(student_TD, teacher_TD, 1.0)
    with torch.no_grad():
        kernel_TT = -cost_TT / spec.entropy
        share = -math.log(len(cost_TT))
        row_T, column_T = torch.zeros_like(kernel_TT[:, 0]), torch.zeros_like(kernel_TT[0])
        for _ in range(spec.iterations):
            column_T = share - (kernel_TT + row_T[:, None]).logsumexp(0)
            row_T = share - (kernel_TT + column_T).logsumexp(1)
        plan_TT = (kernel_TT + row_T[:, None] + column_T).exp()
    return len(cost_TT) * (plan_TT * cost_TT).sum(1)


TOKEN_LOSSES: dict[str, VectorLoss] = {"mse": mse, "l1": smooth_l1, "cosine": cosine}
RESPONSE_LOSSES: dict[str, VectorLoss] = {"infonce": infonce, "mi_alpha": mi_alpha, "sinkhorn": sinkhorn}


def relation_scores(vectors_TD: Tensor, of: Feature) -> Tensor:
    """Products of every two tokens of a response, `[heads, T, T]`: cosines, or dot / sqrt(width of a head)."""
    cut_HTd = vectors_TD.unflatten(-1, (of.heads, -1)).transpose(0, 1)
    if of.scale == "cosine":
        cut_HTd = normalize(cut_HTd, dim=-1)
        return cut_HTd @ cut_HTd.transpose(-1, -2)
    return cut_HTd @ cut_HTd.transpose(-1, -2) / math.sqrt(cut_HTd.shape[-1])


def relation_loss(student_TD: Tensor, teacher_TD: Tensor, of: Feature, spec: FeatureLoss) -> Tensor:
    """Loss between the relations of two sets of vectors, whose widths may differ.

    MiniLMv2 and AutoDistil (2012.15828, 2201.12507): queries, keys, values with kl and dot. LLaVA-KD (2410.16236):
    hidden with cosine. FAQD (2302.10899): hidden with mse. TRG (2306.12442): hidden with kl over neighbours.
    """
    student_HTT, teacher_HTT = relation_scores(student_TD, of), relation_scores(teacher_TD, of)
    counted_TT = torch.ones(teacher_HTT.shape[1:], dtype=torch.bool, device=teacher_HTT.device)
    if of.neighbours is not None:
        counted_TT = _nearest(teacher_HTT, of.neighbours)
    return map_loss(student_HTT, teacher_HTT, counted_TT, spec, softmax=spec.kind == "kl")


def _nearest(teacher_HTT: Tensor, count: int) -> Tensor:
    """The `count` other tokens with the largest product in the teacher, averaged over heads, bool `[T, T]`."""
    near_TT = teacher_HTT.mean(0).fill_diagonal_(-math.inf)
    count = min(count, len(near_TT) - 1)
    counted_TT = torch.zeros_like(near_TT, dtype=torch.bool)
    return counted_TT.scatter(1, near_TT.topk(count, dim=-1).indices, True)


def map_loss(
    student_HTK: Tensor, teacher_HTK: Tensor, counted_TK: Tensor, spec: FeatureLoss, *, softmax: bool
) -> Tensor:
    """Loss between rows over the keys that count, averaged over heads, `[T]`; 0 for a row without keys.

    `softmax` compares the rows' softmax, else the scores. `mse` and `l1` average over the keys; `kl` is
    KL(teacher || student) in nats.
    """
    empty_T = ~counted_TK.any(-1)
    counted_TK = counted_TK | empty_T[:, None]
    counts_T = counted_TK.sum(-1)
    if softmax:
        log_student, log_teacher = (
            (x / spec.temperature).masked_fill(~counted_TK, -math.inf).log_softmax(-1)
            for x in (student_HTK, teacher_HTK)
        )
        if spec.kind == "kl":
            gap = torch.where(counted_TK, log_teacher - log_student, 0.0)
            return torch.where(empty_T, 0.0, (log_teacher.exp() * gap).sum(-1).mean(0))
        student_HTK, teacher_HTK = log_student.exp(), log_teacher.exp()
    student_HTK, teacher_HTK = (torch.where(counted_TK, x, 0.0) for x in (student_HTK, teacher_HTK))
    if spec.kind == "cosine":
        loss_HT = cosine(student_HTK, teacher_HTK, spec)
    elif spec.kind == "l1":
        loss_HT = smooth_l1_loss(student_HTK, teacher_HTK, reduction="none").sum(-1) / counts_T
    else:
        loss_HT = (student_HTK - teacher_HTK).square().sum(-1) / counts_T
    return torch.where(empty_T, 0.0, loss_HT.mean(0))
