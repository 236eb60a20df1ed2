"""Attention of a packed row is that of the texts it holds, in value and gradient, by parts and by a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_packing import RAGGED, SHAPES, distance, exact, made, model, passed, peaks
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kdrl.batch import Rollouts, Segment, lay_out
from kdrl.models import NewModel, joined, masked, packing
from kdrl.models.joined import joins
from kdrl.models.packing import Packing, micro_batches, packs, wanted_states

CPU = torch.device("cpu")
WAYS = ("joined", "masked")
Row = tuple[Tensor, Tensor, Tensor]
FORMS = {"ragged": RAGGED, "long": [(70, (130, 33, 257)), (1, (64, 65))]} | SHAPES


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "joins", joins if way == "joined" else lambda *given: False)


def segments_of(shape: Sequence[tuple[int, Sequence[int]]]) -> tuple[Segment, ...]:
    rollouts = Rollouts.of(made(shape))
    return lay_out(rollouts, range(rollouts.rows), torch.ones_like(rollouts.trained_N), 0, packed=True).segments


def row_of(tokens: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> Row:
    """Query, keys and values in the layout of a projection."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(tokens, heads[0] + 2 * heads[1], width, generator=draw, dtype=torch.float64).to(dtype)
    query, key, value = (x.detach().requires_grad_() for x in whole.mul_(2).split([heads[0], heads[1], heads[1]], 1))
    return query, key, value


def text_by_text(segments: Sequence[Segment], row: Row, scale: float | None) -> Tensor:
    """What every segment sees, one text at a time."""
    out, gqa = [], row[0].shape[1] != row[1].shape[1]
    for s in segments:
        parts = [s] if s.parent is None else [segments[s.parent], s]
        q, k, v = (torch.cat([x[p.start : p.start + p.length] for p in parts]).transpose(0, 1)[None] for x in row)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        out.append(mixed[0].transpose(0, 1)[-s.length :])
    return torch.cat(out)


def with_gradient(out: Tensor, row: Row) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * weights).sum(), row)]


def assert_as_alone(segments: Any, row: Any, scale: float | None, bound: float) -> None:
    """Value and gradient of a packed row are those of each text by itself."""
    want = with_gradient(text_by_text(segments, row, scale), row)
    found = with_gradient(Packing(segments, CPU).attend(*row, scale), row)
    for a, b in zip(found, want, strict=True):
        assert (a - b).norm() < bound * b.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 8), ((6, 2), 5), ((4, 1), 16)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_are_those_of_each_text(
    form: str, heads: tuple[int, int], width: int, way: str, monkeypatch: pytest.MonkeyPatch
):
    choose(way, monkeypatch)
    segments = segments_of(FORMS[form])
    row = row_of(sum(s.length for s in segments), heads, width, torch.float64)
    for scale in (None, 0.7):
        assert_as_alone(segments, row, scale, 1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_that_decides_and_one_that_is_not_seen(way: str, monkeypatch: pytest.MonkeyPatch):
    """Scores of some hundreds on either side: a share is 0 or 1, and nothing overflows."""
    choose(way, monkeypatch)
    segments = segments_of([(5, (7, 3))])
    for prompt, own in ((60.0, 1.0), (1.0, 60.0), (-60.0, 60.0), (60.0, 60.0)):
        row = row_of(sum(s.length for s in segments), (4, 2), 8, torch.float64)
        with torch.no_grad():
            row[1][:5] *= prompt
            row[1][5:] *= own
        assert_as_alone(segments, row, None, 1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_padding_and_masks_of_rows_make_no_difference(way: str, monkeypatch: pytest.MonkeyPatch):
    """Every way to cut a packed row into calls: a call a segment, one for all, one mask or one a row."""
    choose(way, monkeypatch)
    loaded, rollouts = exact("llama"), Rollouts.of(made(RAGGED))
    want = passed(loaded, rollouts, rollouts.trained_N, packed=False)
    counts, segments = set(), segments_of(RAGGED)
    for waste, call, rows in ((10**9, 0, 0), (1, 10**9, 10**9), (3, 1 << 10, 0), (3, 64, 256)):
        monkeypatch.setattr(joined, "_WASTE", waste)
        monkeypatch.setattr(masked, "_ROWS", rows)
        for module in (joined, masked):
            monkeypatch.setattr(module, "_CALL", call)
        made_of = joined.Parts(segments).rows if way == "joined" else masked.Masked(segments, CPU).blocks
        counts.add(len(made_of))
        assert max(distance(passed(loaded, rollouts, rollouts.trained_N, True), want)) < 1e-10
    assert len(counts) > 2
    # Filler, which no prompt precedes, goes with the others in one call, but not under their mask.
    assert min(counts) == (1 if way == "joined" else 3)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_by_mask_is_the_padded_one(shape: str, architecture: str, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU; test_packing has the same by parts."""
    choose("masked", monkeypatch)
    loaded, rollouts = exact(architecture), Rollouts.of(made(SHAPES[shape]))
    want = passed(loaded, rollouts, rollouts.trained_N, packed=False)
    assert max(distance(passed(loaded, rollouts, rollouts.trained_N, packed=True), want)) < 1e-10


def test_a_mask_is_bounded_and_longer_texts_are_padded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "MASK", 800)
    assert packs(model(), 10**6), "there is no mask where there are parts"
    choose("masked", monkeypatch)
    loaded, limit = model(), math.isqrt(800 // 2)  # two heads share keys
    assert packs(loaded, limit)
    assert not packs(loaded, limit + 1)
    for prompt, packed in ((limit - 9, True), (limit - 8, False)):
        rollouts = Rollouts.of(made([(prompt, (10, 3)), (3, (5, 5))]))  # a last token is not read
        batches = list(micro_batches(loaded, rollouts, range(4), rollouts.trained_N, 4096))
        assert {bool(micro.segments) for micro in batches} == {packed}


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("shape", [[(64, (1024, 1024))], [(40, (600,) * 4)]], ids=str)
def test_long_responses_packed_hold_no_more_than_padded(shape: list[tuple[int, tuple[int, ...]]], kv_heads: int):
    """What a mask of tokens x tokens would cost shows in long responses alone."""
    sizes: dict[str, Any] = {"hidden_size": 64, "layers": 2, "heads": 8, "head_dim": 8, "intermediate_size": 96}
    new = NewModel(architecture="qwen3", kv_heads=kv_heads, max_positions=2048, **sizes)
    padded, packed = peaks(new, shape, 1 << 14)
    assert packed <= padded * (1 + 1 / 32)  # the filler that makes lengths even


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_without_a_gradient_is_as_near_to_float64_as_texts_alone(
    way: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
):
    choose(way, monkeypatch)
    for form in ("ragged", "long"):
        segments = segments_of(FORMS[form])
        q, k, v = (x.detach() for x in row_of(sum(s.length for s in segments), (4, 2), 16, torch.bfloat16))
        want = text_by_text(segments, (q.double(), k.double(), v.double()), None)
        found = Packing(segments, CPU).attend(q, k, v, None), text_by_text(segments, (q, k, v), None)
        packed, alone = (float((x.double() - want).norm() / want.norm()) for x in found)
        record_property(f"{form}: error against float64, packed and padded", (packed, alone))
        assert found[0].dtype == torch.bfloat16
        assert packed < 0.006
        assert packed < 1.5 * alone


@pytest.mark.parametrize("low", [{"autocast": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
def test_a_bfloat16_teacher_is_as_near_to_float64_packed_as_padded(low: dict[str, Any], record_property: Any):
    rollouts = Rollouts.of(made(FORMS["ragged"]))
    want_ND = passed(exact("qwen3"), rollouts, rollouts.trained_N, packed=False)[0]
    loaded, errors = model(**low), []
    with torch.no_grad():
        for padded in (False, True):
            found_ND = torch.zeros_like(want_ND)
            for micro in micro_batches(loaded, rollouts, range(rollouts.rows), rollouts.trained_N, 4096, padded=padded):
                found_ND[micro.index_M] = wanted_states(loaded, micro).double()
            errors.append(float((found_ND - want_ND).norm() / want_ND.norm()))
    record_property("error against float64: packed, padded", errors)
    assert errors[0] < 0.04
    assert errors[0] < 1.3 * errors[1]
