"""Packing, the stated errors of stored log-probs, tail mass, unbiased draws, bytes a token."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.making import evidence_of, scored
from kdrl.teachers.cache_bits import bits_for, pack, row_bytes, unpack
from kdrl.teachers.cache_codec import DEPTH, Draws, Hidden, Scored, TopK, dequantise, quantise
from kdrl.teachers.cache_store import CacheStore

QWEN = 151_936
"""The largest vocabulary in wide use: ids of 18 bits."""


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_numbers_of_any_width_come_back_from_any_place(data: st.DataObject):
    width = data.draw(st.integers(1, 50))
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    numbers = st.lists(st.integers(0, (1 << width) - 1), min_size=rows * columns, max_size=rows * columns)
    values = np.array(data.draw(numbers), dtype=np.uint64).reshape(rows, columns)
    packed = pack(values, width)
    assert packed.shape == (rows, row_bytes(columns, width))
    start = np.arange(rows)[:, None] * 8 * packed.shape[1] + np.arange(columns)[None] * width
    assert (unpack(packed.reshape(-1), start, width) == values).all()


def falling(n: int, k: int, spread: float, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 4 * k, generator=draw, dtype=torch.float64) * spread
    return logits.log_softmax(-1).topk(k, -1).values


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.floats(0.0, 40.0), st.integers(0, 10**6))
def test_a_log_prob_is_off_by_no_more_than_is_stated(k: int, spread: float, seed: int):
    logp = falling(20, k, spread, seed)
    tail = torch.log1p(-logp.exp().sum(-1).clamp(max=1 - 1e-7))
    code, span = quantise(logp)
    found = dequantise(code, span, tail).double()
    depth, wide = (logp[:, :1] - logp).clamp(max=DEPTH), span.double()[:, None]
    bound = (depth * wide).sqrt() / 255 + wide / 260100
    # The whole row is shifted to its mass; no more than its entries are off, in the mean over p.
    share = (logp - logp.logsumexp(-1, keepdim=True)).exp()
    shift = (share * bound.exp()).sum(-1, keepdim=True).log()
    reached = (logp - logp[:, :1] >= -DEPTH).all(-1)
    assert ((found - logp).abs() <= bound + shift + 1e-4)[reached].all()
    assert (found.diff(dim=-1) <= 0).all(), "still in falling order"


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 12.0])
def test_the_mass_of_the_rest_comes_back(spread: float):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * spread
    codec = TopK(16, 300)
    few = codec.decode(codec.encode(scored(logits)), torch.arange(50)).few
    assert few is not None
    want = logits.log_softmax(-1)
    ids = want.topk(16, -1).indices
    assert torch.equal(few.ids_NK.sort(-1).values, ids.sort(-1).values)
    tail = want.scatter(-1, ids, -torch.inf).logsumexp(-1)
    assert few.tail_N is not None
    # float16, and nothing lost of a rest that is small: its logarithm is stored.
    torch.testing.assert_close(few.tail_N.double(), tail, rtol=1e-3, atol=2e-7)
    mass = few.logp_NK.double().exp().sum(-1) + few.tail_N.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=2e-6)
    outside = few.outside(torch.ones_like(few.ids_NK, dtype=torch.bool))
    torch.testing.assert_close(outside.squeeze(-1), few.tail_N)


def test_k_as_large_as_the_vocabulary_leaves_no_rest():
    logits = torch.randn(5, 7, dtype=torch.float64)
    few = TopK(7, 7).decode(TopK(7, 7).encode(scored(logits)), torch.arange(5)).few
    assert few is not None
    torch.testing.assert_close(few.logp_NK.exp().sum(-1), torch.ones(5))


def test_ruled_out_tokens_are_stored_as_such():
    logits = torch.full((3, 40), -torch.inf)
    logits[:, [3, 9]] = torch.tensor([1.0, 0.0])
    codec = TopK(4, 40)
    masked = torch.where(logits.isinf(), -1e4, logits)
    few = codec.decode(codec.encode(scored(masked)), torch.arange(3)).few
    assert few is not None
    torch.testing.assert_close(few.logp_NK[:, :2].exp(), torch.tensor([[0.731059, 0.268941]] * 3), atol=2e-3, rtol=0)
    assert (few.logp_NK[:, 2:] < 1 - DEPTH).all()


def as_probability(codec: Draws, data: Scored, vocab: int) -> torch.Tensor:
    few = codec.decode(codec.encode(data), torch.arange(len(data.evidence.logp_N))).few
    assert few is not None
    assert few.weight_NK is not None
    return torch.zeros(len(few.ids_NK), vocab).scatter_add(-1, few.ids_NK, few.weight_NK)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_draws_are_unbiased(tau: float):
    """The mean weight of a token over many caches is its probability, within five standard errors of a mean."""
    vocab, n, repeats = 30, 12, 400
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2.0
    p = logits.softmax(-1).float()
    seen = torch.stack([as_probability(Draws(n, tau, vocab, seed), scored(logits), vocab) for seed in range(repeats)])
    error = seen.var(0).sqrt() / math.sqrt(repeats)
    rounding = 0.005 * abs(1 - tau) * p
    assert ((seen.mean(0) - p).abs() <= 5 * error + rounding + 3e-4).all()
    if tau == 1.0:
        torch.testing.assert_close(seen.sum(-1), torch.ones(repeats, 6))


def test_draws_follow_from_seed_and_response_alone():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    one, again, other = (Draws(12, 1.0, 50, seed).encode(scored(logits)) for seed in (7, 7, 8))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["unique"], other["unique"]) or not torch.equal(one["entries"], other["entries"])
    first = Draws(12, 1.0, 50, 7).encode(scored(logits, 1))
    assert not torch.equal(first["entries"], one["entries"]), "another response has other draws"


def test_the_log_prob_of_a_draw_is_off_by_no_more_than_is_stated():
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    codec = Draws(12, 1.0, 60, 0)
    few = codec.decode(codec.encode(scored(logits)), torch.arange(40)).few
    assert few is not None
    assert few.weight_NK is not None
    real = few.weight_NK > 0
    want = logits.log_softmax(-1).gather(-1, few.ids_NK)
    assert ((few.logp_NK.double() - want).abs()[real] <= 0.005 + 1e-6).all()
    assert (few.logp_NK[~real] == 0).all()


def stored_bytes(folder: Path, tensors: dict[str, torch.Tensor], responses: int, tokens: int) -> float:
    """Bytes a token on the disk, keys, header and index line included."""
    with CacheStore.write(folder, {"kind": "topk"}) as store:
        keys = [bytes([i]) * 16 for i in range(responses)]
        store.add(keys, [tokens // responses] * responses, tensors)
        return store.bytes / tokens


@pytest.mark.parametrize("vocab", [49_152, QWEN])
def test_bytes_a_token(vocab: int, tmp_path: Path):
    """The promised sizes, on responses of 100 tokens; draws at their worst, when all of them differ."""
    draw = torch.Generator().manual_seed(6)
    tokens, responses = 600, 6
    # Nearly uniform: a draw repeats about never.
    logits = torch.randn(8, vocab, generator=draw) * 0.1
    hidden = torch.eye(8)[torch.arange(tokens) % 8]
    evidence = evidence_of(logits)
    evidence = type(evidence)(torch.zeros(tokens), torch.arange(tokens), 1, hidden, evidence.head)
    data = Scored(evidence, (100,) * responses, tuple(bytes([i]) * 16 for i in range(responses)))
    topk = stored_bytes(tmp_path / "topk", TopK(64, vocab).encode(data), responses, tokens)
    draws = stored_bytes(tmp_path / "draws", Draws(12, 1.0, vocab, 0).encode(data), responses, tokens)
    assert topk <= 220
    assert draws <= 60
    assert bits_for(vocab) == {49_152: 16, QWEN: 18}[vocab]


def test_hidden_states_that_float16_cannot_hold_are_refused():
    evidence = evidence_of(torch.randn(3, 5))
    object.__setattr__(evidence, "hidden_MD", torch.eye(3) * 1e6)
    with pytest.raises(Exception, match=r"larger than float16 can hold; set teacher.dtype=bfloat16"):
        Hidden().encode(Scored(evidence, (3,), (b"0" * 16,)))
