"""The student's trained parameters at another moment: a running mean, an earlier state, the start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kdrl.errors import UserError


class WeightCopy:
    """Copies of a model's trained parameters that take their place for a while; with LoRA, of the adapters alone.

    `wide` keeps them in float32 or better, as a running mean of bfloat16 weights needs.
    """

    def __init__(self, model: Any, *, wide: bool = False) -> None:
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32) if wide else p.dtype, copy=True)
            for name, p in self._live.items()
        }

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the model computes with the copies."""
        held = {name: p.data for name, p in self._live.items()}
        try:
            for name, p in self._live.items():
                p.data = self.tensors[name].to(p.dtype)
            yield
        finally:
            for name, p in self._live.items():
                p.data = held[name]

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """copy <- (1 - rate) copy + rate live."""
        for name, p in self._live.items():
            self.tensors[name].mul_(1.0 - rate).add_(p.detach(), alpha=rate)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the live parameters as they are."""
        for name, p in self._live.items():
            self.tensors[name].copy_(p)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back saved copies; raises UserError when they are of other parameters."""
        for name, mine in self.tensors.items():
            if name not in tensors or tensors[name].shape != mine.shape:
                raise UserError(
                    f"the checkpoint's self-teacher does not hold {name} of shape {list(mine.shape)}; resume with the "
                    "recipe that the run was started with."
                )
            mine.copy_(tensors[name])
