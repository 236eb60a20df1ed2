from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kdrl.models.quick import QuickLinear, QuickNorm, library_layers, quicken


def pair(bias: bool, inputs: int = 40, outputs: int = 96) -> tuple[nn.Linear, QuickLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias)
    quick = nn.Sequential(copy.deepcopy(plain))
    quicken(quick)
    assert isinstance(quick[0], QuickLinear)
    return plain, quick[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (3, 257, 40), (2, 1, 5, 40), (0, 40)])  # many rows, few, none
@pytest.mark.parametrize("frozen", [True, False])
def test_value_and_gradient_are_those_of_a_linear_layer(bias: bool, shape: tuple[int, ...], frozen: bool):
    plain, quick = pair(bias)
    found = []
    for layer in (plain, quick):
        layer.requires_grad_(not frozen)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        out = layer(x)
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        found.append([out, x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_gradients_that_are_expanded_or_transposed_are_read_right():
    plain, quick = pair(True, 64, 128)
    grads = [torch.ones(1, 1).expand(500, 128), torch.randn(128, 500).T]
    for grad in grads:
        found = []
        for layer in (plain, quick):
            layer.zero_grad()
            x = torch.randn(64, 500, generator=torch.Generator().manual_seed(2)).T.requires_grad_()
            layer(x).backward(grad)
            found.append((x.grad, layer.weight.grad))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_other_formats_and_autocast_are_left_to_pytorch():
    plain, quick = pair(False)
    x = torch.randn(5, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain(x), quick(x))
        assert quick(x).dtype == torch.bfloat16
    assert torch.equal(plain.double()(x.double()), quick.double()(x.double()))


def test_names_and_weights_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quicken(model)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(copy.deepcopy(model)[0]) is QuickLinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm])
def test_norms_are_at_least_as_exact_as_the_librarys_own(kind: Any, dtype: torch.dtype):
    plain = kind(24, eps=1e-5)
    with torch.no_grad():
        plain.weight.normal_()
    plain = plain.to(dtype)
    quick = nn.Sequential(copy.deepcopy(plain))
    quicken(quick)
    assert type(quick[0]) is QuickNorm
    draw = torch.randn(50, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    upstream = torch.linspace(-1, 1, 24, dtype=torch.float64)

    def numbers(layer: Any, weight: Tensor, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        out = layer(x)
        assert out.dtype == x.dtype
        (out * upstream.to(out.dtype)).sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        return [out.detach().double(), x.grad.double(), weight.grad.double()]

    exact = plain.weight.detach().double().requires_grad_()
    truth = numbers(lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * exact, exact, draw.double())
    theirs, mine = numbers(plain, plain.weight, draw), numbers(quick[0], quick[0].weight, draw)
    for a, b, c in zip(theirs, mine, truth, strict=True):
        assert (b - c).abs().mean() <= 1.2 * (a - c).abs().mean() + 1e-14


def test_a_norm_of_float64_has_the_exact_gradient():
    layer = nn.Sequential(LlamaRMSNorm(6, eps=1e-3)).double()
    quicken(layer)
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(layer, {"0.weight": w}, (x,)), (x, layer[0].weight)
    )


def test_a_norm_under_autocast_reads_bfloat16_and_gives_what_the_library_gives():
    theirs, mine = LlamaRMSNorm(16), nn.Sequential(LlamaRMSNorm(16))
    quicken(mine)
    x = torch.randn(3, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mine(x).dtype == theirs(x).dtype == torch.float32
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-2, atol=1e-2)


def test_the_librarys_own_layers_can_be_had_back_for_a_while():
    model = nn.Sequential(nn.Linear(3, 4), LlamaRMSNorm(4))
    quicken(model)
    with library_layers(model):
        assert [type(m) for m in model] == [nn.Linear, LlamaRMSNorm]
    assert [type(m) for m in model] == [QuickLinear, QuickNorm]
