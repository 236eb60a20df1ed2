"""Edit distance, farthest-apart subsets and n-gram importance against plain counts."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl.data.text import BUCKETS, edit_distance, farthest_apart, gumbel_top, ngram_importance, words

SHORT = st.lists(st.sampled_from("abc"), max_size=7)


def plain_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's recursion as it is written."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


@settings(max_examples=200, deadline=None)
@given(SHORT, SHORT)
def test_edit_distance_is_levenshtein_over_the_longer_text(a: list[str], b: list[str]):
    want = plain_distance(a, b) / max(len(a), len(b), 1)
    assert edit_distance(a, b) == pytest.approx(want)
    assert edit_distance(b, a) == pytest.approx(want)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab ", max_size=9), min_size=1, max_size=7), st.integers(1, 7))
def test_chosen_texts_cover_within_twice_the_best(texts: list[str], count: int):
    chosen = farthest_apart(texts, count)
    assert len(chosen) == min(count, len(texts))
    apart = np.array([[edit_distance(words(a), words(b)) for b in texts] for a in texts])

    def radius(centres: tuple[int, ...]) -> float:
        return float(apart[:, list(centres)].min(axis=1).max())

    best = min(radius(c) for c in itertools.combinations(range(len(texts)), len(chosen)))
    assert radius(tuple(chosen)) <= 2 * best + 1e-9
    for index, distance in chosen.items():
        others = [apart[index, other] for other in chosen if other != index]
        assert distance == (pytest.approx(min(others)) if others else None)


def test_two_of_a_group_are_the_ones_that_differ():
    assert sorted(farthest_apart(["a b c d", "a b c e", "x y z"], 2)) == [0, 2]


def test_importance_is_the_log_ratio_of_bags_of_ngrams():
    texts, target = ["a b", "c"], ["a b", "a"]
    raw = Counter(["a", "b", "a b", "c"])
    wanted = Counter(["a", "b", "a b", "a"])

    def share(gram: str, bag: Counter[str]) -> float:
        return (1 + bag[gram]) / (BUCKETS + bag.total())

    want = [sum(math.log(share(g, wanted) / share(g, raw)) for g in grams) for grams in (["a", "b", "a b"], ["c"])]
    assert ngram_importance(texts, target) == pytest.approx(want)
    assert want[0] > 0 > want[1]


def test_gumbel_draws_in_proportion_without_replacement():
    weights = [0.5, 0.3, 0.2]
    firsts = Counter(tuple(gumbel_top([math.log(w) for w in weights], 2, seed)) for seed in range(4000))
    for i, j in itertools.permutations(range(3), 2):
        want = weights[i] * weights[j] / (1 - weights[i])
        assert firsts[i, j] / 4000 == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / 4000))
