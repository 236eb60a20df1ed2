"""The final model as a normal Hugging Face folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from kdrl.models.heads import causal_lm
from kdrl.models.loading import LoadedModel, quiet
from kdrl.models.quantise import dequantised, is_quantised


def save_final(loaded: LoadedModel, folder: Path) -> None:
    """Write weights, config, tokenizer and end tokens to `folder`, which plain transformers loads.

    With LoRA, the adapter goes to `folder/adapter` and the merged weights to `folder`; the live model is not touched.
    A tied head that has an adapter of its own is merged untied.
    A model read from GGUF or trained under fake quantisation is saved dequantised. Saving twice gives the same bytes.
    Dropout stays 0 in the saved config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = loaded.model
    if hasattr(model, "peft_config"):
        # Left to itself, peft looks for the base model's config, on the hub too, to see whether tokens were added.
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # peft's empty model card
        # Merging and unmerging rounds, so the merge happens on a copy.
        model = copy.deepcopy(model)
        _untie_adapted_head(model)
        model = model.merge_and_unload()
    elif is_quantised(model):
        model = dequantised(model)
    lm: Any = causal_lm(model)
    held = lm.generation_config
    lm.generation_config = _generation_config(loaded, held)
    try:
        with quiet():
            lm.save_pretrained(folder)
    finally:
        lm.generation_config = held
    loaded.tokenizer.save_pretrained(folder)


def _untie_adapted_head(model: Any) -> None:
    """Give a head that has adapters weights of its own, so that merging them does not change a tied embedding."""
    lm: Any = causal_lm(model)
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if hasattr(head, "lora_A") and head.get_base_layer().weight is embedding.weight:
        head.get_base_layer().weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        lm.config.get_text_config().tie_word_embeddings = lm.config.tie_word_embeddings = False


def _generation_config(loaded: LoadedModel, held: GenerationConfig | None) -> GenerationConfig:
    saved = copy.deepcopy(held) if held is not None else GenerationConfig()
    ids = list(loaded.eos_ids)
    saved.eos_token_id = ids if len(ids) > 1 else ids[0]
    saved.pad_token_id = loaded.pad_id
    return saved
