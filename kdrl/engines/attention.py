"""Attention of one new token on a CPU in float32: two matrix products are 2 to 3 times faster than the fused kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "kdrl_single_query"
# What the two products below do not compute; a layer that asks for one of these gets the library's own kernel.
_OTHER_KINDS = ("softcap", "s_aux", "position_bias", "cache")


def single_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A transformers attention function; prompts and low precision go to the library's fused kernel."""
    if (
        query.shape[2] != 1
        or query.dtype != torch.float32
        or any(kwargs.get(kind) is not None for kind in _OTHER_KINDS)
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    grouped = (query * scale).reshape(rows, key.shape[1], -1, width)
    score = torch.matmul(grouped, key.transpose(2, 3))
    if attention_mask is not None:
        if attention_mask.shape[1] != 1:  # a mask a head, such as ALiBi
            attention_mask = attention_mask.reshape(rows, key.shape[1], -1, attention_mask.shape[-1])
        score = masked(score, attention_mask)
    mixed = torch.matmul(torch.softmax(score, -1), value)
    return mixed.view(rows, 1, heads, value.shape[-1]), None


def masked(score: Tensor, mask: Tensor) -> Tensor:
    """Scores with a mask laid on in place: bool, or to be added."""
    return score.masked_fill_(~mask, torch.finfo(score.dtype).min) if mask.dtype == torch.bool else score.add_(mask)


@contextlib.contextmanager
def fast_attention(config: Any, wanted: bool) -> Iterator[None]:
    """While inside, a model of this config attends with `single_query_attention` where it would use `sdpa`."""
    held = config._attn_implementation
    if not wanted or held != "sdpa":
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = held


AttentionInterface.register(_NAME, single_query_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
