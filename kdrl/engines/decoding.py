"""Rows through the model: prefill, steps, rows that leave, and waiting prompts that take their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from kdrl.engines.attention import fast_attention
from kdrl.engines.cache import Encoded, RoomyLayer, joinable, joined, new_cache, select_rows
from kdrl.engines.fused import FusedStep, fusable
from kdrl.engines.shared import SharedPrompts
from kdrl.engines.static import StaticStep
from kdrl.models.heads import accepts, causal_lm, decoder_of
from kdrl.models.loading import LoadedModel

# Bringing the rows of a prompt together costs about what it saves at this many tokens.
_SHARED = 48
# Prompts go through in passes of about so many tokens: their activations are bounded, whatever the number of rows.
_PREFILL, _PREFILL_GPU = 1 << 13, 1 << 16


@dataclass(frozen=True)
class Plan:
    """Which shortcuts a model's decode steps take; all off is the plain way that every architecture knows.

    `static` needs `fused` and `roomy_cache`, and replays CUDA graphs.
    `compact` drops finished rows and `refill` gives their places to waiting prompts. Prompts of `shared` tokens or
    more, unless it is 0, are kept once for all their rows; that needs `fused` and goes without `static` and `refill`.
    """

    roomy_cache: bool = False
    ready_mask: bool = False
    single_query: bool = False
    fused: bool = False
    static: bool = False
    compact: bool = True
    refill: bool = False
    shared: int = 0

    @staticmethod
    def fastest(loaded: LoadedModel) -> Plan:
        """Every shortcut that can be right for the architecture; the engine checks the result before use."""
        config: Any = text_config(loaded)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        plain = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
        sdpa = config._attn_implementation == "sdpa"
        exact = causal_lm(loaded.model).dtype == torch.float32 and loaded.config.autocast is None
        single = sdpa and exact and loaded.device.type == "cpu"
        fused = plain and sdpa and fusable(loaded)
        gpu = loaded.device.type != "cpu"
        # Rows that began at different times share the columns of the oldest, and a CPU's step costs what its rows and
        # columns do: there finished rows are only dropped (refilling took up to 1.7 times as long).
        shared = _SHARED if fused and not gpu else 0
        return Plan(True, plain and sdpa, single, fused, static=fused and gpu, refill=plain and gpu, shared=shared)


def text_config(loaded: LoadedModel) -> Any:
    """The transformers configuration of the language part."""
    lm: Any = causal_lm(loaded.model)
    return lm.config.get_text_config()


class Grows(Protocol):
    """Rows that one model, or several in step, continue by a token at a time."""

    device: torch.device
    plan: Plan

    @property
    def hidden_BD(self) -> Any:
        """What the next token is chosen from."""
        ...

    def step(self, token_B: Tensor) -> None:
        """Append a token to every row."""
        ...

    def keep(self, keep_B: Tensor) -> None:
        """Drop all rows but the named ones."""
        ...

    def refill(self, rows: Tensor, prompts: Sequence[Sequence[int]]) -> None:
        """Let the named rows start anew, each with a prompt no longer than the longest that the rows began with."""
        ...


class Rows:
    """Rows of a batch that grow by a token a step; each distinct prompt is run once and repeated for its rows.

    All rows write the same column at a step; a row's text starts at a column of its own.
    """

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], steps: int, plan: Plan) -> None:
        self._loaded, self.plan = loaded, plan
        self._decoder: Any = decoder_of(loaded.model)
        self._has_positions = accepts(type(self._decoder), "position_ids")
        self._config, self._pad = text_config(loaded), loaded.pad_id
        self.device = loaded.device
        self._longest = max(map(len, prompts)) + steps
        self._fused = FusedStep(loaded, self._longest, len(prompts)) if plan.fused else None
        self._last: Encoded | None = None
        self._static: StaticStep | None = None
        self._shared: SharedPrompts | None = None
        self._prefill(prompts)

    def step(self, token_B: Tensor) -> None:
        """Append a token to every row; `hidden_BD` then belongs to it."""
        self._make_room()
        self._written += 1
        # A finished row may go on for a while before its place is taken.
        self._position_B1 = (self._position_B1 + 1).clamp(max=self._longest - 1)
        mask = None if self._mask is None else self._mask[..., : self._written]
        if self._fused is not None and self.plan.static:
            self.hidden_BD = self._static_step(self._fused, token_B)
            return
        if self._fused is not None:
            self.hidden_BD = self._fused(token_B, self._position_B1, mask, self._cache.update, self._shared)
            return
        with fast_attention(self._config, self.plan.single_query):
            self.hidden_BD = self._forward(token_B[:, None], mask, self._position_B1, self._cache)[:, -1]

    def _static_step(self, fused: FusedStep, token_B: Tensor) -> Tensor:
        if self._static is None or not self._static.fits(len(token_B)):
            layers: list[Any] = self._cache.layers
            self._static = StaticStep(fused, layers, len(token_B), self.device)
        return self._static(token_B, self._position_B1, self._start_B1, self._written - 1)

    def keep(self, keep_B: Tensor) -> None:
        """Drop all rows but the named ones."""
        select_rows(self._cache, keep_B)
        if self._shared is not None:
            self._shared.keep(keep_B)
        self.hidden_BD = self.hidden_BD[keep_B]
        if self._mask is not None:
            self._start_B1, self._position_B1 = self._start_B1[keep_B], self._position_B1[keep_B]
            self._mask = self._made_mask()

    def refill(self, rows: Tensor, prompts: Sequence[Sequence[int]]) -> None:
        """Let the named rows start anew with these prompts; needs `plan.refill`."""
        count = self.hidden_BD.shape[0]
        places: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            places.setdefault(tuple(prompt), []).append(row)
        self._start_B1 = self._start_B1.expand(count, 1).clone()
        self._position_B1 = self._position_B1.expand(count, 1).clone()
        self.hidden_BD = self.hidden_BD.clone()
        known = self._last
        fresh = [prompt for prompt in places if known is None or known.prompt != prompt]
        found = {} if known is None else {known.prompt: known}
        if fresh:
            cache, hidden_PD, _ = self._encode(fresh)
            found |= {p: Encoded.of(p, cache, n, hidden_PD[n]) for n, p in enumerate(fresh)}
            self._last = found[fresh[-1]]
        for prompt, taken in places.items():
            where = torch.tensor(taken, device=self.device)
            found[prompt].put(self._cache, where)
            self.hidden_BD[where] = found[prompt].hidden_D
            self._start_B1[where] = self._written - len(prompt)
            self._position_B1[where] = len(prompt) - 1
        self._mask = self._made_mask()

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        index = {key: n for n, key in enumerate(dict.fromkeys(map(tuple, prompts)))}
        parent_B = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=self.device)
        self._cache, hidden_PD, start_P1 = self._encode(list(index))
        self._written = max(map(len, prompts))
        if self.plan.refill:
            last = tuple(prompts[-1])
            self._last = Encoded.of(last, self._cache, index[last], hidden_PD[index[last]])
        if start_P1 is None:
            zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self._start_B1, self._position_B1 = zero, zero + self._written - 1
        else:
            self._start_B1 = start_P1[parent_B]
            self._position_B1 = self._written - 1 - self._start_B1
        if len(index) < len(prompts) and self._shares:
            self._shared = SharedPrompts(self._cache, parent_B)
            self._cache = self._new_cache(self._written)
        else:
            select_rows(self._cache, parent_B)
        self._mask = None if start_P1 is None else self._made_mask()
        self.hidden_BD = hidden_PD[parent_B]

    def _encode(self, prompts: list[tuple[int, ...]]) -> tuple[DynamicCache, Tensor, Tensor | None]:
        """A cache of these prompts, padded on the left, the hidden states of their ends, and where each starts."""
        width = max(map(len, prompts))
        start_P1 = torch.tensor([[width - len(prompt)] for prompt in prompts], device=self.device)
        padded = any(len(prompt) < width for prompt in prompts)
        most = _PREFILL if self.device.type == "cpu" else _PREFILL_GPU
        each = max(1, most // width) if joinable(self._new_cache()) else len(prompts)
        caches, hidden = [], []
        for n in range(0, len(prompts), each):
            some = prompts[n : n + each]
            ids = torch.tensor([[self._pad] * (width - len(p)) + list(p) for p in some], device=self.device)
            positions = torch.arange(width, device=self.device)[None]
            if padded:
                positions = positions - start_P1[n : n + each]
            mask = (positions >= 0).long() if padded else None
            caches.append(self._new_cache())
            hidden.append(self._forward(ids, mask, positions.clamp(min=0), caches[-1])[:, -1].clone())
        return joined(caches), torch.cat(hidden), start_P1 if padded else None

    @property
    def _shares(self) -> bool:
        """Whether prompts are long enough to be kept once, in a plan that can."""
        plan = self.plan
        return 0 < plan.shared <= self._written and plan.fused and not (plan.static or plan.refill)

    def _new_cache(self, before: int = 0) -> DynamicCache:
        """An empty one, for what comes after `before` tokens that are elsewhere."""
        return new_cache(self._config, self._longest - before + 64 * self.plan.refill, self.plan.roomy_cache)

    def _make_room(self) -> None:
        """Before buffers grow, forget the columns that no row needs any more; only refilled rows leave such."""
        if not (self.plan.refill or self.plan.static) or self._written < self._capacity:
            return
        first = int(self._start_B1.min())
        for layer in self._cache.layers:
            layer.forget(first)  # type: ignore[attr-defined]
        self._written -= first
        self._start_B1 = self._start_B1 - first
        if self._mask is not None:
            self._mask = self._made_mask()

    @property
    def _capacity(self) -> int:
        """Columns until the buffers must grow."""
        layer = self._cache.layers[0]
        moves = self.plan.refill or self.plan.static
        return layer.capacity if moves and isinstance(layer, RoomyLayer) else self._longest

    def _made_mask(self) -> Tensor:
        """Which columns each row may see, for all columns that may be written before it is made anew."""
        mask_BL = torch.arange(self._capacity, device=self.device) >= self._start_B1
        if not self.plan.ready_mask:
            return mask_BL.long()
        if not self.plan.single_query:
            return mask_BL[:, None, None]
        # Additive, so that a step adds it to its scores as it is.
        zero = torch.zeros((), device=self.device)
        return torch.where(mask_BL, zero, torch.finfo(zero.dtype).min)[:, None, None]

    def _forward(self, ids_BL: Tensor, mask: Tensor | None, position_BL: Tensor, cache: DynamicCache) -> Tensor:
        given = {"position_ids": position_BL} if self._has_positions else {}
        out = self._decoder(input_ids=ids_BL, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
        return out.last_hidden_state
