"""One forward pass over a micro-batch: packed where the model allows it, padded where it does not.

Packed, all tokens stand in one row, a prompt once for all its responses, and only attention knows which token sees
which: in parts without a mask on a CPU (`kdrl.models.joined`), elsewhere with a mask of bounded size
(`kdrl.models.masked`). Nothing else of a decoder mixes tokens, so a model with causal attention computes the same
numbers; every model is checked once on a small input. Left out: texts beyond a sliding window or beyond that bound,
attention sinks, soft caps and recurrent layers (they are padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kdrl.batch import MicroBatch, Response, Rollouts, Segment, lay_out, longest_read, pack_rows
from kdrl.models.attention import PACKED
from kdrl.models.heads import causal_lm, hidden_states
from kdrl.models.joined import Parts, joins
from kdrl.models.masked import MASK, Masked

if TYPE_CHECKING:
    from kdrl.models.loading import LoadedModel

# What a layer may ask of attention beside causality; one that does is padded.
_OTHER_KINDS = ("softcap", "s_aux", "position_bias", "cache")
# Layers that attend to all that stands before, at least in a text no longer than their window.
_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_WINDOWS = ("sliding_window", "attention_chunk_size")


def micro_batches(
    loaded: LoadedModel,
    rollouts: Rollouts,
    rows: Sequence[int],
    wanted_N: Tensor,
    budget: int,
    *,
    padded: bool = False,
    privileged: bool = False,
) -> Iterator[MicroBatch]:
    """The wanted tokens of `rows` as batches of at most `budget` tokens, packed unless `padded` is asked for."""
    packed = not padded and packs(loaded, longest_read(rollouts, rows, wanted_N, privileged=privileged))
    for pack in pack_rows(rollouts, rows, wanted_N, budget, packed=packed, privileged=privileged):
        yield lay_out(rollouts, pack, wanted_N, loaded.pad_id, packed=packed, privileged=privileged)


def wanted_states(loaded: LoadedModel, micro: MicroBatch) -> Tensor:
    """Hidden states `[M, D]` that predict a micro-batch's wanted tokens, in the model's autocast."""
    packing = Packing(micro.segments, micro.input_ids_BL.device) if micro.segments else None
    return _states(loaded, micro, packing)


def _states(loaded: LoadedModel, micro: MicroBatch, packing: Packing | None) -> Tensor:
    with loaded.autocast():
        hidden_BLD = hidden_states(loaded, micro.input_ids_BL, micro.attention_mask_BL, packing=packing)
    return at_places(hidden_BLD, micro.place_M)


def at_places(found_BLD: Tensor, place_M: Tensor) -> Tensor:
    """What stands at flat places of a batch, `[M, D]`; the gradient adds up in the same order every time.

    Responses share the last place of their prompt, and with several threads a CPU adds up indexed gradients in any
    order, a GPU those of index_select.
    """
    found = found_BLD.flatten(0, 1)
    return found.index_select(0, place_M) if found.device.type == "cpu" else found[place_M]


class Packing:
    """Which tokens of a packed row see which, as what attention needs to know; see `kdrl.batch.Segment`."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        starts = [0 if s.parent is None else segments[s.parent].length for s in segments]
        places = [torch.arange(n, n + s.length) for n, s in zip(starts, segments, strict=True)]
        self.position_ids_BL = torch.cat(places)[None].to(device)
        self._segments, self._device = segments, device

    @cached_property
    def _parts(self) -> Parts:
        return Parts(self._segments)

    @cached_property
    def _masked(self) -> Masked:
        return Masked(self._segments, self._device)

    def attend(self, query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, scale: float | None) -> Tensor:
        """Attention of every token of the row to those that it may see, `[N, H, d]`."""
        way = self._parts if joins(query_NHd, value_NKd) else self._masked
        return way.attend(query_NHd, key_NKd, value_NKd, scale)

    @property
    def longest(self) -> float:
        """The longest text that can attend as this did: a mask is bounded."""
        masked = self.__dict__.get("_masked")
        return math.inf if masked is None else math.isqrt(MASK // masked.shared)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A transformers attention function for one packed row; float32 where it is differentiated in bfloat16 on a CPU.

    Raises NotImplementedError for a layer that asks for more than causal attention.
    """
    other = [kind for kind in _OTHER_KINDS if kwargs.get(kind) is not None]
    if packing is None or other or kwargs.get("is_causal") is False or kwargs.get("dropout"):
        raise NotImplementedError(f"packed attention without its layout, or with {other}")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if dtype == torch.bfloat16 and kind == "cpu" and torch.is_grad_enabled():
        dtype = torch.float32
    with torch.autocast(kind, enabled=False):
        query_NHd, key_NKd, value_NKd = (x.transpose(1, 2)[0].to(dtype) for x in (query, key, value))
        mixed = packing.attend(query_NHd, key_NKd, value_NKd, scaling)
    return mixed[None].to(query.dtype), None


AttentionInterface.register(PACKED, packed_attention)


# The longest text that a model packs; a model is checked once.
_LIMITS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def packs(loaded: LoadedModel, length: int = 1) -> bool:
    """Whether a model gives the same hidden states packed as padded, for texts of up to `length` tokens."""
    if loaded.model not in _LIMITS:
        window = _window(loaded)
        _LIMITS[loaded.model] = min(window, _reproduces(loaded)) if window > _CHECKED else 0.0
    return length <= _LIMITS[loaded.model]


def _window(loaded: LoadedModel) -> float:
    """The shortest window of a model's layers: a mask for what is longer would be lost unnoticed."""
    config: Any = getattr(causal_lm(loaded), "config", None)
    if config is None:
        return 0.0
    config = config.get_text_config()
    if set(getattr(config, "layer_types", None) or _KINDS) - _KINDS or config._attn_implementation != "sdpa":
        return 0.0
    return min((w for w in (getattr(config, name, None) for name in _WINDOWS) if w), default=math.inf)


# Tokens of the longest text that a model is checked with.
_CHECKED = 8


@torch.no_grad()
def _reproduces(loaded: LoadedModel) -> float:
    """Up to which length both forms agree: two prompts with two responses each, and one with a response of its own."""
    draw = torch.Generator().manual_seed(0)
    prompts, responses = [torch.randint(loaded.vocab_size, (n,), generator=draw).tolist() for n in (3, 5, 2)], []
    for prompt, length in ((0, _CHECKED - 3), (1, 2), (0, 3), (2, 4), (1, 1)):
        ids = torch.randint(loaded.vocab_size, (length,), generator=draw).tolist()
        responses.append(Response(cast(Any, None), prompt, prompts[prompt], ids, "student", True, ""))
    rollouts = Rollouts.of(responses, loaded.device)
    every_N = torch.ones_like(rollouts.trained_N)
    micro, flat = (lay_out(rollouts, range(5), every_N, loaded.pad_id, packed=packed) for packed in (True, False))
    packing = Packing(micro.segments, micro.input_ids_BL.device)
    try:
        found_MD, want_MD = _states(loaded, micro, packing), wanted_states(loaded, flat)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return 0.0
    if not bool(want_MD.isfinite().all()):
        return packing.longest  # broken weights are for the trainer to report
    exact = found_MD.dtype in (torch.float32, torch.float64) and loaded.config.autocast is None
    error_M, size_M = (found_MD - want_MD).norm(dim=-1), want_MD.norm(dim=-1)
    return packing.longest if bool((error_M <= (1e-3 if exact else 0.1) * size_M).all()) else 0.0
