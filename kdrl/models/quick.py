"""The same layers by faster kernels: float32 linear layers on a CPU by oneDNN, RMS norms in one piece.

oneDNN is twice as fast as the BLAS behind PyTorch's products on AMD processors; a norm keeps one array for its gradient
where the library's modules keep three. Left out: linear layers under autocast and in other
formats, which take oneDNN anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdrl.objectives.products import product

# Others of the name multiply by 1 + weight, or normalise in groups.
_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm"}


class _Product(torch.autograd.Function):
    """x W^T + b over the last dimension of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = product(x.reshape(-1, x.shape[-1]), weight)
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_MN = grads[0].reshape(-1, grads[0].shape[-1])
        return (
            product(grad_MN, weight.T).view(x.shape) if of_x else None,
            _of_weight(grad_MN, x.reshape(-1, x.shape[-1])) if of_weight else None,
            grad_MN.sum(0) if of_bias else None,
        )


def _of_weight(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """grad^T x `[N, K]`. oneDNN copies the first factor to turn it: with many rows, the narrower had better be that."""
    rows, outputs, inputs = *grad_MN.shape, x_MK.shape[1]
    if rows * (outputs - inputs) > 2 * outputs * inputs:
        return product(x_MK.T, grad_MN.T).T.contiguous()
    return product(grad_MN.T, x_MK.T)


class QuickLinear(nn.Linear):
    """A linear layer with the same weights under the same names."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x W^T + b."""
        plain = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel()
        if not plain or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight, computed in float32 or better and rounded once; keeps x and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit, grad = x * scale, grads[0].to(scale.dtype)
        of_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        pull = grad * weight
        along = torch.linalg.vecdot(pull, unit).unsqueeze(-1).div_(x.shape[-1])
        return torch.addcmul(pull, unit, along, value=-1).mul_(scale).to(x.dtype), of_weight, None


class QuickNorm(nn.Module):
    """An RMS norm with the same weight under the same name; rounded once, where the library rounds twice."""

    weight: nn.Parameter
    variance_epsilon: float
    library_class: type[nn.Module]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x / rms(x) * weight over the last dimension."""
        x, weight = hidden_states, self.weight
        if x.is_cuda and x.dtype == weight.dtype:
            return functional.rms_norm(x, weight.shape, weight, self.variance_epsilon)
        return _Norm.apply(x, weight, self.variance_epsilon)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Size and offset, as the library shows them."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def quicken(model: nn.Module) -> None:
    """Let a model's plain linear layers and RMS norms be quick ones, in place."""
    for module in model.modules():
        kind = type(module)
        if kind is nn.Linear and torch.backends.mkldnn.is_available():
            module.__class__ = QuickLinear
        elif kind.__name__ in _NORMS and kind.__module__.startswith("transformers."):
            module.library_class = kind  # type: ignore[assignment]
            module.__class__ = QuickNorm  # type: ignore[assignment]


@contextlib.contextmanager
def library_layers(model: nn.Module) -> Iterator[None]:
    """While inside, a model's layers are those of the library again, as a benchmark's other side has them."""
    held = [(module, type(module)) for module in model.modules() if isinstance(module, QuickLinear | QuickNorm)]
    for module, kind in held:
        module.__class__ = nn.Linear if kind is QuickLinear else module.library_class  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in held:
            module.__class__ = kind  # type: ignore[assignment]
