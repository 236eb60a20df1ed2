"""One forward pass over a micro-batch: packed where the model allows it, padded where it does not.

Packed, all tokens stand in one row, a prompt once for all its responses, and only attention knows which token sees
which: keys and values are laid out again, a response a row, and go through `scaled_dot_product_attention`. Nothing else
of a decoder mixes tokens, so a model with causal attention computes the same numbers; every model is checked once on a
small input. Left out: texts beyond a sliding window, attention sinks, soft caps and recurrent layers (they are padded),
and kernels that read a packed row as it is (varlen flash attention knows no shared prompts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from kdrl.batch import MicroBatch, Response, Rollouts, Segment, lay_out, longest_read, pack_rows
from kdrl.models.attention import PACKED
from kdrl.models.heads import causal_lm, hidden_states

if TYPE_CHECKING:
    from kdrl.models.loading import LoadedModel

# What a layer may ask of attention beside causality; one that does is padded.
_OTHER_KINDS = ("softcap", "s_aux", "position_bias", "cache")
# Layers that attend to all that stands before, at least in a text no longer than their window.
_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_WINDOWS = ("sliding_window", "attention_chunk_size")
# Padding of one attention call may cost a third more than its tokens, or about as much as another call does.
_WASTE, _CALL = 3, 1 << 15
# Elements of a mask that differs from row to row: 4 MiB in float32.
_MASK = 1 << 20


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


@dataclass
class _Block:
    """Consecutive segments that attend in one call, padded to the longest; all have a parent or none has."""

    members: list[Segment] = field(default_factory=list)
    parents: list[Segment] = field(default_factory=list)
    longest: int = 0
    prompt: int = 0
    used: int = 0

    def take(self, segment: Segment, parent: Segment | None) -> bool:
        """Add a segment if that makes little padding; whether it was added."""
        if self.members and bool(self.parents) != (parent is not None):
            return False
        before = 0 if parent is None else parent.length
        longest, prompt = max(self.longest, segment.length), max(self.prompt, before)
        used = self.used + segment.length * (before + segment.length)
        padded = (len(self.members) + 1) * longest * (prompt + longest)
        alike = all(p.length == before for p in self.parents[:1]) and self.prompt in (0, prompt)
        if self.members and (padded - used > max(used // _WASTE, _CALL) or (not alike and padded > _MASK)):
            return False
        self.members.append(segment)
        self.parents += [] if parent is None else [parent]
        self.longest, self.prompt, self.used = longest, prompt, used
        return True


def _blocks(segments: Sequence[Segment]) -> list[_Block]:
    blocks: list[_Block] = []
    for segment in segments:
        parent = None if segment.parent is None else segments[segment.parent]
        if not blocks or not blocks[-1].take(segment, parent):
            blocks.append(_Block())
            blocks[-1].take(segment, parent)
    return blocks


class Packing:
    """Which tokens of a packed row see which, as what attention needs to know; see `kdrl.batch.Segment`."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.blocks = _blocks(segments)
        starts = [0 if s.parent is None else segments[s.parent].length for s in segments]
        places = [torch.arange(n, n + s.length) for n, s in zip(starts, segments, strict=True)]
        self.position_ids_BL = torch.cat(places)[None].to(device)
        shared = segments[: 1 + max((s.parent for s in segments if s.parent is not None), default=-1)]
        self._starts = [s.start for s in shared]
        self._cut = [*(s.length for s in shared), sum(s.length for s in segments[len(shared) :])]
        spread, real = [], []
        for block in self.blocks:
            for s in block.members:
                offset = torch.arange(block.longest)
                spread.append(s.start + offset.clamp(max=s.length - 1))
                real.append(offset < s.length)
        real_S = torch.cat(real)
        self._whole = bool(real_S.all())
        self._spread_S, self._back_N = torch.cat(spread).to(device), real_S.nonzero().squeeze(1).to(device)
        self._empty = (~real_S).nonzero().squeeze(1).to(device)
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def attend(self, query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor, scale: float | None) -> Tensor:
        """Attention of every token of the row to those that it may see, `[N, H, d]`."""
        prompts = [dict(zip(self._starts, x.split(self._cut), strict=False)) for x in (key_NKd, value_NKd)]
        sizes = [len(b.members) * b.longest for b in self.blocks]
        spread = [self._spread(x).split(sizes) for x in (query_NHd, key_NKd, value_NKd)]
        out = []
        for number, (block, query, key, value) in enumerate(zip(self.blocks, *spread, strict=True)):
            rows = [x.unflatten(0, (len(block.members), block.longest)) for x in (query, key, value)]
            if block.parents:
                rows[1:] = [_after(block, at, x) for at, x in zip(prompts, rows[1:], strict=True)]
            out.append(_attend(rows[0], rows[1], rows[2], self._mask(number, rows[0], rows[1]), scale).flatten(0, 1))
        return self._back(torch.cat(out) if len(out) > 1 else out[0])

    def _spread(self, x_NHd: Tensor) -> Tensor:
        return x_NHd if self._whole else _Spread.apply(x_NHd, self._spread_S, self._back_N)

    def _back(self, x_SHd: Tensor) -> Tensor:
        return x_SHd if self._whole else _Back.apply(x_SHd, self._spread_S, self._back_N, self._empty)

    def _mask(self, number: int, query_BTHd: Tensor, key_BSKd: Tensor) -> Tensor | None:
        """Additive mask `[1 or B, 1, groups x T, S]` of a block with prompts; without, causal attention needs none."""
        block = self.blocks[number]
        if not block.parents:
            return None
        known = self._masks.get((number, query_BTHd.dtype))
        if known is None:
            prompts = dict.fromkeys(p.length for p in block.parents)
            lengths = list(prompts) if len(prompts) == 1 else [p.length for p in block.parents]
            own = torch.ones(block.longest, block.longest, dtype=torch.bool).tril()
            before = torch.arange(block.prompt) < torch.tensor(lengths)[:, None]
            seen = torch.cat([before[:, None].expand(-1, block.longest, -1), own.expand(len(lengths), -1, -1)], 2)
            seen = seen.repeat(1, query_BTHd.shape[2] // key_BSKd.shape[2], 1)[:, None]
            known = torch.zeros(seen.shape, dtype=query_BTHd.dtype).masked_fill_(~seen, -torch.inf)
            known = self._masks[number, query_BTHd.dtype] = known.to(query_BTHd.device)
        return known


def _after(block: _Block, prompts: dict[int, Tensor], own_BTKd: Tensor) -> Tensor:
    """Keys or values `[B, P + T, K, d]` of a block's rows behind those of their prompts, copied once."""
    first, count = block.parents[0], len(block.parents)
    if all(p.start == first.start for p in block.parents):
        return torch.cat([prompts[first.start].expand(count, -1, -1, -1), own_BTKd], 1)
    padded = {p.start: pad(prompts[p.start], (0, 0, 0, 0, 0, block.prompt - p.length)) for p in block.parents}
    pieces = [
        x for p, own_TKd in zip(block.parents, own_BTKd.unbind(0), strict=True) for x in (padded[p.start], own_TKd)
    ]
    return torch.cat(pieces).unflatten(0, (count, -1))


def _attend(
    query_BTHd: Tensor, key_BSKd: Tensor, value_BSKd: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    length, shared = query_BTHd.shape[1], query_BTHd.shape[2] // key_BSKd.shape[2]
    key, value = key_BSKd.transpose(1, 2), value_BSKd.transpose(1, 2)
    if mask is None:
        query = query_BTHd.transpose(1, 2)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared > 1)
        return mixed.transpose(1, 2)
    # Queries of the heads that share keys stand behind each other, so that keys and values are not repeated.
    query = query_BTHd.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return mixed.unflatten(2, (shared, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Spread(torch.autograd.Function):
    """Packed rows to padded ones. Padding is not looked at, so that its gradient is zero: the way back is a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread_S: Tensor, back_N: Tensor) -> Tensor:
        ctx.save_for_backward(back_N)
        return x.index_select(0, spread_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Back(torch.autograd.Function):
    """Padded rows to packed ones; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread_S: Tensor, back_N: Tensor, empty: Tensor) -> Tensor:
        ctx.save_for_backward(spread_S, empty)
        return x.index_select(0, back_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        spread_S, empty = ctx.saved_tensors
        return grads[0].index_select(0, spread_S).index_fill_(0, empty, 0.0), None, None, None


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
        _LIMITS[loaded.model] = window if window > _CHECKED and _reproduces(loaded) else 0.0
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
def _reproduces(loaded: LoadedModel) -> bool:
    """Compare both forms on two prompts with two responses each and one with a response of its own."""
    draw = torch.Generator().manual_seed(0)
    prompts, responses = [torch.randint(loaded.vocab_size, (n,), generator=draw).tolist() for n in (3, 5, 2)], []
    for prompt, length in ((0, _CHECKED - 3), (1, 2), (0, 3), (2, 4), (1, 1)):
        ids = torch.randint(loaded.vocab_size, (length,), generator=draw).tolist()
        responses.append(Response(cast(Any, None), prompt, prompts[prompt], ids, "student", True, ""))
    rollouts = Rollouts.of(responses, loaded.device)
    every_N = torch.ones_like(rollouts.trained_N)
    forms = [lay_out(rollouts, range(5), every_N, loaded.pad_id, packed=packed) for packed in (True, False)]
    try:
        found_MD, want_MD = (wanted_states(loaded, micro) for micro in forms)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    if not bool(want_MD.isfinite().all()):
        return True  # broken weights are for the trainer to report
    exact = found_MD.dtype in (torch.float32, torch.float64) and loaded.config.autocast is None
    error_M, size_M = (found_MD - want_MD).norm(dim=-1), want_MD.norm(dim=-1)
    return bool((error_M <= (1e-3 if exact else 0.1) * size_M).all())
