"""Tiny random models of several architectures for engine and model tests."""

from __future__ import annotations

import torch

from kdrl.models import LoadedModel, ModelConfig, NewModel, NewTokenizer, load_model

CHARACTERS = "0123456789+-=;#"


def toy_config(architecture: str = "qwen3", characters: str = CHARACTERS, **settings) -> ModelConfig:
    new = NewModel(
        architecture=architecture,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=None if architecture in ("gpt2", "gpt_neox") else 2,
        intermediate_size=48,
        max_positions=128,
        settings=settings,
    )
    return ModelConfig(model=new, tokenizer=NewTokenizer(characters=characters))


def toy(architecture: str = "qwen3", sharp: float = 12.0, seed: int = 1, **settings) -> LoadedModel:
    """A random model whose distributions are far from uniform, so that a wrong position or mask shows."""
    loaded = load_model(toy_config(architecture, **settings), "cpu", trainable=False, seed=seed)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if weight.ndim == 2:
                # Initialised at 0.02: too small for attention to matter.
                weight.mul_(sharp if "emb" in name or "wte" in name else sharp / 2)
    return loaded


def full_logp(loaded: LoadedModel, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """Log-probs of a response from the model's own logits in one plain forward."""
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits[:, : loaded.vocab_size].float() / temperature, -1)
    return logp.gather(-1, torch.tensor(response)[:, None])[:, 0]
