"""The numbers of a model that decide its memory, read from its configuration without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from kdrl.errors import UserError
from kdrl.models.config import LoraConfig
from kdrl.models.loading import tied_head


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that decide its memory. `parameters` counts tied weights once."""

    parameters: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    gated_mlp: bool = True
    qk_norm: bool = False

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelShape:
        """Read a transformers configuration; parameters are counted on the meta device, so no memory is used.

        Raises UserError when transformers has no causal LM for the configuration.
        """
        return cls.from_model(_on_meta(config))

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> ModelShape:
        """Read a transformers model, loaded or on the meta device."""
        config: Any = model.config
        text = config.get_text_config()
        names = {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters() if name.count(".") > 1}
        heads = text.num_attention_heads
        mlp = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        if experts := getattr(text, "num_experts_per_tok", None):
            mlp = (getattr(text, "moe_intermediate_size", None) or mlp) * experts
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp_width=mlp,
            vocabulary=text.vocab_size,
            gated_mlp=any("gate" in name for name in names),
            qk_norm="q_norm" in names,
        )

    @property
    def query_width(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of keys, or of values, of one layer."""
        return self.kv_heads * self.head_dim


def _on_meta(config: PretrainedConfig) -> torch.nn.Module:
    # Not accelerate's init_empty_weights: it gives tied weights one parameter each, so they would count twice.
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"transformers has no causal language model for a {config.model_type!r} configuration: {error}"
        ) from None


def adapter_parameters(config: PretrainedConfig, lora: LoraConfig) -> int:
    """How many parameters LoRA trains in a model of this configuration; raises UserError when no module matches."""
    import peft

    options = peft.LoraConfig(r=lora.rank, target_modules=lora.target_modules, task_type="CAUSAL_LM")
    try:
        with tied_head():
            model = peft.get_peft_model(_on_meta(config), options, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"student.lora.target_modules {lora.target_modules!r} fits no module: {error}") from None
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def activation_bytes(
    shape: ModelShape,
    compute_bytes: int,
    attention_bytes: int,
    *,
    stream_bytes: int | None = None,
    lora: bool = False,
    keys: float = 0.0,
) -> int:
    """Bytes that one token leaves behind in one layer for the backward pass; `compute_bytes` of matrix products.

    Norms keep what they read, in the `stream_bytes` of the residual stream (None: those of products), and layers what
    norms make of it: once, or under autocast and under float32 adapters of another format once for each layer that
    reads it. Packed attention keeps queries, keys, values and output, and where it copies what responses share, queries
    and output twice and `keys` more keys and values a token. A gated MLP keeps gate, its activation, up and product.
    """
    stream = stream_bytes or compute_bytes
    adapted = lora and stream < 4
    each = 4 if adapted else compute_bytes
    readers = (5 if shape.gated_mlp else 4) if adapted or stream != compute_bytes else 2
    norms = 2 * stream * shape.width + readers * each * shape.width
    if shape.qk_norm:
        norms += compute_bytes * (shape.query_width + shape.kv_width)
    attention = attention_bytes * 2 * (shape.query_width + shape.kv_width) + 4 * shape.heads
    if attention_bytes != compute_bytes or adapted:
        attention += each * shape.query_width
    if keys:
        attention += int(attention_bytes * 2 * (shape.query_width + keys * shape.kv_width))
    mlp = compute_bytes * (4 if shape.gated_mlp else 6) + (each - compute_bytes)
    return norms + attention + mlp * shape.mlp_width
