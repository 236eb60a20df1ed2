"""Products that sum in float32 or better, against float64, in every format, and that no weight is widened whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrl.bench.allocations import Allocations
from kdrl.objectives import products
from kdrl.objectives.head import Head, LowRank
from kdrl.objectives.products import add_columns_by_rows, rows_by_columns, rows_by_rows, wide_of

SHAPES = [(0, 5, 3), (1, 7, 3), (5, 4097, 64), (64, 9000, 128)]
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm()) if exact.numel() else 0.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_products_lose_nothing_but_float32_rounding(shape: tuple[int, int, int], dtype: torch.dtype):
    count, vocabulary, width = shape
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(count, width, generator=random).to(dtype), torch.randn(vocabulary, width).to(dtype)
    wide = wide_of(x, w)
    assert wide == torch.promote_types(dtype, torch.float32)
    z = torch.randn(count, vocabulary, generator=random, dtype=wide)
    total = torch.randn(vocabulary + 2, width, generator=random, dtype=wide)
    exact = total.double()
    exact[:vocabulary] += z.double().T @ x.double()
    assert off(rows_by_columns(x, w), x.double() @ w.double().T) < BOUNDS[dtype]
    assert off(rows_by_rows(z, w), z.double() @ w.double()) < BOUNDS[dtype]
    add_columns_by_rows(total[:vocabulary], z, x)
    assert off(total, exact) < BOUNDS[dtype]
    assert rows_by_columns(x, w).dtype == rows_by_rows(z, w).dtype == wide


def test_without_onednn_the_products_are_the_same(monkeypatch: pytest.MonkeyPatch):
    x, w = torch.randn(64, 128), torch.randn(9000, 128)
    found = rows_by_columns(x, w)
    monkeypatch.setattr(products, "_ONEDNN", None)
    assert off(found, rows_by_columns(x, w).double()) < 1e-6


def test_mixed_formats_take_the_wider_one():
    x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4).bfloat16()
    assert rows_by_columns(x, w).dtype == torch.float64
    assert off(rows_by_columns(x.float(), w), x.float().double() @ w.double().T) < 1e-6


def test_low_precision_weights_are_widened_in_blocks():
    x, w = torch.randn(8, 64).bfloat16(), torch.randn(50_000, 64).bfloat16()
    z, total = torch.randn(8, 50_000), torch.zeros(50_000, 64)
    whole, logits = 4 * w.numel(), 4 * z.numel()
    with Allocations() as seen:
        rows_by_columns(x, w)
        assert seen.peak < logits + whole / 5
        rows_by_rows(z, w)
        add_columns_by_rows(total, z, x)
    assert seen.peak < logits + whole / 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_products_sum_in_float32(dtype: torch.dtype):
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 128, generator=random).to(dtype), torch.randn(9000, 128, generator=random).to(dtype)
    z, total = torch.randn(64, 9000, generator=random), torch.zeros(9000, 128)
    # float32 numbers are rounded to the weights' format before they are multiplied, so 2^-9 of each.
    bound = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert off(rows_by_columns(x.cuda(), w.cuda()).cpu(), x.double() @ w.double().T) < 1e-5
    assert off(rows_by_rows(z.cuda(), w.cuda()).cpu(), z.double() @ w.double()) < bound
    on_gpu = total.cuda()
    add_columns_by_rows(on_gpu, z.cuda(), x.cuda())
    assert off(on_gpu.cpu(), z.double().T @ x.double()) < bound


@pytest.mark.parametrize("rows", [1, 3, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packed_weights_give_the_same_product_for_any_number_of_rows(rows: int, dtype: torch.dtype):
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, 37, generator=random).to(dtype), torch.randn(53, 37, generator=random).to(dtype)
    laid = products.packed(w, 64)
    # In float64 there is no such layout, and the weights are given back.
    assert laid.is_mkldnn == (dtype == torch.float32 or (dtype == torch.bfloat16 and products._BFLOAT16))
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert off(products.product(x, laid), x.double() @ w.double().T) < bound


@pytest.mark.parametrize("rows", [None, 41])
def test_a_packed_head_gives_the_heads_logits(rows: int | None):
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    low = LowRank(draw(4, 32), draw(48, 4), 0.5)
    head = Head(draw(48, 32), draw(48), scale=0.7, softcap=5.0, rows=rows, adapters=(low,))
    hidden_ND = draw(9, 32)
    with torch.no_grad():
        laid = head.packed(9)
        assert laid.weight_VD.is_mkldnn
        assert laid.vocab_size == head.vocab_size
        torch.testing.assert_close(laid.logits(hidden_ND), head.logits(hidden_ND), atol=1e-5, rtol=1e-5)
