"""Training passes in bfloat16 on a CPU: attention in float32, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdrl.models import ModelConfig, NewModel, NewTokenizer, hidden_states, load_model
from kdrl.models.heads import causal_lm

SHAPES = {
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "_sliding_window_pattern": 2},
}
LOW = [{"autocast": "bfloat16"}, {"dtype": "bfloat16"}]


def model(architecture: str = "qwen3", **change):
    settings = SHAPES[architecture]
    new = NewModel(
        architecture=architecture, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, settings=settings
    )
    config = ModelConfig(model=new, tokenizer=NewTokenizer(characters="0123456789+-=;#"), **change)
    return load_model(config, "cpu", trainable=True, seed=0)


def batch(loaded):
    ids = torch.randint(loaded.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return ids, mask


def hidden_and_gradients(loaded):
    ids, mask = batch(loaded)
    with loaded.autocast():
        hidden = hidden_states(loaded, ids, mask)
    (hidden.float()[mask.bool()].square().sum()).backward()
    gradients = [p.grad.float().flatten() for p in loaded.model.parameters() if p.grad is not None]
    return hidden.detach()[mask.bool()].float(), torch.cat(gradients)


class Kernels(TorchDispatchMode):
    """Remembers the number formats that fused attention ran in."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.__name__:
            (self.backward if "backward" in func.__name__ else self.forward).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("low", LOW, ids=str)
def test_the_backward_kernel_runs_in_float32_and_teachers_keep_the_fast_forward(low):
    loaded = model(**low)
    with Kernels() as kernels:
        hidden_and_gradients(loaded)
    assert kernels.backward == kernels.forward == {torch.float32}
    with Kernels() as kernels, torch.no_grad(), loaded.autocast():
        hidden_states(loaded, *batch(loaded))
    assert kernels.forward == {torch.bfloat16}
    assert causal_lm(loaded.model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("architecture", SHAPES)
def test_hidden_states_and_gradients_stay_those_of_the_float32_model(architecture, low):
    exact = hidden_and_gradients(model(architecture))
    # Rounded activations alone cost this much; a wrong mask or scale costs more than ten times as much.
    bound = 0.02 if "autocast" in low else 0.07
    for wanted, found in zip(exact, hidden_and_gradients(model(architecture, **low)), strict=True):
        assert (found - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize("low", LOW, ids=str)
def test_recomputed_layers_give_the_same_gradients(low):
    kept, recomputed = (hidden_and_gradients(model(gradient_checkpointing=flag, **low)) for flag in (False, True))
    for wanted, found in zip(kept, recomputed, strict=True):
        assert (found - wanted).norm() < 0.03 * wanted.norm()
