"""The counter of live bytes against tensors whose lives are known."""

from __future__ import annotations

import torch

from kdrl.bench.allocations import Allocations, Recorded


def test_live_and_peak_bytes_by_hand():
    before = torch.randn(1000)
    with Allocations() as seen:
        part = before[:10]
        assert (seen.live, seen.peak) == (0, 0), "a view, and what was there before"
        one = part + 1.0
        assert seen.live == 40
        two = torch.cat([one, one])
        assert (seen.live, seen.peak) == (120, 120)
        seen_as_pairs = two.view(10, 2)
        del one, two
        assert seen.live == 80, "a view keeps its storage"
        seen_as_pairs.mul_(2.0)
        del seen_as_pairs
        assert (seen.live, seen.peak) == (0, 120)


def test_what_autograd_keeps_is_counted_until_the_backward_pass():
    leaf = torch.randn(1000, requires_grad=True)
    with Allocations() as seen:
        value = leaf.exp().exp().sum()
        assert seen.live == 8004, "both results of exp, and the sum"
        value.backward()
        del value
        assert seen.live == 4000, "the gradient"


def test_the_peak_above_a_gradient_leaves_out_it_and_its_sum_and_nothing_of_their_size():
    weight = torch.randn(20, 50, dtype=torch.bfloat16, requires_grad=True)
    with Recorded() as seen:
        other = torch.zeros(20, 50)
        gradient = torch.ones(20, 50) + 1.0
        del other
        weight.grad = gradient.to(torch.bfloat16)
        del gradient
    assert seen.peak == 12_000, "what is added to is dead when the other is"
    assert seen.peak_above() == seen.peak
    assert seen.peak_above(weight.grad) == 8000, "two float32 arrays of the gradient's shape beside its sum"
    assert seen.live == 2000
