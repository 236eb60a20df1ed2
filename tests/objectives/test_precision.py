from __future__ import annotations

import torch

from kdrl.objectives.precision import exact_products


def products(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b = torch.randn(33, 65).to(dtype), torch.randn(65, 129).to(dtype)
    with exact_products(a, b):
        return a.float() @ b.float(), a.double() @ b.double()


def test_factors_that_are_bfloat16_lose_nothing():
    found, exact = products(torch.bfloat16)
    assert (found - exact).abs().max() < 2e-5  # a product rounded to bfloat16 would be off by 0.06


def test_float32_factors_keep_their_precision():
    found, exact = products(torch.float32)
    assert (found - exact).abs().max() < 2e-5  # read as bfloat16 they would be off by 0.1


def test_the_setting_is_put_back():
    before = torch.get_float32_matmul_precision()
    with exact_products(torch.zeros(1, dtype=torch.bfloat16)):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
