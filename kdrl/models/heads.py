"""What stands before and after the LM head, found for any transformers causal LM and checked against its own logits."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdrl.errors import UserError
from kdrl.models.attention import training_attention

if TYPE_CHECKING:
    from kdrl.models.packing import Packing
    from kdrl.objectives.head import Head, LowRank

# What architectures multiply or divide their logits by; the check at load tells when one is missing here.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)


def causal_lm(model: Any) -> nn.Module:
    """The transformers model inside a LoadedModel or PeftModel, or the model itself."""
    model = getattr(model, "model", model) if hasattr(model, "eos_ids") else model
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> nn.Module:
    """The part of a causal LM that ends with the final norm and has no head."""
    lm: Any = causal_lm(model)
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    if decoder is None or decoder is lm:
        decoder = getattr(lm, getattr(lm, "base_model_prefix", "") or "model", None)
    if not isinstance(decoder, nn.Module) or decoder is lm:
        raise UserError(
            f"{type(lm).__name__} does not show its decoder apart from its head; this architecture cannot be used."
        )
    return decoder


@lru_cache(maxsize=64)
def accepts(kind: type[nn.Module], argument: str) -> bool:
    """Whether the forward of a module class takes an argument of this name (`**kwargs` does not count)."""
    return argument in inspect.signature(kind.forward).parameters


def hidden_states(
    model: Any,
    input_ids_BL: Tensor,
    attention_mask_BL: Tensor | None,
    position_ids_BL: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Hidden states [B, L, D] after the final norm and before the head; logits are never made.

    Positions are counted from the attention mask when none are given, so padding may stand on either side. With
    `packing` the one row holds many texts; see `kdrl.models.packing`.
    """
    decoder = decoder_of(model)
    more: dict[str, Any] = {}
    if packing is not None:
        # A mask that transformers hands on as it is, and that fits no attention but the packed one.
        attention_mask_BL = input_ids_BL.new_empty(1, 1, 0, 0, dtype=torch.bool)
        position_ids_BL, more = packing.position_ids_BL, {"packing": packing}
    if position_ids_BL is None and attention_mask_BL is not None:
        position_ids_BL = (attention_mask_BL.long().cumsum(-1) - 1).clamp(min=0)
    given: dict[str, Any] = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL, "use_cache": False}
    if position_ids_BL is not None and accepts(type(decoder), "position_ids"):
        given["position_ids"] = position_ids_BL
    with training_attention(causal_lm(model), packed=packing is not None):
        return decoder(**given, **more).last_hidden_state


def head_of(model: Any, rows: int | None = None) -> Head:
    """The LM head of a model as data: weights [V, D], bias, adapters, logit multiplier, soft cap, how many rows count.

    `rows` defaults to the tokenizer's size for a LoadedModel, so that padding rows are neither sampled nor scored.
    Raises UserError for a head that is not a linear layer, or has an adapter that is no plain LoRA.
    """
    from kdrl.objectives.head import Head

    lm: Any = causal_lm(model)
    if rows is None:
        rows = getattr(model, "vocab_size", None) if hasattr(model, "eos_ids") else None
    layer, adapters = _without_adapters(lm.get_output_embeddings())
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{type(lm).__name__} has no linear LM head (found {type(layer).__name__}); it cannot be used.")
    config = lm.config.get_text_config()
    return Head(
        weight_VD=layer.weight,
        bias_V=layer.bias,
        scale=_scale_of(config),
        softcap=getattr(config, "final_logit_softcapping", None),
        rows=rows if rows is not None and rows < layer.weight.shape[0] else None,
        adapters=adapters,
    )


def _without_adapters(layer: Any) -> tuple[Any, tuple[LowRank, ...]]:
    """The linear layer inside peft's, and the adapters that are in force: none while they are disabled or merged."""
    from kdrl.objectives.head import LowRank

    if hasattr(layer, "modules_to_save"):  # a copy of the head that is trained whole
        active = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.modules_to_save]
        return (layer.modules_to_save[active[0]] if active else layer.original_module), ()
    if not hasattr(layer, "lora_A"):
        return layer, ()
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    adapters = []
    if not layer.disable_adapters and not layer.merged:
        for name in (name for name in layer.active_adapters if name in layer.lora_A):
            _check_plain(layer, name)
            adapters.append(LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]))
    return layer.get_base_layer(), tuple(adapters)


def _check_plain(layer: Any, name: str) -> None:
    kind = None
    if name in getattr(layer, "lora_variant", {}):
        kind = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
    elif layer.lora_B[name].bias is not None:
        kind = "lora_bias"
    elif getattr(layer.lora_dropout[name], "p", 0.0) > 0.0:
        kind = "lora_dropout"
    if kind is not None:
        raise UserError(
            f"the LM head's adapter {name!r} has {kind}, and logits are made from hidden states and plain LoRA factors "
            "alone; leave the head out of target_modules, or leave that out."
        )


def _scale_of(config: Any) -> float:
    scale = 1.0
    for name in _MULTIPLIERS:
        value = getattr(config, name, None)
        scale *= float(value) if isinstance(value, (int, float)) else 1.0
    for name in _DIVISORS:
        value = getattr(config, name, None)
        scale /= float(value) if isinstance(value, (int, float)) else 1.0
    return scale


def _project(head: Head, hidden_ND: Tensor) -> Tensor:
    """Logits [N, V] of a head without adapters, applied in the weights' own format as the model does."""
    logits = nn.functional.linear(hidden_ND.to(head.weight_VD.dtype), head.weight_VD, head.bias_V).float()
    if head.scale != 1.0:
        logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@torch.no_grad()
def check_head(model: nn.Module, vocab_size: int, where: str) -> None:
    """Refuse a model whose own logits differ from the head applied to its hidden states, on a short random input."""
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(vocab_size, (2, 7), generator=generator).to(device)
    mask_BL = torch.ones_like(ids_BL)
    was_training = lm.training
    lm.eval()
    hidden_BLD = hidden_states(lm, ids_BL, mask_BL)
    own = _project(head_of(lm), hidden_BLD.flatten(0, 1))
    theirs = lm(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits.float().flatten(0, 1)
    lm.train(was_training)
    spread = theirs.std().clamp(min=1e-6)
    tolerance = 1e-3 if hidden_BLD.dtype == torch.float32 else 5e-2
    if own.shape != theirs.shape or not bool(((own - theirs).abs().max() / spread) < tolerance):
        raise UserError(
            f"{where}: the logits of {type(lm).__name__} are not its LM head applied to its last hidden states, so "
            "losses and samples would be wrong; this architecture is not supported."
        )
