from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl.engines.cache import RoomyLayer
from kdrl.engines.sampling import StopStrings, draw_uniforms, inverse_cdf
from kdrl.models import NewTokenizer
from kdrl.models.scratch import character_tokenizer


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-7, 0.1, 0.5, 1.0]), min_size=1, max_size=40).filter(any),
    st.one_of(st.sampled_from([0.0, 1 - 2**-24, 0.5]), st.floats(0, 1, exclude_max=True, width=32)),
)
@settings(max_examples=300, deadline=None)
def test_inverse_cdf_never_draws_a_zero_and_respects_the_cdf(weights, u):
    p = torch.tensor([weights])
    index = int(inverse_cdf(p, torch.tensor([[u]], dtype=torch.float32)))
    assert 0 <= index < len(weights)
    assert weights[index] > 0
    total = sum(weights)
    slack = 1e-5 * total
    assert sum(weights[:index]) <= u * total + slack
    assert sum(weights[: index + 1]) >= u * total - slack


def test_the_last_token_of_a_long_tail_is_safe_at_the_edge():
    p = torch.softmax(torch.randn(4, 50_000), -1)
    p[:, -100:] = 0
    index = inverse_cdf(p, torch.full((4, 1), 1 - 2**-24))
    assert (index < 50_000 - 100).all()
    assert (p.gather(-1, index) > 0).all()


def test_uniforms_are_uniform_and_follow_prompt_and_sample_alone():
    a = draw_uniforms([[1, 2], [3], [1, 2]], 50, 40, seed=9)
    b = draw_uniforms([[3], [1, 2]], 20, 40, seed=9)
    assert torch.equal(a[1, :20], b[0])
    assert torch.equal(a[0, :20], b[1])
    assert not torch.equal(a[0], a[2])
    assert 0 <= a.min() < 0.01
    assert 0.99 < a.max() < 1
    assert a.mean() == pytest.approx(0.5, abs=0.02)
    assert a.var() == pytest.approx(1 / 12, abs=0.005)


def test_stop_strings_are_found_across_tokens_and_only_when_whole():
    tokenizer = character_tokenizer(NewTokenizer(characters="ab#"))
    stops = StopStrings(tokenizer, ["ab#"], 5)
    ids = {c: tokenizer.get_vocab()[c] for c in "ab#"}
    history = [[ids[c] for c in row] for row in ("ab#", "ab#", "aba")]
    assert stops.hits(history) == [True, True, False]
    assert stops.hits([row[:2] for row in history]) == [False, False, False]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_a_roomy_layer_holds_what_a_concatenation_would(lengths, random):
    layer, want = RoomyLayer(limit=1000), torch.zeros(3, 2, 0, 4)
    for length in lengths:
        new = torch.randn(want.shape[0], 2, length, 4)
        want = torch.cat([want, new], 2)
        keys, values = layer.update(new, -new)
        assert torch.equal(keys, want)
        assert torch.equal(values, -want)
        assert layer.get_seq_length() == want.shape[2]
        rows = torch.tensor([random.randrange(want.shape[0]) for _ in range(random.randint(1, 5))])
        layer.reorder_cache(rows)
        want = want[rows]
