from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl import stats
from kdrl.errors import UserError

ballots = st.lists(st.tuples(st.sampled_from(["1", "2", "3", "4", None]), st.booleans()), min_size=1, max_size=7)


def test_pass_at_k_equals_enumeration_of_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                hits = [any(i < c for i in subset) for subset in combinations(range(n), k)]
                assert stats.pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_nonsense(n: int, c: int, k: int):
    with pytest.raises(UserError, match="pass@"):
        stats.pass_at_k(n, c, k)


def test_majority_by_hand():
    vote = stats.majority_vote
    assert vote(["7", "7", "3"], [True, True, False]) == 1.0
    assert vote(["7", "3", "3"], [True, False, False]) == 0.0
    assert vote(["7", "3"], [True, False]) == 0.5, "a tie is split"
    assert vote(["7", "3", "5"], [True, False, False]) == pytest.approx(1 / 3)
    assert vote([None, None, "7"], [False, False, True]) == 1.0, "what cannot be extracted does not vote"
    assert vote([None, None], [True, True]) == 0.0, "nobody voted"
    assert vote(["7", "7", "3"], [True, False, True]) == 0.5, "one text judged both ways is worth its share"


@settings(deadline=None, max_examples=60)
@given(ballots)
def test_majority_at_k_equals_enumeration_of_subsets(ballot: list[tuple[str | None, bool]]):
    answers, correct = [a for a, _ in ballot], [r for _, r in ballot]
    # The verdict belongs to the answer's text here, as enumeration would otherwise re-estimate its worth per subset.
    worth = {a: correct[answers.index(a)] for a in answers}
    correct = [worth[a] for a in answers]
    for k in range(1, len(ballot) + 1):
        votes = [
            stats.majority_vote([answers[i] for i in s], [correct[i] for i in s])
            for s in combinations(range(len(ballot)), k)
        ]
        assert stats.majority_at_k(answers, correct, k) == pytest.approx(np.mean(votes), abs=1e-9)


def test_majority_at_one_is_accuracy_of_those_who_vote():
    assert stats.majority_at_k(["1", "2", None, "2"], [True, False, True, False], 1) == pytest.approx(1 / 4)
    with pytest.raises(UserError, match="majority@9"):
        stats.majority_at_k(["1"], [True], 9)


def test_tokens_per_correct_counts_the_tokens_of_wrong_responses():
    assert stats.tokens_per_correct([10, 20, 30], [True, False, True]) == 30.0
    assert stats.tokens_per_correct([10, 20], [False, False]) == math.inf


def test_bootstrap_agrees_with_the_normal_interval_and_follows_its_seed():
    values = np.random.default_rng(0).binomial(1, 0.3, size=400)
    interval = stats.bootstrap_mean(values, seed=1, draws=4000)
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.012)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.012)
    smooth = np.random.default_rng(0).random(50)
    assert stats.bootstrap_mean(smooth, seed=1) == stats.bootstrap_mean(smooth, seed=1)
    assert stats.bootstrap_mean(smooth, seed=1) != stats.bootstrap_mean(smooth, seed=2)


def test_bootstrap_is_over_problems_not_responses():
    """Eight identical responses a problem carry no more information than one."""
    per_problem = np.random.default_rng(3).binomial(1, 0.5, size=100).astype(float)
    right = stats.bootstrap_mean(per_problem, seed=0)
    wrong = stats.bootstrap_mean(np.repeat(per_problem, 8), seed=0)
    assert (right.high - right.low) > 2 * (wrong.high - wrong.low)


def test_bootstrap_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).random(50)
    whole = stats.bootstrap_mean(values, seed=5, draws=300)
    monkeypatch.setattr(stats, "_BLOCK", 1000)
    assert stats.bootstrap_mean(values, seed=5, draws=300) == whole


def test_bootstrap_ratio_is_a_ratio_of_sums():
    tokens, right = np.array([10.0, 30.0, 20.0, 40.0] * 30), np.array([1.0, 0.0, 1.0, 1.0] * 30)
    interval = stats.bootstrap_ratio(tokens, right, seed=0)
    assert interval.low < 100 / 3 < interval.high
    assert stats.bootstrap_ratio([10.0, 10.0], [0.0, 1.0], seed=0).high == math.inf


def test_paired_bootstrap_sees_what_an_unpaired_one_would_miss():
    rng = np.random.default_rng(1)
    hardness = rng.random(200)
    a, b = hardness, hardness + 0.02 + 0.01 * rng.standard_normal(200)
    difference = stats.paired_bootstrap(a, b, seed=0)
    assert 0.017 < difference.low < difference.mean < difference.high < 0.023
    assert difference.p < 0.01
    separate = stats.bootstrap_mean(a, seed=0).high > stats.bootstrap_mean(b, seed=0).low
    assert separate, "the two intervals overlap although the paired one leaves 0 out"


def test_paired_bootstrap_of_equals_shows_no_difference():
    same = stats.paired_bootstrap([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], seed=0)
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_paired_bootstrap_turns_round():
    a, b = np.random.default_rng(4).random((2, 60))
    there, back = stats.paired_bootstrap(a, b, seed=0), stats.paired_bootstrap(b, a, seed=0)
    assert there.mean == pytest.approx(-back.mean)
    assert there.p == pytest.approx(back.p, abs=0.02)


def test_refusals():
    with pytest.raises(UserError, match="same problems"):
        stats.paired_bootstrap([1.0], [1.0, 2.0], seed=0)
    with pytest.raises(UserError, match="at least one problem"):
        stats.bootstrap_mean([], seed=0)
    with pytest.raises(UserError, match="between 0 and 1"):
        stats.bootstrap_mean([1.0], seed=0, level=95)
