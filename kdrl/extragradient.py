"""Extragradient: every second step starts where the one before it did, with the gradient found after that one.

x' = x - lr F(x), then x <- x - lr F(x'), each by the rule of the optimizer underneath, moments included (Korpelevich's
method; in EGPO, arXiv 2503.08942, for preferences that make a game of the policy against itself). Left out: EGPO's own
placing of the second gradient, at x on text that x' wrote.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_KEPT = "before_"


class Extragradient(torch.optim.Optimizer):
    """Mixed in before an optimizer; what it keeps stands in that one's state, and so in checkpoints."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Look ahead and keep the way back, or go back and make the step that counts."""
        parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        ahead = any(f"{_KEPT}weight" in self.state.get(p, {}) for p in parameters)
        if ahead:
            for p in parameters:
                self._go_back(p)
            return super().step(closure)
        before = {p: {"weight": p.clone(), **self._moments(p)} for p in parameters if p.grad is not None}
        done = super().step(closure)
        for p, kept in before.items():
            self.state[p].update({_KEPT + key: value for key, value in kept.items()})
        return done

    def _moments(self, p: Tensor) -> dict[str, Any]:
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.state.get(p, {}).items()}

    def _go_back(self, p: Tensor) -> None:
        state = self.state.get(p, {})
        kept = {key.removeprefix(_KEPT): value for key, value in state.items() if key.startswith(_KEPT)}
        if "weight" in kept:
            p.copy_(kept.pop("weight"))
            state.clear()
            state.update(kept)
