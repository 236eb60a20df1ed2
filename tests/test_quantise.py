"""Fake quantisation against a few-line reference; its gradient; the saved folder; stopping and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import CHARACTERS, MODEL, raw_recipe, run, with_teacher
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from kdrl.engines import TorchEngine
from kdrl.errors import UserError
from kdrl.models import LoadedModel, ModelConfig, load_model, save_final
from kdrl.models.quantise import FakeQuantise, dequantised, fake_quantise, full_precision, is_quantised


def by_hand(row: list[float], bits: int, scheme: str) -> list[float]:
    """One group of one row, from the formula, in Python's own floats."""
    if scheme == "symmetric":
        top = 2 ** (bits - 1) - 1
        scale = max(map(abs, row)) / top
        return [scale * round(x / scale) for x in row] if scale else row
    low, high = min(0.0, *row), max(0.0, *row)
    scale = (high - low) / (2**bits - 1)
    if not scale:
        return row
    zero = -round(low / scale)
    return [scale * (min(max(round(x / scale) + zero, 0), 2**bits - 1) - zero) for x in row]


@given(
    bits=st.integers(2, 8),
    group=st.integers(1, 9),
    scheme=st.sampled_from(["asymmetric", "symmetric"]),
    shift=st.sampled_from([-2.0, 0.0, 2.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=80, deadline=None)
def test_every_group_is_rounded_by_the_formula(bits: int, group: int, scheme: str, shift: float, seed: int):
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    weight[1, :3] = 0.0
    found = fake_quantise(weight, bits, group, scheme)
    want = [
        [y for i in range(0, 7, group) for y in by_hand(row[i : i + group], bits, scheme)] for row in weight.tolist()
    ]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)
    for row in found:
        for part in row.split(group):
            assert len(part.unique()) <= 2**bits
    torch.testing.assert_close(fake_quantise(found, bits, group, scheme), found, atol=1e-9, rtol=1e-9)


TRAINED: dict[str, Any] = {"trainable": True, "seed": 5}


def section(model: dict[str, Any], quantise: dict[str, Any]) -> ModelConfig:
    raw = {"model": model, "tokenizer": {"characters": CHARACTERS}, "quantise": quantise}
    return ModelConfig.model_validate(raw)


def small(tie: bool = True, **quantise: Any) -> LoadedModel:
    return load_model(section(MODEL | {"tie_embeddings": tie}, {"bits": 3, "group": 8} | quantise), "cpu", **TRAINED)


def logits(model: Any) -> Tensor:
    ids = torch.arange(2, 14).view(2, 6)
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("tie", [True, False])
def test_only_linear_layers_are_rounded_and_neither_head_nor_embeddings(tie: bool):
    loaded = small(tie)
    lm = loaded.model
    rounded = {n for n, m in lm.named_modules() if parametrize.is_parametrized(m, "weight")}
    linear = {n for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear)}
    assert rounded == linear - {"lm_head"}
    assert len(rounded) == 7
    skipped = small(tie, skip=["down_proj", "layers.0.self_attn.q_proj"]).model
    assert rounded - {n for n, m in skipped.named_modules() if parametrize.is_parametrized(m, "weight")} == {
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
    }


def test_the_model_computes_with_the_rounded_weights_and_with_its_own_where_asked():
    loaded = small()
    lm = loaded.model
    plain = load_model(loaded.config.model_copy(update={"quantise": None}), "cpu", **TRAINED).model
    with full_precision(lm):
        assert torch.equal(logits(lm), logits(plain))
    assert not torch.allclose(logits(lm), logits(plain), atol=1e-3)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(fake_quantise(module.weight, 3, 8, "asymmetric"))
    assert torch.equal(logits(lm), logits(plain))


def test_the_gradient_passes_straight_through():
    """The gradient in the master weights is the gradient in the rounded ones of a plain model."""
    loaded = small()
    lm = loaded.model
    twin = dequantised(lm)
    assert not is_quantised(twin)
    for model in (lm, twin):
        torch.log_softmax(logits(model), -1)[..., 3].sum().backward()
    master = dict(lm.named_parameters())
    seen = 0
    for name, weight in twin.named_parameters():
        rounded = name.replace(".weight", ".parametrizations.weight.original")
        mine = master[rounded if rounded in master else name]
        seen += rounded in master
        torch.testing.assert_close(mine.grad, weight.grad, atol=1e-6, rtol=1e-5)
    assert seen == 7


def test_the_engine_rounds_once_for_all_steps(monkeypatch: pytest.MonkeyPatch):
    loaded = small()
    engine = TorchEngine(loaded, 8)
    calls = [0]
    forward = FakeQuantise.forward

    def counted(self: FakeQuantise, weight: Tensor) -> Tensor:
        calls[0] += 1
        return forward(self, weight)

    monkeypatch.setattr(FakeQuantise, "forward", counted)
    written = engine.generate([[3, 4, 5], [6, 7]], samples=2, max_new_tokens=12, seed=1)
    assert calls[0] == 7
    with torch.no_grad():
        next(p for n, p in loaded.model.named_parameters() if "q_proj" in n).mul_(-3.0)
    again = engine.generate([[3, 4, 5], [6, 7]], samples=2, max_new_tokens=12, seed=1)
    assert calls[0] == 14
    assert [s.logp for row in written for s in row] != [s.logp for row in again for s in row]


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_what_the_engine_says_is_what_training_computes(autocast: Any):
    loaded = small()
    loaded.config = loaded.config.model_copy(update={"autocast": autocast})
    ((sample,),) = TorchEngine(loaded, 8).generate([[3, 4, 5]], samples=1, max_new_tokens=8, seed=1)
    with loaded.autocast():
        out = loaded.model(input_ids=torch.tensor([[3, 4, 5, *sample.token_ids]])).logits[0, 2:-1].float()
    logp = torch.log_softmax(out[:, : loaded.vocab_size], -1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sample.logp), logp, atol=1e-5 if autocast is None else 0.05, rtol=0.01)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_the_saved_folder_is_ordinary_and_gives_the_same_logits(tie: bool, scheme: str, tmp_path: Path):
    loaded = small(tie, scheme=scheme, bits=2)
    want = logits(loaded.model).detach()
    save_final(loaded, tmp_path / "final")
    loading: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    again, report = loading
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(again), want, rtol=1e-5, atol=1e-6)
    assert is_quantised(loaded.model)
    row = again.model.layers[0].mlp.up_proj.weight[0]
    assert max(len(part.unique()) for part in row.split(8)) <= 4


def test_a_run_trains_under_quantisation_and_saves_rounded_weights(world: Path, tmp_path: Path):
    quantise = {"bits": 4, "group": 8}
    raw = raw_recipe(world, "opd", student={"quantise": quantise}, **with_teacher(world))
    run(raw, tmp_path / "run")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    for module in final.model.layers[0].modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            torch.testing.assert_close(fake_quantise(weight, 4, 8, "asymmetric"), weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantise": {"bits": 1}}, "greater than or equal to 2"),
        ({"quantise": {"bits": 4}, "lora": {"rank": 2}}, "remove one of them"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        ModelConfig.model_validate({"model": MODEL, "tokenizer": {"characters": CHARACTERS}} | change)


def test_a_layer_that_is_not_there_and_an_architecture_without_linear_layers_are_refused():
    with pytest.raises(UserError, match=r"no linear layer is called 'down_prjo'; did you mean 'down_proj'"):
        small(skip=["down_prjo"])
    with pytest.raises(UserError, match="leaves no linear layer"):
        small(skip=["layers"])
    gpt2 = {"architecture": "gpt2", "hidden_size": 16, "layers": 1, "heads": 2}
    with pytest.raises(UserError, match="matrices outside of linear layers"):
        load_model(section(gpt2, {"bits": 4}), "cpu", **TRAINED)
