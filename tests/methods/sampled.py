"""References of methods that sample tokens, cut the vocabulary or couple tokens; with them the registry is whole."""

from __future__ import annotations

import numpy as np

from .numerics import Array, Step, absolute, by, ce, js, kl, log_sm, mean, outcomes, pick, sm
from .published import PUBLISHED, published

__all__ = ["PUBLISHED"]

# --- one sampled token ---


def ratio(s: Step, z: Array) -> Array:
    return pick(log_sm(s.teacher_NV), s.token_N) - pick(log_sm(z), s.token_N)


@published("opd")
def opd(s: Step, z: Array) -> complex:
    return mean(-np.clip(np.real(ratio(s, z)), -10, 10) * -ce(s, z))


@published("iw-opd")
def iw_opd(s: Step, z: Array) -> complex:
    size, w = np.abs(np.real(ratio(s, z))), np.zeros(len(z))
    for row in np.unique(s.row_N):
        mine = s.row_N == row
        w[mine] = 1 + 0.5 * (1 - np.cumsum(size[mine]) / size[mine].sum())
    return mean(w * np.clip(np.real(ratio(s, z)), -10, 10) * ce(s, z))


@published("opd-k3")
def opd_k3(s: Step, z: Array) -> complex:
    return mean(np.exp(ratio(s, z)) - ratio(s, z) - 1)


@published("g-opd")
def g_opd(s: Step, z: Array) -> complex:
    initial = pick(log_sm(s.initial_NV), s.token_N)
    beyond = 1.25 * pick(log_sm(s.teacher_NV), s.token_N) - 0.25 * initial + np.real(ce(s, z))
    return mean(np.clip(beyond, -10, 10) * ce(s, z))


# --- parts of the vocabulary ---


@published("rs-kd")
def rs_kd(s: Step, z: Array) -> complex:
    logp, logq = log_sm(s.teacher_NV), log_sm(z)
    drawn = np.stack([np.searchsorted(np.cumsum(p), u) for p, u in zip(np.exp(logp), s.uniform_NK, strict=True)])
    return mean(np.take_along_axis(logp - logq, drawn, -1).mean(-1))


@published("ptkd")
def ptkd(s: Step, z: Array) -> complex:
    share = 0.9 * min(1.0, (s.step + 1) / 100) * min(1.0, (s.total - s.step) / (s.total // 5))
    loss = []
    for p_V, logq_V in zip(sm(s.teacher_NV, 0.5), log_sm(z), strict=True):
        kept = np.argsort(-p_V)[:5]
        kept = kept[: int(np.searchsorted(np.cumsum(p_V[kept]), 0.95)) + 1]
        cut = p_V[kept] / p_V[kept].sum()
        loss.append((cut * (np.log(cut) - logq_V[kept])).sum())
    return (1 - share) * mean(ce(s, z)) + share * mean(np.array(loss))


@published("sdft", "sdpo")
def self_topk(s: Step, z: Array) -> complex:
    return mean(js(*outcomes(sm(s.teacher_NV), sm(z), 4, "student", tail=True), 0.5))


@published("opsd")
def opsd(s: Step, z: Array) -> complex:
    return mean(js(sm(s.teacher_NV, 1.1), sm(z, 1.1), 0.5))


@published("dpkd")
def dpkd(s: Step, z: Array) -> complex:
    logp, logq = log_sm(s.teacher_NV), log_sm(z)
    c, r = logp.argmax(-1), np.real(logq).argmax(-1)
    margin = 0.1 * ((pick(logq, c) - pick(logq, r)) - (pick(logp, c) - pick(logp, r)))
    return 0.5 * mean(ce(s, z)) + 0.5 * mean(np.log(1 + np.exp(-margin)))


@published("pld")
def pld(s: Step, z: Array) -> complex:
    p, total = sm(s.teacher_NV), 0.0
    for p_V, z_V, y in zip(p, z, s.token_N, strict=True):
        order = [y, *[v for v in np.argsort(-p_V) if v != y][:4]]
        for place, v in enumerate(order):
            total = total + p_V[v] * (-z_V[v] + np.log(np.exp(z_V[order[place:]]).sum()))
    return total / len(p)


@published("kid")
def kid(s: Step, z: Array) -> complex:
    return mean(ce(s, z), by(s, "gold")) + mean(kl(sm(z), sm(s.teacher_NV)), by(s, "corrupt"))


@published("sinkd")
def sinkd(s: Step, z: Array) -> complex:
    p, q = sm(s.teacher_NV, 2.0), sm(z, 2.0)
    total = 0.0
    for row in np.unique(s.row_N):
        mine = s.row_N == row
        cost = absolute(q[mine][:, None, :] - p[mine][None, :, :]).sum(-1)
        plan = np.exp(-cost / 0.1)
        for _ in range(20):
            plan = plan / plan.sum(1, keepdims=True)
            plan = plan / plan.sum(0, keepdims=True)
        total = total + (plan * cost).sum()
    return mean(ce(s, z)) + 0.001 * total / len(z)


@published("luminet")
def luminet(s: Step, z: Array) -> complex:
    total = 0.0
    for row in np.unique(s.row_N):
        mine = s.row_N == row
        if mine.sum() > 1:
            p, q = (sm(over_rows(log_sm(x[mine])), 4.0) for x in (s.teacher_NV, z))
            total = total + kl(p, q).sum()
    return 2.0 * mean(ce(s, z)) + 31.0**2 * total / len(z)


def over_rows(x: Array) -> Array:
    centred = x - x.mean(0)
    return centred / np.sqrt((centred**2).mean(0) + 1e-6)
