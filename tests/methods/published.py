"""The loss of every distillation method, from its formula, in plain numpy: nothing here comes from kdrl.

Each function takes a `Step` and the student's logits `[N, V]`, real or complex, and gives the step's loss; what the
method takes as data is made real first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .numerics import (
    GAMMA,
    SHARE,
    TAID,
    Array,
    Loss,
    Step,
    absolute,
    alpha_beta,
    by,
    ce,
    entropy,
    js,
    kl,
    log_sm,
    mass,
    mean,
    of_sequences,
    one_hot,
    outcomes,
    pick,
    sm,
    without,
)

PUBLISHED: dict[str, Loss] = {}


def published(*names: str) -> Callable[[Loss], Loss]:
    """Register the reference of one or several methods."""

    def register(function: Loss) -> Loss:
        for name in names:
            PUBLISHED[name] = function
        return function

    return register


# --- likelihood ---


@published("seqkd", "sft", "miniplm", "agent-distillation", "ded")
def likelihood(s: Step, z: Array) -> complex:
    return mean(ce(s, z))


# --- one divergence on a text ---


@published("reverse-kl", "opd-exact", "promptkd", "moe-sar", "moe-ka")
def reverse(s: Step, z: Array) -> complex:
    return mean(kl(sm(z), sm(s.teacher_NV)))


@published("ban", "skd")
def forward(s: Step, z: Array) -> complex:
    return mean(kl(sm(s.teacher_NV), sm(z)))


@published("kd", "llm-neo")
def hinton(s: Step, z: Array) -> complex:
    return 0.5 * mean(ce(s, z)) + 0.5 * forward(s, z)


@published("kd-lora")
def kd_lora(s: Step, z: Array) -> complex:
    return 0.5 * mean(ce(s, z)) + 0.5 * 4.0 * mean(kl(sm(s.teacher_NV, 2.0), sm(z, 2.0)))


@published("mentor-kd")
def mentor(s: Step, z: Array) -> complex:
    return 0.7 * mean(ce(s, z)) + 0.3 * mean(kl(sm(s.teacher_NV, 2.0), sm(z, 2.0)))


@published("mkd")
def momentum(s: Step, z: Array) -> complex:
    return mean(ce(s, z)) + 16.0 * mean(kl(sm(s.teacher_NV, 4.0), sm(z, 4.0)))


@published("ddk")
def ddk(s: Step, z: Array) -> complex:
    return mean(ce(s, z)) + 0.2 * forward(s, z)


@published("symmetric-kl")
def symmetric(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    return mean(0.5 * kl(p, q) + 0.5 * kl(q, p))


@published("mixed-kl-topk")
def mixed_topk(s: Step, z: Array) -> complex:
    p, q = (mass(x) for x in outcomes(sm(s.teacher_NV), sm(z), 3, "teacher", tail=False))
    return mean(0.5 * kl(p, q) + 0.5 * kl(q, p))


@published("gkd")
def gkd(s: Step, z: Array) -> complex:
    return of_sequences(s, js(sm(s.teacher_NV), sm(z), 0.5), np.ones(len(z), bool))


@published("distillm")
def distillm(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    return mean(kl(p, 0.1 * p + 0.9 * q))


@published("distillm-srkl")
def distillm_srkl(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    return mean(kl(q, 0.9 * p + 0.1 * q))


@published("distillm-2")
def distillm_2(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    pulled = of_sequences(s, kl(p, 0.1 * p + 0.9 * q), by(s, "teacher"))
    return pulled + of_sequences(s, kl(q, 0.9 * p + 0.1 * np.real(q)), by(s, "student"))


@published("taid")
def taid(s: Step, z: Array) -> complex:
    r = sm((1 - TAID) * np.real(z) + TAID * s.teacher_NV)
    return mean(kl(r, sm(z)))


@published("akl")
def akl(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    total = 0.0
    for p_V, q_V in zip(p, q, strict=True):
        order = np.argsort(-p_V)
        size = int(np.searchsorted(np.cumsum(p_V[order]), 0.5)) + 1
        gap = np.abs(p_V - np.real(q_V))[order]
        head = gap[:size].sum() / gap.sum()
        total = total + head * kl(p_V, q_V) + (1 - head) * kl(q_V, p_V)
    return total / len(p)


@published("todi")
def todi(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV, 2.0), sm(z, 2.0)
    w = 1 / (1 + np.exp(-(np.log(p) - np.log(np.real(q)))))
    ratio = np.log(p) - np.log(q)
    return 0.5 * mean(ce(s, z)) + 0.5 * mean((w * p * ratio - (1 - w) * q * ratio).sum(-1))


@published("bd-kd")
def bd_kd(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    wider = entropy(p) - entropy(np.real(q))
    return mean(np.where(wider > 0, 3.0, 1.0) * kl(p, q) + np.where(wider < 0, 3.0, 1.0) * kl(q, p))


@published("cakld", "bitdistiller")
def cakld(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    return ((1 - GAMMA) * kl(p, q) + GAMMA * kl(q, p)).sum() / len(np.unique(s.row_N))


@published("abkd")
def abkd(s: Step, z: Array) -> complex:
    return mean(ce(s, z)) + mean(alpha_beta(sm(s.teacher_NV), sm(z), 0.2, 0.7))


@published("amid")
def amid(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    k = (1 - 0.5) / 2
    return mean(alpha_beta(q, mass((0.1 * p**k + 0.9 * q**k) ** (1 / k)), 0.2, 0.7))


@published("eopd")
def eopd(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    top_p, top_q = (mass(x) for x in outcomes(p, q, 4, "teacher", tail=False))
    return mean(kl(q, p)) + mean((entropy(p) > 0.8) * kl(top_p, top_q))


@published("veto")
def veto(s: Step, z: Array) -> complex:
    p, b = sm(s.teacher_NV), 0.8 * (1 - s.progress)
    return mean(kl(sm(z), mass(p * sm(np.real(z)) ** b)))


@published("f-distill-tv")
def total_variation(s: Step, z: Array) -> complex:
    return mean(0.5 * absolute(sm(s.teacher_NV) - sm(z)).sum(-1))


@published("f-distill-js")
def jensen_shannon(s: Step, z: Array) -> complex:
    return mean(js(sm(s.teacher_NV), sm(z), 0.5))


@published("csd")
def concrete_scores(s: Step, z: Array) -> complex:
    d, w = z - s.teacher_NV, sm(np.real(z))
    pairs = w[:, :, None] * w[:, None, :] * (d[:, :, None] - d[:, None, :]) ** 2
    return mean(0.5 * pairs.sum((1, 2)))


# --- the label against the rest ---


def label_kl(s: Step, p: Array, q: Array) -> Array:
    two_p, two_q = (np.stack([pick(x, s.token_N), 1 - pick(x, s.token_N)], -1) for x in (p, q))
    return kl(two_p, two_q)


def rest_kl(s: Step, p: Array, q: Array) -> Array:
    return kl(mass(without(p, s.token_N)), mass(without(q, s.token_N)))


@published("dkd")
def dkd(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV, 4.0), sm(z, 4.0)
    return mean(ce(s, z)) + 16.0 * mean(label_kl(s, p, q) + 8.0 * rest_kl(s, p, q))


@published("nkd")
def nkd(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    p_y, q_y = pick(p, s.token_N), pick(q, s.token_N)
    p_rest, q_rest = mass(without(p, s.token_N)), mass(without(q, s.token_N))
    loss = -p_y * np.log(q_y) - 1.5 * (p_rest * np.log(q_rest)).sum(-1)
    # kdrl's value is less by what does not depend on the student.
    constant = p_y * np.log(p_y) - 1.5 * entropy(p_rest)
    return mean(ce(s, z)) + mean(loss + constant)


@published("atkd")
def atkd(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    uncertain = 1 - pick(p, s.token_N)
    hard = uncertain >= np.sort(uncertain)[len(uncertain) // 2]
    rest = rest_kl(s, p, q)
    return 0.2 * mean(rest, ~hard) + 0.8 * mean(label_kl(s, p, q) + rest, hard)


# --- what the teacher is turned into ---


@published("ttm")
def ttm(s: Step, z: Array) -> complex:
    return mean(ce(s, z)) + 45.0 * mean(kl(mass(sm(s.teacher_NV) ** 0.1), sm(z)))


@published("wttm")
def wttm(s: Step, z: Array) -> complex:
    powered = sm(s.teacher_NV) ** 0.2
    return mean(ce(s, z)) + 4.0 * mean(powered.sum(-1) * kl(mass(powered), sm(z)))


@published("ps-kd")
def ps_kd(s: Step, z: Array) -> complex:
    share = 0.8 * s.progress
    target = (1 - share) * one_hot(s, z) + share * sm(s.teacher_NV)
    return mean(-(target * log_sm(z)).sum(-1) - entropy(target))


@published("ban-cwtm")
def ban_cwtm(s: Step, z: Array) -> complex:
    confidence = sm(s.teacher_NV).max(-1)
    return mean(confidence / confidence.mean() * ce(s, z))


@published("bridge-garden")
def bridge_garden(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    soft = 1 - p.max(-1)
    target = soft[:, None] * p + (1 - soft[:, None]) * one_hot(s, z)
    return mean(soft * kl(p, q) + (1 - soft) * ce(s, z) - entropy(target) + soft * entropy(p))


@published("mft")
def mft(s: Step, z: Array) -> complex:
    p = sm(s.teacher_NV)
    gap = p.max(-1) - pick(p, s.token_N)
    m = ((gap + 0.2) / (1 + gap))[:, None]
    return mean(kl((1 - m) * p + m * one_hot(s, z), sm(z)))


@published("ofa-target")
def ofa(s: Step, z: Array) -> complex:
    e = one_hot(s, z)
    target = (sm(s.teacher_NV) + e) ** 1.5 - e
    return mean(ce(s, z)) + mean(-(target * log_sm(z)).sum(-1) + (target * np.log(target)).sum(-1))


# --- weights ---


@published("tsld")
def tsld(s: Step, z: Array) -> complex:
    p, surprise = sm(s.teacher_NV), -pick(log_sm(s.teacher_NV), s.token_N)
    w = np.zeros(len(z))
    for row in np.unique(s.row_N):
        mine = s.row_N == row
        w[mine] = sm(surprise[mine] / 10.0) * mine.sum()
    return of_sequences(s, w * kl(p, sm(z)), np.ones(len(z), bool))


@published("selectkd")
def selectkd(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV), sm(z)
    hits = [np.argmax(np.real(q_V)) in np.argsort(-p_V)[:5] for p_V, q_V in zip(p, q, strict=True)]
    return mean(np.where(hits, 1.0, 0.01) * kl(p, q))


@published("adakd")
def adakd(s: Step, z: Array) -> complex:
    hardness = kl(sm(np.real(z)), sm(s.teacher_NV))
    middle = np.sort(hardness)[(len(hardness) - 1) // 2]
    t = np.exp(-0.5 * np.tanh(np.log(hardness / middle)))[:, None]
    hardest = hardness >= np.sort(hardness)[-round(SHARE * len(hardness))]
    return mean(t[:, 0] ** 2 * kl(sm(z, t), sm(s.teacher_NV, t)), hardest)
