"""Attention of a training pass on a CPU: the fused kernel's backward pass takes 3 to 5 times longer in bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "kdrl_float32"


def float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """A transformers attention function: `sdpa` in float32, whatever surrounds it; the result is of query's type."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        mixed = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)[0]
    return mixed.to(query.dtype), None


def attends_in_float32(lm: Any) -> bool:
    """Whether a forward pass now will be differentiated in bfloat16 on a CPU, and not recomputed in the backward."""
    weight = next(lm.parameters())
    low = weight.dtype == torch.bfloat16 or torch.is_autocast_enabled(weight.device.type)
    # What is recomputed in the backward pass must be what the forward pass did, and that is after this context.
    recomputed = getattr(lm, "is_activation_checkpointing", None)
    if recomputed is None:  # the name before transformers 5.2x
        recomputed = getattr(lm, "is_gradient_checkpointing", False)
    return low and weight.device.type == "cpu" and torch.is_grad_enabled() and not recomputed


@contextlib.contextmanager
def training_attention(lm: Any) -> Iterator[None]:
    """While inside, a forward pass that will be differentiated in bfloat16 on a CPU attends in float32."""
    config = lm.config.get_text_config()
    if config._attn_implementation != "sdpa" or not attends_in_float32(lm):
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


AttentionInterface.register(_NAME, float32_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
