"""One decode step of a Llama-like model in few operations: the library's modules take two to three times as many.

The engine uses it only where it reproduces the model's own full forward pass. Left out: sliding windows, mixtures of
experts, adapters in low precision, and rotary embeddings that depend on the sequence's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdrl.engines.attention import masked
from kdrl.engines.shared import SharedPrompts
from kdrl.models.heads import causal_lm, decoder_of
from kdrl.models.loading import LoadedModel
from kdrl.models.quick import QuickLinear
from kdrl.objectives.products import packed, product

_KNOWN = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}
# Layers that read the same input are joined into one, and on a CPU packed, up to this many weights: a copy of them.
_COPIED = {"cpu": 1 << 28, "cuda": 1 << 25}


def fusable(loaded: LoadedModel) -> bool:
    """Whether the model has the shape that `FusedStep` knows; that it computes the same is checked by the engine."""
    lm: Any = causal_lm(loaded.model)
    config, decoder = lm.config.get_text_config(), decoder_of(loaded.model)
    if config.model_type not in _KNOWN or config.hidden_act not in ("silu", "swish"):
        return False
    rope = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    linears = [layer for block in _blocks(decoder) for layer in _linears(block)]
    exact = next(lm.parameters()).dtype == torch.float32 and loaded.config.autocast is None
    return rope in _FIXED_ROPE and all(_plain(layer, exact) for layer in linears)


def _blocks(decoder: Any) -> list[Any]:
    return list(decoder.layers)


def _linears(block: Any) -> list[Any]:
    attention, mlp = block.self_attn, block.mlp
    names = (attention, ("q_proj", "k_proj", "v_proj", "o_proj")), (mlp, ("gate_proj", "up_proj", "down_proj"))
    return [getattr(part, name, None) for part, wanted in names for name in wanted]


def _plain(layer: Any, exact: bool) -> bool:
    if type(layer) in (nn.Linear, QuickLinear):
        return True
    # A LoRA layer whose adapters can be added to its weight.
    dora = any(getattr(layer, "use_dora", {}).values()) if hasattr(layer, "lora_A") else True
    return exact and not dora and type(getattr(layer, "base_layer", None)) in (nn.Linear, QuickLinear)


def _merged(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, active adapters added."""
    base = getattr(layer, "base_layer", layer)
    weight = base.weight.detach()
    if base is not layer and not layer.disable_adapters and not layer.merged:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name).detach()
    return weight, None if base.bias is None else base.bias.detach()


class _Product:
    """x W^T + b of several layers that read the same input, side by side; as one, for `copy` rows of x, if not 0."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, copy: int) -> None:
        parts = [_merged(layer) for layer in layers]
        bias = [b for _, b in parts if b is not None]
        self.bias = torch.cat(bias).to(dtype) if bias else None
        weights = [weight.to(dtype) for weight, _ in parts]
        self.weights = [packed(torch.cat(weights), copy)] if copy else weights

    def __call__(self, x: Tensor) -> Tensor:
        outs = [product(x, weight) for weight in self.weights]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        return out if self.bias is None else out.add_(self.bias)


class _Block:
    """One layer's weights, joined where that helps, and its step."""

    def __init__(self, block: Any, number: int, dtype: torch.dtype, copy: int) -> None:
        attention = block.self_attn
        q, k, v, o, gate, up, down = _linears(block)
        self.number, self.width = number, attention.head_dim
        self.scale = float(attention.scaling)
        self.qkv, self.o = _Product([q, k, v], dtype, copy), _Product([o], dtype, copy)
        self.gate_up, self.down = _Product([gate, up], dtype, copy), _Product([down], dtype, copy)
        self.before, self.between = block.input_layernorm, block.post_attention_layernorm
        out = getattr(k, "base_layer", k).out_features
        self.kv_heads, self.heads = out // self.width, getattr(q, "base_layer", q).out_features // self.width
        self.eps, self.qk_HW = 0.0, None
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm.weight] * self.heads + [attention.k_norm.weight] * self.kv_heads
            self.eps, self.qk_HW = attention.q_norm.variance_epsilon, torch.stack([w.detach() for w in norms])
        # SmolLM3 leaves positions out of some layers.
        self.turns = bool(getattr(attention, "use_rope", True))

    def __call__(
        self, x_BD: Tensor, dtype: torch.dtype, cos: Tensor, sin: Tensor, store: Store, attend: Attend
    ) -> Tensor:
        rows, heads, kv_heads = x_BD.shape[0], self.heads, self.kv_heads
        mixed = self.qkv(_norm(self.before, x_BD).to(dtype)).view(rows, heads + 2 * kv_heads, self.width)
        qk, value = mixed[:, : heads + kv_heads], mixed[:, heads + kv_heads :]
        if self.qk_HW is not None:
            qk = functional.rms_norm(qk, (self.width,), None, self.eps) * self.qk_HW
        if self.turns:
            qk = torch.addcmul(qk * cos, qk.roll(self.width // 2, -1), sin)
        keys, values = store(qk[:, heads:, None], value[:, :, None], self.number)
        out = attend(qk[:, :heads] * self.scale, keys, values, self.number)
        x_BD = x_BD + self.o(out.to(dtype))
        gate, up = self.gate_up(_norm(self.between, x_BD).to(dtype)).chunk(2, -1)
        return x_BD + self.down(functional.silu(gate).mul_(up))


# fn(keys and values [B, H_kv, 1, W] of the new token, layer) -> those of all tokens [B, H_kv, L, W].
Store = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
# fn(scaled query [B, H, W], keys and values [B, H_kv, L, W], layer) -> [B, H * W].
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class FusedStep:
    """The decoder of a model for one new token a row, on its present weights; made anew when they have changed."""

    def __init__(self, loaded: LoadedModel, positions: int, rows: int) -> None:
        decoder: Any = decoder_of(loaded.model)
        weights = sum(w.numel() for block in _blocks(decoder) for w in block.parameters())
        table: Tensor = decoder.embed_tokens.weight
        self._dtype = torch.bfloat16 if loaded.config.autocast is not None else table.dtype
        self._on_cpu = table.device.type == "cpu"
        self._embed, self._final = decoder.embed_tokens, decoder.norm
        copy = rows if weights <= _COPIED.get(table.device.type, 0) else 0
        self._blocks = [_Block(block, n, self._dtype, copy) for n, block in enumerate(_blocks(decoder))]
        place = torch.arange(positions, device=table.device)[None]
        cos, sin = decoder.rotary_emb(table.new_empty(1), place)
        half = cos.shape[-1] // 2
        self._cos_LW, self._sin_LW = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        if self._cos_LW.shape[-1] != self._blocks[0].width:
            raise ValueError("part of each head turns with its position, which a fused step does not know")

    def __call__(
        self,
        token_B: Tensor,
        position_B1: Tensor,
        mask: Tensor | None,
        store: Store,
        shared: SharedPrompts | None = None,
    ) -> Tensor:
        """Hidden states [B, D] after the final norm; `mask` [B, 1, 1, L] is bool, or added to scores.

        With `shared`, which is for CPUs, the stored keys and values are those behind the prompts.
        """
        cos, sin = self._cos_LW[position_B1], self._sin_LW[position_B1]

        def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
            if self._on_cpu:
                return _by_products(query, keys, values, mask, shared, layer)
            return _by_kernel(query.to(self._dtype), keys.to(self._dtype), values.to(self._dtype), mask)

        with torch.autocast(token_B.device.type, enabled=False):
            x_BD = functional.embedding(token_B, self._embed.weight)
            for block in self._blocks:
                x_BD = block(x_BD, self._dtype, cos, sin, store, attend)
            return _norm(self._final, x_BD)


def _by_kernel(query_BHW: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    gqa = query_BHW.shape[1] != keys.shape[1]
    out = functional.scaled_dot_product_attention(
        query_BHW[:, :, None], keys, values, attn_mask=mask, scale=1.0, enable_gqa=gqa
    )
    return out.flatten(1)


def _by_products(
    query_BHW: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, shared: SharedPrompts | None, layer: int
) -> Tensor:
    """Two matrix products take a third of the fused kernel's time on a CPU, and are no farther from exact attention."""
    rows, heads, width = query_BHW.shape
    kv_heads, length = keys.shape[1:3]
    query = query_BHW.to(keys.dtype).view(rows, kv_heads, heads // kv_heads, width)
    score = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(rows, kv_heads, -1, length)
    if shared is not None:
        score = torch.cat([shared.scores(query, layer), score], -1)
    score = score.float()
    weight = torch.softmax(score if mask is None else masked(score, mask), -1).to(values.dtype)
    mixed = torch.bmm(weight[..., -length:].flatten(0, 1), values.flatten(0, 1)).view(query.shape)
    if shared is not None:
        mixed += shared.mixed(weight[..., :-length], layer)
    return mixed.view(rows, heads * width)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
