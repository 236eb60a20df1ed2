"""A fused step of fixed shapes, for CUDA graphs: launching its kernels one by one costs more than they do.

The step reads tokens, positions and the column to write from tensors that stay in place, and attends to the whole
buffer under a mask. A graph is captured anew when rows or buffers have changed. On a CPU the same step runs without a
graph, for tests only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl.engines.cache import RoomyLayer
from kdrl.engines.fused import FusedStep


class StaticStep:
    """Runs `fused` on buffers of one shape; `layers` are roomy layers with room for a column more."""

    def __init__(self, fused: FusedStep, layers: list[RoomyLayer], rows: int, device: torch.device) -> None:
        self._fused, self._layers = fused, layers
        self._buffers = [layer.buffers for layer in layers]
        self._columns = torch.arange(self._buffers[0][0].shape[-2], device=device)
        self._token_B = torch.zeros(rows, dtype=torch.long, device=device)
        self._position_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._start_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._column_1 = torch.zeros(1, dtype=torch.long, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden_BD: Tensor | None = None

    def fits(self, rows: int) -> bool:
        """Whether rows and buffers are those that this step was made for."""
        same = all(
            a is b
            for layer, held in zip(self._layers, self._buffers, strict=True)
            for a, b in zip(layer.buffers, held, strict=True)
        )
        return same and rows == len(self._token_B)

    def __call__(self, token_B: Tensor, position_B1: Tensor, start_B1: Tensor, column: int) -> Tensor:
        """Hidden states [B, D] of the new tokens, whose keys and values go to `column`; rows start at `start_B1`."""
        self._token_B.copy_(token_B)
        self._position_B1.copy_(position_B1)
        self._start_B1.copy_(start_B1)
        self._column_1.fill_(column)
        hidden_BD = self._run() if token_B.device.type == "cpu" else self._replay()
        for layer in self._layers:
            layer.advance()
        return hidden_BD

    def _run(self) -> Tensor:
        seen_BL = (self._columns >= self._start_B1) & (self._columns <= self._column_1)
        return self._fused(self._token_B, self._position_B1, seen_BL[:, None, None], self._store)

    def _store(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers[layer]
        keys.index_copy_(2, self._column_1, key.to(keys.dtype))
        values.index_copy_(2, self._column_1, value.to(values.dtype))
        return keys, values

    def _replay(self) -> Tensor:
        if self._graph is None:
            # What runs before the capture writes the same column with the same numbers.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._hidden_BD = self._run()
        self._graph.replay()
        assert self._hidden_BD is not None
        # The graph's own output is overwritten at the next step.
        return self._hidden_BD.clone()
