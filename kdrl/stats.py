"""Statistics of an evaluation: pass@k, majority vote, tokens per correct answer, bootstrap over problems. No torch.

Left out: intervals over seeds or models (a bootstrap over problems says nothing about them), and significance tests by
formula: with a few hundred problems and correlated samples a resampled interval is the honest statement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdrl.errors import UserError

# Resamples are drawn in blocks of about this many counts, so that 100,000 problems need no gigabytes.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval; `high` is inf where resamples had no right answer to divide by."""

    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of b minus a over the same problems, its interval, and the two-sided bootstrap p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    problems: int
    level: float = 0.95


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k responses is right, given c right of n (2107.03374, equation 1).

    1 - C(n-c, k) / C(n, k). Raises UserError when k is not in 1..n or c not in 0..n.
    """
    if not 1 <= k <= n:
        raise UserError(
            f"pass@{k} needs k between 1 and the number of samples, which is {n}; draw more samples or lower k"
        )
    if not 0 <= c <= n:
        raise UserError(f"pass@k was given {c} right answers of {n} samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Chance that the most frequent answer is right when all samples of one problem vote.

    `None` (nothing could be extracted) does not vote; a tie is split evenly among the tied answers; when nobody votes
    the result is 0. Answers are compared as text: where the verifier accepts one spelling of a text and not another,
    that answer is worth the share of its responses that are right.
    """
    counts, worth = _ballots(answers, correct)
    if not counts:
        return 0.0
    most = max(counts)
    tied = [w for n, w in zip(counts, worth, strict=True) if n == most]
    return float(sum(tied) / len(tied))


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Exact mean of `majority_vote` over all subsets of k of the n samples (k = n is the plain vote), by counting.

    For each winning count m the subsets in which no answer has more than m votes are counted answer by answer,
    together with how many answers reach m and how much those are worth. Raises UserError when k is not in 1..n.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise UserError(f"majority@{k} needs k between 1 and the number of samples, which is {n}")
    if k == n:
        return majority_vote(answers, correct)
    counts, worth = _ballots(answers, correct)
    silent = n - sum(counts)
    total = 0.0
    for m in range(1, min(k, max(counts, default=0)) + 1):
        total += _won_with(m, counts, worth, silent, k)
    return total / math.comb(n, k)


def _won_with(m: int, counts: list[int], worth: list[float], silent: int, k: int) -> float:
    """Sum over subsets of size k whose largest count is exactly m of the mean worth of the answers that reach m."""
    # [size, answers that reached m]: number of subsets, and summed worth of the answers that reached m in them.
    ways = np.zeros((k + 1, k // m + 1))
    value = np.zeros_like(ways)
    for j in range(min(silent, k) + 1):
        ways[j, 0] = math.comb(silent, j)
    for count, w in zip(counts, worth, strict=True):
        new_ways, new_value = np.zeros_like(ways), np.zeros_like(value)
        for j in range(min(count, m, k) + 1):
            pick = math.comb(count, j)
            if j < m:
                new_ways[j:] += pick * ways[: k + 1 - j]
                new_value[j:] += pick * value[: k + 1 - j]
            else:
                new_ways[j:, 1:] += pick * ways[: k + 1 - j, :-1]
                new_value[j:, 1:] += pick * (value[: k + 1 - j, :-1] + w * ways[: k + 1 - j, :-1])
        ways, value = new_ways, new_value
    ties = np.arange(1, value.shape[1])
    return float((value[k, 1:] / ties).sum())


def _ballots(answers: Sequence[str | None], correct: Sequence[bool]) -> tuple[list[int], list[float]]:
    """Votes and worth (share that is right) of each distinct answer; None is left out."""
    if len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers for {len(correct)} verdicts")
    held: dict[str, list[bool]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            held[answer].append(bool(right))
    return [len(v) for v in held.values()], [sum(v) / len(v) for v in held.values()]


def tokens_per_correct(tokens: ArrayLike, correct: ArrayLike) -> float:
    """All tokens written, those of wrong responses too, per right answer; inf when nothing is right."""
    right = float(np.sum(np.asarray(correct, dtype=float)))
    return float(np.sum(np.asarray(tokens, dtype=float))) / right if right > 0 else math.inf


def bootstrap_mean(values_P: ArrayLike, *, seed: int, draws: int = 2000, level: float = 0.95) -> Interval:
    """Percentile interval of the mean over problems: `values_P` holds one number per problem, not per response."""
    values = _column(values_P)
    means = _resampled_sums(values[:, None], seed, draws)[:, 0] / len(values)
    return Interval(*_percentiles(means, level), level)


def bootstrap_ratio(
    numerator_P: ArrayLike, denominator_P: ArrayLike, *, seed: int, draws: int = 2000, level: float = 0.95
) -> Interval:
    """Percentile interval of sum(numerator) / sum(denominator) over problems, as tokens per correct answer needs."""
    columns = np.stack([_column(numerator_P), _column(denominator_P)], axis=1)
    sums = _resampled_sums(columns, seed, draws)
    ratios = np.full(draws, np.inf)
    np.divide(sums[:, 0], sums[:, 1], out=ratios, where=sums[:, 1] > 0)
    return Interval(*_percentiles(ratios, level), level)


def paired_bootstrap(
    a_P: ArrayLike, b_P: ArrayLike, *, seed: int, draws: int = 10_000, level: float = 0.95
) -> Difference:
    """Interval of mean(b - a) over the same problems in the same order, resampling problems.

    p is twice the smaller share of resampled differences on the far side of 0, counting exact zeros to both sides.
    """
    a, b = _column(a_P), _column(b_P)
    if len(a) != len(b):
        raise UserError(f"a paired comparison needs the same problems, but there are {len(a)} and {len(b)}")
    gaps = b - a
    means = _resampled_sums(gaps[:, None], seed, draws)[:, 0] / len(gaps)
    # A sum of equal and opposite gaps may miss 0 by rounding, which would decide the p-value.
    means[np.abs(means) < 1e-12] = 0.0
    below, above = (float(((side <= 0).sum() + 1) / (draws + 1)) for side in (means, -means))
    low, high = _percentiles(means, level)
    return Difference(float(gaps.mean()), low, high, min(1.0, 2 * min(below, above)), len(gaps), level)


def _column(values: ArrayLike) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or column.size == 0:
        raise UserError("a bootstrap over problems needs at least one problem and one number for each")
    return column


def _resampled_sums(columns_PC: NDArray[np.float64], seed: int, draws: int) -> NDArray[np.float64]:
    """[draws, C] sums over P problems drawn with replacement."""
    problems = len(columns_PC)
    rng = np.random.default_rng(seed)
    sums = np.empty((draws, columns_PC.shape[1]))
    step = max(1, _BLOCK // problems)
    for start in range(0, draws, step):
        stop = min(start + step, draws)
        picks = rng.integers(problems, size=(stop - start, problems))
        sums[start:stop] = columns_PC[picks].sum(axis=1)
    return sums


def _percentiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise UserError(f"the level of an interval lies between 0 and 1, not {level}")
    tail = (1 - level) / 2
    # 'inverted_cdf' picks members of the sample, so that inf stays inf instead of turning into nan.
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)
