from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdrl.models.quick import QuickLinear, quicken


def pair(bias: bool, inputs: int = 40, outputs: int = 96) -> tuple[nn.Linear, QuickLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias)
    quick = nn.Sequential(copy.deepcopy(plain))
    quicken(quick)
    assert isinstance(quick[0], QuickLinear)
    return plain, quick[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (3, 257, 40), (2, 1, 5, 40), (0, 40)])
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
