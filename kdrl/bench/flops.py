"""Floating-point operations of an update, and what the device reaches on a large matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Rollouts
from kdrl.bench.turns import seconds_of
from kdrl.model_shape import ModelShape
from kdrl.models import LoadedModel
from kdrl.models.heads import causal_lm

# Dense bfloat16 products, TFLOP/s, from the makers' data sheets; the first that is part of the device's name.
_PEAKS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L40": 181, "A10G": 70, "A10": 125, "L4": 121, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "A6000": 155,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Operations of one model a token: `body` of its matrices in each position, `attention` for each pair of positions,
    `head` for each token that is predicted; `passes` of forward passes that forward and backward together are worth.
    """

    body: float
    attention: float
    head: float
    passes: float

    @classmethod
    def of(cls, loaded: LoadedModel) -> Cost | None:
        """Counted from the model; None for a mixture of experts, of which a token passes but a part."""
        lm: Any = causal_lm(loaded.model)
        config = lm.config.get_text_config()
        if getattr(config, "num_experts_per_tok", None):
            return None
        shape = ModelShape.from_model(lm)
        table = shape.vocabulary * shape.width
        tied = bool(getattr(config, "tie_word_embeddings", False))
        weights = sum(p.numel() for name, p in lm.named_parameters() if p.ndim >= 2 and "lora_" not in name)
        adapted = any("lora_" in name for name, _ in lm.named_parameters())
        return cls(
            body=2.0 * (weights - (table if tied else 2 * table)),
            attention=4.0 * shape.query_width * shape.layers,
            head=2.0 * table,
            # With adapters the frozen weights take no gradient.
            passes=2.0 if adapted else 3.0,
        )

    def of_update(self, rollouts: Rollouts, wanted_N: Tensor) -> float:
        """Operations that an update on the wanted tokens cannot do without, each distinct prompt read once.

        Recomputed activations, padding, prompts read again and what follows a response's last wanted token count
        nothing.
        """
        place_N = torch.arange(rollouts.tokens, device=wanted_N.device)
        prompts: set[tuple[int, ...]] = set()
        total = 0.0
        for row in rollouts.row_N[wanted_N].unique().tolist():
            start, end = rollouts.span(row)
            places = place_N[start:end][wanted_N[start:end]]
            # A token is predicted from the position before it; the first from the prompt's end.
            read, before = int(places[-1]) - start, len(rollouts.responses[row].prompt_ids)
            prompts.add(tuple(rollouts.responses[row].prompt_ids))
            total += self._read(read, before) + len(places) * self.head
        return (total + sum(self._read(len(prompt), 0) for prompt in prompts)) * self.passes

    def _read(self, count: int, before: int) -> float:
        """Of `count` positions that follow `before` others."""
        return count * self.body + (count * before + count * (count + 1) / 2) * self.attention


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the best of three."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> Tensor:
        return a @ b

    product()
    return 2.0 * size**3 / min(seconds_of(product) for _ in range(3))


def peak_flops(device: str) -> float | None:
    """A GPU's dense bfloat16 operations a second by its data sheet, None for one that is not known and for a CPU."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in _PEAKS.items() if known in name), None)
