"""What a forward pass leaves inside a decoder: hidden states, queries, keys, values, attention and its output.

Nothing is computed in the pass itself, only kept: it may run under any attention implementation and be recomputed in
the backward pass. Left out: attention outside transformers' attention interface, attention sinks (refused).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdrl.errors import UserError
from kdrl.models.attention import attends_in_float32, float32_attention
from kdrl.models.heads import causal_lm, decoder_of, hidden_states

_NAME = "kdrl_kept"


@dataclass(frozen=True)
class Wanted:
    """Which layers to keep: hidden states 0 (embedding) to L - 1, attention and attention outputs 1 to L."""

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    output: frozenset[int] = frozenset()

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(self.hidden | other.hidden, self.attention | other.attention, self.output | other.output)


@dataclass(frozen=True)
class Attended:
    """Queries `[B, H, L, d]`, keys and values `[B, K, L, d]` of one layer, and what may be seen."""

    query_BHLd: Tensor
    key_BKLd: Tensor
    value_BKLd: Tensor
    mask: Tensor | None
    scale: float
    window: int | None
    cap: float | None = None

    def scores(self, row: int, place_T: Tensor) -> tuple[Tensor, Tensor]:
        """Attention scores `[H, T, L]` of the queries at `place_T` of one row, and the keys each sees, bool `[T, L]`.

        Float32 or better; scores of keys that are not seen are finite and mean nothing.
        """
        wide = torch.promote_types(self.query_BHLd.dtype, torch.float32)
        query_HTd = self.query_BHLd[row][:, place_T].to(wide)
        key_KLd = self.key_BKLd[row].to(wide)
        shared = query_HTd.shape[0] // key_KLd.shape[0]
        scores_HTL = query_HTd @ key_KLd.repeat_interleave(shared, 0).transpose(-1, -2) * self.scale
        if self.cap is not None:
            scores_HTL = self.cap * torch.tanh(scores_HTL / self.cap)
        return self._seen(scores_HTL, row, place_T)

    def _seen(self, scores_HTL: Tensor, row: int, place_T: Tensor) -> tuple[Tensor, Tensor]:
        if self.mask is not None and self.mask.ndim == 4:
            mask_TL = self.mask[min(row, self.mask.shape[0] - 1), 0][place_T][:, : scores_HTL.shape[-1]]
            if mask_TL.dtype == torch.bool:
                return scores_HTL, mask_TL
            seen_TL = mask_TL > torch.finfo(mask_TL.dtype).min / 2
            return scores_HTL + torch.where(seen_TL, mask_TL, 0.0).to(scores_HTL.dtype), seen_TL
        key_L = torch.arange(scores_HTL.shape[-1], device=place_T.device)
        seen_TL = key_L <= place_T[:, None]
        if self.window is not None:
            seen_TL = seen_TL & (key_L > place_T[:, None] - self.window)
        if self.mask is not None:
            seen_TL = seen_TL & self.mask[row, : len(key_L)].bool()
        return scores_HTL, seen_TL

    def vectors(self, which: str) -> Tensor:
        """`queries`, `keys` or `values` with all heads side by side, `[B, L, heads x d]`, as attention used them."""
        found = {"queries": self.query_BHLd, "keys": self.key_BKLd, "values": self.value_BKLd}[which]
        return found.transpose(1, 2).flatten(2)


@dataclass
class Kept:
    """What one forward pass left, by layer."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Attended] = field(default_factory=dict)
    output: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Recording:
    """The forward pass being watched, its real attention function, and where to put what passes."""

    inner: str
    float32: bool
    layers: frozenset[int] | None
    kept: Kept
    modules: dict[int, nn.Module] = field(default_factory=dict)

    def attend(self, module: nn.Module, *given: Any, **options: Any) -> Any:
        if self.inner == "eager":
            function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = float32_attention if self.float32 else ALL_ATTENTION_FUNCTIONS[self.inner]
        return function(module, *given, **options)


_RECORDING: list[_Recording] = []


def _keeping_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    recording = _RECORDING[-1]
    layer = int(getattr(module, "layer_idx", -2) or 0) + 1
    recording.modules[layer] = module
    sinks = options.get("s_aux") is not None  # the check of a Tap then misses the layer, and refuses
    if not sinks and (recording.layers is None or layer in recording.layers):
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        window, cap = options.get("sliding_window"), options.get("softcap")
        recording.kept.attention[layer] = Attended(query, key, value, attention_mask, scale, window, cap)
    return recording.attend(module, query, key, value, attention_mask, **options)


def _same_mask(*given: Any, **options: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS[_RECORDING[-1].inner](*given, **options)


AttentionInterface.register(_NAME, _keeping_attention)
AttentionMaskInterface.register(_NAME, _same_mask)


class Tap:
    """A model whose inside can be watched; raises UserError where what it shows is not what the model computes.

    `attention` says whether attention is asked for too. Made from a LoadedModel or a transformers causal LM.
    """

    def __init__(self, model: Any, *, attention: bool) -> None:
        self.model = model
        self.lm: Any = causal_lm(model)
        self.kind = type(self.lm).__name__
        self._layers = self._find_layers()
        self._modules: dict[int, nn.Module] = {}
        self._check(attention)

    @property
    def layers(self) -> int:
        """Number of layers L."""
        return len(self._layers)

    def _find_layers(self) -> list[nn.Module]:
        count = self.lm.config.get_text_config().num_hidden_layers
        for module in decoder_of(self.model).modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
        raise UserError(f"{self.kind} does not show its {count} layers as one list, so a feature term cannot read it.")

    @contextlib.contextmanager
    def watch(self, wanted: Wanted) -> Iterator[Kept]:
        """While inside, one forward pass leaves what is wanted; hidden state L is what `hidden_states` returns."""
        kept = Kept()
        with contextlib.ExitStack() as stack:
            for layer in wanted.hidden:
                stack.enter_context(_hook(self._layers[layer], kept.hidden, layer, before=True))
            for layer in wanted.output:
                stack.enter_context(_hook(self._modules[layer], kept.output, layer, before=False))
            if wanted.attention:
                stack.enter_context(self._recorded(kept, wanted.attention))
            yield kept

    @contextlib.contextmanager
    def _recorded(self, kept: Kept, layers: frozenset[int] | None) -> Iterator[_Recording]:
        config = self.lm.config.get_text_config()
        inner = config._attn_implementation
        # What is recomputed in the backward pass, which is after this context, must be what the forward pass did.
        recomputed = getattr(self.lm, "is_activation_checkpointing", None)
        if recomputed is None:  # the name before transformers 5.2x
            recomputed = getattr(self.lm, "is_gradient_checkpointing", False)
        in_float32 = inner == "sdpa" and attends_in_float32(self.lm) and not recomputed
        recording = _Recording(inner, in_float32, layers, kept)
        _RECORDING.append(recording)
        config._attn_implementation = _NAME
        try:
            yield recording
        finally:
            config._attn_implementation = inner
            _RECORDING.pop()

    @torch.no_grad()
    def _check(self, attention: bool) -> None:
        """Compare with transformers' own outputs on a short input of two rows, one of them padded."""
        device = next(self.lm.parameters()).device
        ids_BL = torch.randint(self.lm.config.get_text_config().vocab_size, (2, 7), generator=_generator()).to(device)
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[1, 5:] = 0
        was_training = self.lm.training
        self.lm.eval()
        try:
            kept = Kept()
            with self.watch(Wanted(hidden=frozenset(range(self.layers)))) as seen:
                if attention:
                    with self._recorded(kept, None) as recording:
                        last_BLD = hidden_states(self.model, ids_BL, mask_BL)
                    self._modules = recording.modules
                else:
                    last_BLD = hidden_states(self.model, ids_BL, mask_BL)
            own = self._own(ids_BL, mask_BL, attention)
        finally:
            self.lm.train(was_training)
        hidden = [seen.hidden.get(layer) for layer in range(self.layers)] + [last_BLD]
        self._compare_hidden(hidden, own.hidden_states, mask_BL.bool())
        if attention:
            self._compare_maps(kept, own.attentions, mask_BL.bool())

    def _own(self, ids_BL: Tensor, mask_BL: Tensor, attention: bool) -> Any:
        config = self.lm.config.get_text_config()
        inner = config._attn_implementation
        config._attn_implementation = "eager" if attention else inner
        places_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        try:
            return decoder_of(self.model)(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                **({"position_ids": places_BL} if attention else {}),
                use_cache=False,
                output_hidden_states=True,
                output_attentions=attention,
            )
        finally:
            config._attn_implementation = inner

    def _compare_hidden(self, found: list[Tensor | None], own: Any, real_BL: Tensor) -> None:
        for layer, mine in enumerate(found):
            theirs = own[layer] if own is not None and layer < len(own) else None
            if mine is None or theirs is None or not _near(mine[real_BL], theirs[real_BL]):
                raise UserError(
                    f"hidden state {layer} of {self.kind} is not what transformers itself gives, so a feature term "
                    "cannot read this architecture."
                )

    def _compare_maps(self, kept: Kept, own: Any, real_BL: Tensor) -> None:
        wrong = UserError(
            f"the attention of {self.kind} cannot be watched (it does not go through transformers' attention "
            "interface, or does more than a softmax of scores); use `of: hidden` in the feature term."
        )
        for layer in range(1, self.layers + 1):
            attended = kept.attention.get(layer)
            theirs = own[layer - 1] if own is not None and len(own) >= layer else None
            if attended is None or theirs is None:
                raise wrong
            for row in range(len(real_BL)):
                place_T = real_BL[row].nonzero().squeeze(1)
                scores_HTL, seen_TL = attended.scores(row, place_T)
                map_HTL = scores_HTL.masked_fill(~seen_TL, float("-inf")).softmax(-1)
                coarse = theirs.dtype in (torch.bfloat16, torch.float16)
                if not torch.allclose(map_HTL, theirs[row][:, place_T].to(map_HTL), atol=3e-2 if coarse else 1e-3):
                    raise wrong


def _near(mine: Tensor, theirs: Tensor) -> bool:
    coarse = theirs.dtype in (torch.bfloat16, torch.float16)
    spread = theirs.float().std().clamp(min=1e-6)
    same = mine.shape == theirs.shape
    return same and bool((mine.float() - theirs.float()).abs().max() / spread < (1e-1 if coarse else 1e-3))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@contextlib.contextmanager
def _hook(module: nn.Module, into: dict[int, Tensor], layer: int, *, before: bool) -> Iterator[None]:
    def first(values: Any) -> Tensor:
        return values[0] if isinstance(values, tuple) else values

    def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        into[layer] = first(given) if given else named["hidden_states"]

    def leave(module: nn.Module, given: Any, result: Any) -> None:
        into[layer] = first(result)

    handle = module.register_forward_pre_hook(enter, with_kwargs=True) if before else None
    handle = handle or module.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()
