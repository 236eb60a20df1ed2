"""The whole loss of every method of rewards and preferences, from its formula, in plain numpy: nothing is from kdrl.

The numbers are the published ones, typed here. Each function takes a `Batch`, the student's logits `[N, V]`, real or
complex, and the step; what a method takes as data is made real first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .numerics import Array, absolute, js, kl, log_sm, mass, pick, sm
from .whole import Batch

Whole = Callable[[Batch, Array, int], complex]
WHOLE: dict[str, Whole] = {}


def whole(*names: str) -> Callable[[Whole], Whole]:
    """Register the reference of one or several methods."""

    def register(function: Whole) -> Whole:
        for name in names:
            WHOLE[name] = function
        return function

    return register


# --- tokens and responses ---


def log_q(s: Batch, z: Array) -> Array:
    return pick(log_sm(z), s.token_N)


def ratio(s: Batch, z: Array) -> Array:
    return np.exp(log_q(s, z) - s.old_N)


def to(s: Batch, z: Array, other_NV: Array) -> Array:
    """log of the other's probability less the student's own."""
    return pick(log_sm(other_NV), s.token_N) - log_q(s, z)


def mean(x: Array, keep: Array) -> complex:
    return x[keep].sum() / keep.sum()


def mean_of_rows(s: Batch, x: Array, keep: Array) -> complex:
    rows = np.unique(s.row_N[keep])
    return sum(x[keep & (s.row_N == r)].mean() for r in rows) / len(rows)


def bound(x: Array, low: float, high: float) -> Array:
    """Clipped, with no slope outside."""
    return np.where(np.real(x) < low, low, np.where(np.real(x) > high, high, x))


# --- advantages ---


def centred(reward: Array, group: Array, *, others: bool = False) -> Array:
    out = np.zeros(len(reward))
    for g in np.unique(group):
        mine = np.flatnonzero(group == g)
        for i in mine:
            out[i] = reward[i] - reward[mine[mine != i] if others else mine].mean()
    return out


def normalised(reward: Array, group: Array) -> Array:
    out = centred(reward, group)
    for g in np.unique(group):
        out[group == g] /= reward[group == g].std(ddof=1) + 1.0e-6
    return out


def of_students(s: Batch, advantage: Callable[[Array, Array], Array]) -> Array:
    """Advantages `[N]` among the student's own responses."""
    own, out = s.origin_B == "student", np.zeros(len(s.reward_B))
    out[own] = advantage(s.reward_B[own], s.group_B[own])
    return out[s.row_N]


# --- policy gradients ---


def clipped(r: Array, a: Array, low: float = 0.2, high: float = 0.2) -> Array:
    plain, held = r * a, bound(r, 1 - low, 1 + high) * a
    return -np.where(np.real(plain) < np.real(held), plain, held)


@whole("grpo")
def grpo(s: Batch, z: Array, step: int) -> complex:
    return mean(clipped(ratio(s, z), of_students(s, normalised)), s.by("student"))


@whole("dr_grpo")
def dr_grpo(s: Batch, z: Array, step: int) -> complex:
    return clipped(ratio(s, z), of_students(s, centred)).sum() / (len(s.group_B) * 3000)


@whole("dapo")
def dapo(s: Batch, z: Array, step: int) -> complex:
    mixed = np.array([len(np.unique(s.reward_B[s.group_B == g])) > 1 for g in s.group_B])
    return mean(clipped(ratio(s, z), of_students(s, normalised), 0.2, 0.28), (mixed & s.ended_B)[s.row_N])


@whole("gspo")
def gspo(s: Batch, z: Array, step: int) -> complex:
    a, gap, losses = of_students(s, normalised), log_q(s, z) - s.old_N, []
    rows = np.flatnonzero(s.inside_B)
    for row in rows:
        mine = s.row_N == row
        losses.append(clipped(np.exp(gap[mine].mean()), a[mine][0], 3e-4, 4e-4))
    return sum(losses) / len(rows)


@whole("cispo")
def cispo(s: Batch, z: Array, step: int) -> complex:
    a = centred(s.reward_B, s.group_B) / (s.reward_B.std(ddof=1) + 1.0e-6)
    return mean(-np.minimum(np.real(ratio(s, z)), 5.0) * a[s.row_N] * log_q(s, z), s.by("student"))


@whole("luffy")
def luffy(s: Batch, z: Array, step: int) -> complex:
    a, q = centred(s.reward_B, s.group_B)[s.row_N], np.exp(log_q(s, z))
    gain = np.where(s.by("student"), ratio(s, z) * a, q / (q + 0.1) * a)
    entropy = -(sm(z) * log_sm(z)).sum(-1)
    per = s.inside_B.sum() * 8192
    return -(gain * s.by("student", "teacher")).sum() / per - 0.001 * (entropy * s.by("student")).sum() / per


@whole("trrd")
def trrd(s: Batch, z: Array, step: int) -> complex:
    r = np.exp(0.5 * (log_q(s, z) - s.old_N) + 0.5 * bound(-to(s, z, s.teacher_NV), -1.0, 1.0))
    return mean(clipped(r, of_students(s, normalised)), s.by("student"))


@whole("rlsd")
def rlsd(s: Batch, z: Array, step: int) -> complex:
    a, R = of_students(s, normalised), np.real(to(s, z, s.teacher_NV)) * ~s.last_N
    size = (1 - 1.0) + 1.0 * np.clip(np.exp(np.sign(a) * R), 0.8, 1.2)
    return mean(clipped(ratio(s, z), a * size), s.by("student"))


@whole("mopd")
def mopd(s: Batch, z: Array, step: int) -> complex:
    a, r = of_students(s, normalised), np.real(ratio(s, z))
    w = np.where((r >= 0.5) & (r <= 2.0), r, 0.0)
    loss = -w * (np.real(to(s, z, s.teacher_NV)) + 1.0 * a) * log_q(s, z)
    return mean_of_rows(s, loss, s.by("student"))


@whole("kdrl-shaped")
def kdrl_shaped(s: Batch, z: Array, step: int) -> complex:
    R = np.clip(np.real(to(s, z, s.teacher_NV)), -10, 10) * ~s.last_N
    return mean(clipped(ratio(s, z), of_students(s, normalised) + 2e-3 * R), s.by("student"))


# --- beside a divergence from the teacher, or from the start ---


def half_square(s: Batch, z: Array, other_NV: Array) -> Array:
    """Half of R squared, linear where |R| exceeds 10, on stale samples times the ratio."""
    R = to(s, z, other_NV)
    return np.real(ratio(s, z)) * np.where(np.abs(np.real(R)) > 10, 10 * absolute(R) - 50, R**2 / 2)


def score_function(s: Batch, z: Array) -> Array:
    """-sg(R) log q with R in [-10, 10], on stale samples times the ratio."""
    R = np.clip(np.real(to(s, z, s.teacher_NV)), -10, 10)
    return -np.real(ratio(s, z)) * R * log_q(s, z)


@whole("kdrl")
def kdrl(s: Batch, z: Array, step: int) -> complex:
    return grpo(s, z, step) + 2e-3 * mean(half_square(s, z, s.teacher_NV), s.by("student"))


@whole("kdrl-annealed")
def kdrl_annealed(s: Batch, z: Array, step: int) -> complex:
    b = max(5e-3 - 5e-5 * step, 1e-3)
    return grpo(s, z, step) + b * mean(half_square(s, z, s.teacher_NV), s.by("student"))


@whole("kdrl-mask-response")
def kdrl_mask_response(s: Batch, z: Array, step: int) -> complex:
    return grpo(s, z, step) + 2e-3 * mean(half_square(s, z, s.teacher_NV), ~s.correct_B[s.row_N])


@whole("kdrl-mask-group")
def kdrl_mask_group(s: Batch, z: Array, step: int) -> complex:
    hopeless = np.array([not s.correct_B[s.group_B == g].any() for g in s.group_B])
    return grpo(s, z, step) + 2e-3 * mean(half_square(s, z, s.teacher_NV), hopeless[s.row_N])


@whole("opd-then-rl")
def opd_then_rl(s: Batch, z: Array, step: int) -> complex:
    return mean(score_function(s, z), ~s.last_N) if step < 60 else grpo(s, z, step)


@whole("srpo")
def srpo(s: Batch, z: Array, step: int) -> complex:
    right = s.correct_B[s.row_N]
    rewarded = clipped(ratio(s, z), of_students(s, normalised))
    taught = score_function(s, z) * ~s.last_N
    return np.where(right, rewarded, taught).sum() / len(s.row_N)


@whole("hdpo")
def hdpo(s: Batch, z: Array, step: int) -> complex:
    return grpo(s, z, step) + 0.01 * mean(js(sm(s.teacher_NV), sm(z), 0.5), s.by("privileged"))


@whole("tgpo")
def tgpo(s: Batch, z: Array, step: int) -> complex:
    likeliest = mass(np.exp(1e4 * (log_sm(s.teacher_NV) - log_sm(s.teacher_NV).max(-1, keepdims=True))))
    # What does not depend on the student is -log 1 but where two tokens are all but alike.
    own = (likeliest * np.log(np.where(likeliest > 0, likeliest, 1.0))).sum(-1)
    loss = own - (likeliest * log_sm(z)).sum(-1)
    return grpo(s, z, step) + max(2e-3 - 1e-5 * step, 0.0) * mean(loss, s.by("student"))


@whole("minillm")
def minillm(s: Batch, z: Array, step: int) -> complex:
    reward = np.clip(2.0 * np.real(to(s, z, s.teacher_NV)), -100, 100)
    later = np.zeros(len(s.row_N))
    for t, row in enumerate(s.row_N):
        after = [u for u in range(t + 1, len(s.row_N)) if s.row_N[u] == row]
        later[t] = sum(0.95 ** (u - t) * reward[u] for u in after) / max(1, len(after))
    one = kl(sm(z), sm(s.teacher_NV))
    return mean(s.importance_N * (clipped(ratio(s, z), later) + one), s.by("mixed"))


def forward_estimate(s: Batch, z: Array, power: Array | float, limit: float) -> Array:
    """u log u - u + 1 of u = ref^power / q, with the gradient (1 - u) grad log q; on stale samples times the ratio."""
    q = log_q(s, z)
    log_u = np.clip(power * pick(log_sm(s.initial_NV), s.token_N) - np.real(q), -limit, limit)
    u = np.exp(log_u)
    return np.real(ratio(s, z)) * (u * log_u - u + 1 + (1 - u) * (q - np.real(q)))


@whole("rapo")
def rapo(s: Batch, z: Array, step: int) -> complex:
    power = np.where(s.correct_B, 1.0, 0.5)[s.row_N]
    leash = mean(forward_estimate(s, z, power, 3.0), s.by("student"))
    entropy = mean(-(sm(z) * log_sm(z)).sum(-1), s.by("student"))
    return grpo(s, z, step) + 1e-3 * leash - 1e-3 * entropy


@whole("oreal")
def oreal(s: Batch, z: Array, step: int) -> complex:
    a = of_students(s, lambda r, g: centred(r, g, others=True))
    cloned = mean(-np.where(a > 0, 1.0, 0.5) * a * ratio(s, z), s.by("student"))
    return cloned + 0.01 * mean(forward_estimate(s, z, 1.0, 10.0), s.by("student"))


@whole("demo-rl")
def demo_rl(s: Batch, z: Array, step: int) -> complex:
    a = of_students(s, lambda r, g: centred(r, g, others=True))
    return mean(clipped(ratio(s, z), a) + 0.05 * half_square(s, z, s.initial_NV), s.by("student"))


@whole("infalign")
def infalign(s: Batch, z: Array, step: int) -> complex:
    quantile = np.array([(s.reward_B[s.group_B == g] <= r).mean() for r, g in zip(s.reward_B, s.group_B, strict=True)])
    a = normalised(np.exp(10.0 * quantile), s.group_B)[s.row_N]
    return mean(clipped(ratio(s, z), a) + 0.01 * half_square(s, z, s.initial_NV), s.by("student"))


# --- preferences ---


def scores(s: Batch, z: Array, reference_NV: Array | None, *, per_token: bool = False) -> Array:
    gap = log_q(s, z) if reference_NV is None else -to(s, z, reference_NV)
    found = [gap[s.row_N == r] for r in range(len(s.group_B))]
    return np.array([x.mean() if per_token else x.sum() for x in found])


def over_pairs(s: Batch, better: Array, score: Array, loss: Callable[[complex], complex]) -> complex:
    """Mean over groups of the mean over pairs i over j with `better` of i above that of j."""
    means = []
    for g in np.unique(s.group_B):
        mine = np.flatnonzero(s.group_B == g)
        found = [loss(score[i] - score[j]) for i in mine for j in mine if better[i] > better[j]]
        means += [sum(found) / len(found)] if found else []
    return sum(means) / len(means)


def doubt(x: complex) -> complex:
    """-log sigmoid(x)."""
    return np.log(1 + np.exp(-x))


@whole("dpo")
def dpo(s: Batch, z: Array, step: int) -> complex:
    return over_pairs(s, s.reward_B, scores(s, z, s.initial_NV), lambda d: doubt(0.1 * d))


@whole("ipo")
def ipo(s: Batch, z: Array, step: int) -> complex:
    return over_pairs(s, s.reward_B, scores(s, z, s.initial_NV), lambda d: (d - 1 / (2 * 0.1)) ** 2)


@whole("simpo")
def simpo(s: Batch, z: Array, step: int) -> complex:
    return over_pairs(s, s.reward_B, scores(s, z, None, per_token=True), lambda d: doubt(2.0 * d - 1.0))


@whole("plad")
def plad(s: Batch, z: Array, step: int) -> complex:
    score = scores(s, z, None, per_token=True)
    return over_pairs(s, s.origin_B == "teacher", score, lambda d: 0.5 - d if np.real(d) < 0.5 else 0.0)


@whole("xpo")
def xpo(s: Batch, z: Array, step: int) -> complex:
    pairs = over_pairs(s, s.reward_B, scores(s, z, s.initial_NV), lambda d: doubt(0.1 * d))
    written = log_q(s, z)[s.by("teacher")].sum() / len(np.unique(s.group_B))
    return pairs + 1e-5 * written


@whole("dpkd-sequence")
def dpkd_sequence(s: Batch, z: Array, step: int) -> complex:
    score = scores(s, z, s.teacher_NV, per_token=True)
    pairs = over_pairs(s, s.origin_B == "teacher", score, lambda d: doubt(0.1 * d))
    return pairs - 0.5 * mean(log_q(s, z), s.by("teacher"))


@whole("kto")
def kto(s: Batch, z: Array, step: int) -> complex:
    score = scores(s, z, s.initial_NV)
    drift = max(0.0, np.real(score).mean())
    sign = np.where(s.correct_B, 1.0, -1.0)
    return (1 - 1 / (1 + np.exp(-sign * 0.1 * (score - drift)))).mean()


@whole("redi")
def redi(s: Batch, z: Array, step: int) -> complex:
    likelihood = scores(s, z, None, per_token=True)
    pairs = np.where(s.correct_B, -likelihood, 0.8 * likelihood).sum()
    return pairs / len(np.unique(s.group_B))
