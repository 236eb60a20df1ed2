"""Texts compared without a model: edit distance, farthest-apart subsets, hashed n-gram importance."""

from __future__ import annotations

import itertools
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_WORDS = re.compile(r"\w+|[^\w\s]")
BUCKETS = 10_000


def words(text: str) -> list[str]:
    """Words and single other signs, white space left out."""
    return _WORDS.findall(text)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> float:
    """Levenshtein distance over words by the length of the longer one, in [0, 1]; 0 for two empty texts.

    One vectorised row a word of `a`: the running minimum stands for the insertions.
    """
    if not a or not b:
        return float(bool(a) != bool(b))
    codes = {word: n for n, word in enumerate(dict.fromkeys([*a, *b]))}
    other_M = np.array([codes[word] for word in b])
    column_M1 = np.arange(len(b) + 1)
    row_M1 = column_M1.copy()
    for number, word in enumerate(a, 1):
        changed_M = np.minimum(row_M1[1:] + 1, row_M1[:-1] + (other_M != codes[word]))
        best_M1 = np.concatenate(([number], changed_M))
        row_M1 = np.minimum.accumulate(best_M1 - column_M1) + column_M1
    return float(row_M1[-1]) / max(len(a), len(b))


def farthest_apart(
    texts: Sequence[str], count: int, progress: Callable[[int, int], None] | None = None
) -> dict[int, float | None]:
    """`k_center` of texts by edit distance over words."""
    split = [words(text) for text in texts]
    return k_center(
        len(texts), lambda index: np.array([edit_distance(split[index], other) for other in split]), count, progress
    )


def k_center(
    size: int,
    distances: Callable[[int], NDArray[np.float64]],
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, float | None]:
    """Greedy k-center: `count` indices in the order chosen, each with its distance to the nearest other one chosen.

    `distances(i)` are those of all `size` points from point i. Begins with the point farthest from the first one; ties
    go to the earlier one. The distance is None where one point alone is chosen. The covering radius is at most twice
    the best possible.
    """
    first = int(distances(0).argmax())
    chosen: dict[int, float | None] = {first: None}
    nearest_B = distances(first)
    while len(chosen) < min(count, size):
        nearest_B[list(chosen)] = -1.0
        new = int(nearest_B.argmax())
        apart_B = distances(new)
        for index, nearest in chosen.items():
            chosen[index] = min(float(apart_B[index]), math.inf if nearest is None else nearest)
        chosen[new] = float(nearest_B[new])
        nearest_B = np.minimum(nearest_B, apart_B)
        if progress is not None:
            progress(len(chosen), count)
    return chosen


def _features(text: str) -> Counter[int]:
    """Counts of hashed unigrams and bigrams of the lower-cased text."""
    tokens = words(text.lower())
    grams = [*tokens, *(f"{a} {b}" for a, b in itertools.pairwise(tokens))]
    return Counter(zlib.crc32(gram.encode()) % BUCKETS for gram in grams)


def ngram_importance(texts: Sequence[str], target: Sequence[str]) -> list[float]:
    """Log importance weight of each text toward the target's n-grams, in nats (DSIR, arXiv 2302.03169).

    Sum over its hashed unigrams and bigrams (10,000 buckets) of log p_target - log p_texts, each a bag of n-grams with
    one added to every bucket.
    """
    features = [_features(text) for text in texts]
    ratio_V = _log_shares(map(_features, target)) - _log_shares(features)
    return [math.fsum(count * float(ratio_V[bucket]) for bucket, count in row.items()) for row in features]


def _log_shares(rows: Iterable[Counter[int]]) -> NDArray[np.float64]:
    total_V = np.ones(BUCKETS)
    for row in rows:
        for bucket, count in row.items():
            total_V[bucket] += count
    return np.log(total_V / total_V.sum())


def gumbel_top(scores: Sequence[float], count: int, seed: int) -> list[int]:
    """`count` indices drawn in proportion to exp(score) without replacement: the top of scores with Gumbel noise."""
    draw = random.Random(seed)
    noisy = [score - math.log(-math.log(draw.random() or 5e-324)) for score in scores]
    return sorted(range(len(scores)), key=lambda i: -noisy[i])[:count]
