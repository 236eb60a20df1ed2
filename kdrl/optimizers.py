"""Optimizers of the student: AdamW, its moments in 8 bits or paged, and float32 weights behind bfloat16 ones.

Left out: 32-bit moments for embeddings under 8-bit AdamW, optimizers other than AdamW.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kdrl.errors import UserError
from kdrl.extragradient import Extragradient

OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]

_CLASSES = {"adamw_8bit": "AdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}
# Of bitsandbytes: smaller tensors keep float32 moments; others have a float32 scale per block and moment.
SMALLEST_IN_8BIT, BLOCK = 4096, 256
_MASTER = "master"


class MasterWeights(torch.optim.Optimizer):
    """Mixed in before an optimizer: it steps on a float32 copy of each low-precision weight, which is then rounded.

    The copies stand in the optimizer's state, and so in checkpoints. Moments are float32 as well.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the optimizer underneath on the copies."""
        low: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.dtype in (torch.bfloat16, torch.float16):
                grad, low[p] = p.grad, (p.data, p.grad)
                # Out of the state meanwhile: an optimizer takes an empty state for its first step.
                master = self.state[p].pop(_MASTER, None)
                p.grad = None
                p.data = p.data.float() if master is None else master
                p.grad = grad.float()
        done = super().step(closure)
        for p, (data, grad) in low.items():
            self.state[p][_MASTER] = p.data
            data.copy_(p.data)
            p.grad = None
            p.data, p.grad = data, grad
        return done


def build_optimizer(
    groups: Sequence[Mapping[str, Any]],
    kind: OptimizerKind,
    *,
    betas: tuple[float, float],
    eps: float,
    extragradient: bool = False,
    master_weights: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of some parameter groups, its learning rate 0 until a step sets it.

    AdamW is fused, which on a CPU takes a quarter of the time. Raises UserError where a kind cannot be had.
    """
    devices = {p.device.type for group in groups for p in group["params"]}
    check_kind(kind, devices)
    base = _class(kind)
    parts = [Extragradient] * extragradient + [MasterWeights] * master_weights
    # The name goes into checkpoints, which are refused by another optimizer.
    name = "".join(part.__name__ for part in (*parts, base))
    made: Any = type(name, (*parts, base), {}) if parts else base
    options = {"fused": True} if kind == "adamw" else {}
    return made([dict(group) for group in groups], lr=0.0, betas=betas, eps=eps, **options)


def check_kind(kind: OptimizerKind, devices: Iterable[str]) -> None:
    """Raise UserError for a kind that parameters on these types of devices cannot have, or without bitsandbytes."""
    if kind == "adamw":
        return
    if kind.startswith("paged") and "cpu" in devices:
        raise UserError(
            f"optimizer.kind={kind} keeps moments in memory that a GPU pages out, and this run is on the CPU; use "
            "optimizer.kind=adamw_8bit or adamw."
        )
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        raise UserError(
            f"optimizer.kind={kind} needs the package bitsandbytes; install it with: pip install 'kdrl[gpu]', or use "
            "optimizer.kind=adamw."
        ) from None


def _class(kind: OptimizerKind) -> type[torch.optim.Optimizer]:
    if kind == "adamw":
        return torch.optim.AdamW
    return getattr(importlib.import_module("bitsandbytes").optim, _CLASSES[kind])


def state_bytes(kind: OptimizerKind, trainable: int, weight_bytes: int, *, master_weights: bool) -> tuple[int, str]:
    """Bytes of an optimizer's state on the device that computes, and the formula; paged moments are counted whole."""
    master = master_weights and weight_bytes < 4
    if kind.endswith("8bit"):
        each, how = 2 * (1 + 4 / BLOCK), f"2 x 1 B and a scale per {BLOCK}"
    else:
        wide = 4 if master or kind != "adamw" else weight_bytes
        each, how = 2.0 * wide, f"2 x {wide} B"
    if master:
        each, how = each + 4, f"{how}, a weight of 4 B"
    return int(trainable * each), f"{kind}: {trainable:,} x ({how})"
