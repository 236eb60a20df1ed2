"""Fake quantisation: linear weights rounded to a few bits in every forward pass, with a straight-through gradient.

Grid and group as in AWQ and BitDistiller (arXiv 2402.10631). Left out: BitDistiller's search for clipping bounds before
training and its NF3 format, quantised activations, and packed integer files.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils import parametrize

from kdrl.errors import UserError, nearest
from kdrl.models.config import QuantiseConfig
from kdrl.models.heads import causal_lm


def fake_quantise(weight_OI: Tensor, bits: int, group: int, scheme: str) -> Tensor:
    """Weights `[O, I]` rounded to a grid per output row and `group` inputs, in the weights' own format.

    asymmetric: s = (max(w, 0) - min(w, 0)) / (2^bits - 1), z = -round(min(w, 0) / s), w' = s (clamp(round(w / s) + z,
    0, 2^bits - 1) - z). symmetric: s = max|w| / (2^(bits - 1) - 1), w' = s round(w / s). A short last group has a
    scale of its own; a group of zeros stays zero.
    """
    rows, width = weight_OI.shape
    size = min(group, width)
    wide = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
    # Zeros in the padding change neither bound: both grids hold zero.
    w = nn.functional.pad(wide, (0, -width % size)).view(rows, -1, size)
    if scheme == "symmetric":
        top = 2 ** (bits - 1) - 1
        scale = w.abs().amax(-1, keepdim=True) / top
        low, high, zero = -top, top, torch.zeros_like(scale)
        scale = torch.where(scale > 0, scale, 1.0)
    else:
        smallest = w.amin(-1, keepdim=True).clamp(max=0)
        low, high = 0, 2**bits - 1
        scale = (w.amax(-1, keepdim=True).clamp(min=0) - smallest) / high
        scale = torch.where(scale > 0, scale, 1.0)
        zero = -torch.round(smallest / scale)
    rounded = scale * ((torch.round(w / scale) + zero).clamp(low, high) - zero)
    return rounded.view(rows, -1)[:, :width].to(weight_OI.dtype)


class _StraightThrough(torch.autograd.Function):
    """`fake_quantise` forward, the identity backward (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight_OI: Tensor, bits: int, group: int, scheme: str) -> Tensor:
        return fake_quantise(weight_OI, bits, group, scheme)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None


class FakeQuantise(nn.Module):
    """A parametrization of one weight; `enabled` is False where the full-precision weights are asked for."""

    enabled = True

    def __init__(self, config: QuantiseConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, weight_OI: Tensor) -> Tensor:
        """The weight as the layer multiplies by it."""
        if not self.enabled:
            return weight_OI
        config = self.config
        out: Tensor = _StraightThrough.apply(weight_OI, config.bits, config.group, config.scheme)  # type: ignore
        device = weight_OI.device.type
        if not torch.is_grad_enabled() and torch.is_autocast_enabled(device):
            # Autocast would cast it at every use; here it is cast once for as long as it is kept.
            out = out.to(torch.get_autocast_dtype(device))
        return out


def quantise(model: Any, config: QuantiseConfig) -> list[str]:
    """Quantise every linear layer of a causal LM but its head and `skip`, in place; returns the layers' names.

    Raises UserError for matrices outside of linear layers and embeddings, and for a name in `skip` that is none.
    """
    lm: Any = causal_lm(model)
    head = lm.get_output_embeddings()
    linear = {name: m for name, m in lm.named_modules() if isinstance(m, nn.Linear)}
    _refuse_others(lm)
    for asked in config.skip:
        if not any(_named(name, asked) for name in linear):
            last = {name.rsplit(".", 1)[-1] for name in linear}
            raise UserError(f"student.quantise.skip: no linear layer is called {asked!r}{nearest(asked, last)}")
    chosen = {
        name: m for name, m in linear.items() if m is not head and not any(_named(name, asked) for asked in config.skip)
    }
    if not chosen:
        raise UserError("student.quantise leaves no linear layer to quantise; shorten student.quantise.skip.")
    for module in chosen.values():
        parametrize.register_parametrization(module, "weight", FakeQuantise(config))
    return list(chosen)


def _named(name: str, asked: str) -> bool:
    """Whether `asked` is a layer's name, or a whole part of it, such as `down_proj` or `layers.0`."""
    return f".{asked}." in f".{name}."


def _refuse_others(lm: nn.Module) -> None:
    for name, module in lm.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                raise UserError(
                    f"{type(lm).__name__} holds matrices outside of linear layers ({name}.{key}), which would stay "
                    "unquantised; leave student.quantise out for this architecture."
                )


def is_quantised(model: Any) -> bool:
    """Whether any weight of the model is quantised in its forward pass."""
    return any(isinstance(m, FakeQuantise) for m in causal_lm(model).modules())


@contextlib.contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """While inside, the model computes with the weights that are trained, not with the rounded ones."""
    found = [m for m in causal_lm(model).modules() if isinstance(m, FakeQuantise)]
    before = [m.enabled for m in found]
    for m in found:
        m.enabled = False
    try:
        yield
    finally:
        for m, enabled in zip(found, before, strict=True):
            m.enabled = enabled


@contextlib.contextmanager
def kept_weights(model: Any) -> Iterator[None]:
    """While inside and without gradient, rounded weights are made once: decoding would round them at every step."""
    if torch.is_grad_enabled() or not is_quantised(model):
        yield
        return
    with parametrize.cached():
        yield


def dequantised(model: Any) -> Any:
    """A copy of the model whose weights are the rounded ones, with nothing left that rounds."""
    plain = copy.deepcopy(model)
    lm: Any = causal_lm(plain)
    for name, module in list(lm.named_modules()):
        if parametrize.is_parametrized(module, "weight"):
            # Not remove_parametrizations: it alters the class, which the copy shares with the original.
            lm.set_submodule(name, _plain_linear(module))
    return plain


@torch.no_grad()
def _plain_linear(module: Any) -> nn.Linear:
    layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(module.weight.detach().clone())
    layer.bias = module.bias
    return layer.train(module.training)
