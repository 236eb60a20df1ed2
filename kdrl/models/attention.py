"""Attention of a training pass on a CPU: the fused kernel's backward pass takes 3 to 5 times longer in bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "kdrl_float32"
# The attention function of `kdrl.models.packing`.
PACKED = "kdrl_packed"


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
    """Whether a forward pass now will be differentiated in bfloat16 on a CPU."""
    weight = next(lm.parameters())
    low = weight.dtype == torch.bfloat16 or torch.is_autocast_enabled(weight.device.type)
    return low and weight.device.type == "cpu" and torch.is_grad_enabled()


@contextlib.contextmanager
def training_attention(lm: Any, packed: bool = False) -> Iterator[None]:
    """While inside, a forward pass attends packed, or in float32 where it will be differentiated in bfloat16 on a CPU.

    Raises NotImplementedError where a packed pass is asked of a model that does not attend by `sdpa`.
    """
    config = lm.config.get_text_config()
    plain = config._attn_implementation == "sdpa"
    if packed and not plain:
        raise NotImplementedError(f"packed attention in the place of {config._attn_implementation}")
    name = PACKED if packed else _NAME if plain and attends_in_float32(lm) else config._attn_implementation
    with _attending(config, name):
        yield


@contextlib.contextmanager
def _attending(config: Any, name: str) -> Iterator[None]:
    held = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = held


def recompute_layers(lm: Any) -> None:
    """Switch activation checkpointing on: a layer is computed again with the attention that its forward pass had."""
    # The name before transformers 5.2x.
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": partial(_same_attention, lm.config.get_text_config())})


def _same_attention(config: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    name = config._attn_implementation
    ours = name in (_NAME, PACKED)
    return contextlib.nullcontext(), _attending(config, name) if ours else contextlib.nullcontext()


AttentionInterface.register(_NAME, float32_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
