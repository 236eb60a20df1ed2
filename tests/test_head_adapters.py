"""Adapters on the LM head: scored, sampled, switched off and saved as the model itself has them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import raw_recipe, rows_of, run, section, with_teacher
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdrl.engines.sampling import Sampler, SamplingOptions
from kdrl.errors import UserError
from kdrl.models import (
    LoadedModel,
    LoraConfig,
    ModelConfig,
    NewModel,
    NewTokenizer,
    head_of,
    hidden_states,
    load_model,
    save_final,
)
from kdrl.objectives.head import score_tokens

NEW = NewModel(architecture="qwen3", hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48)
CHARS = NewTokenizer(characters="0123456789+-=;# \n")


def fresh(trainable: bool = False, **change: Any) -> LoadedModel:
    return load_model(ModelConfig(**{"model": NEW, "tokenizer": CHARS, **change}), "cpu", trainable=trainable, seed=0)


def untied() -> Any:
    return fresh(model=NEW.model_copy(update={"tie_embeddings": False})).model


def ids(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))


def head_adapted(tied: bool) -> LoadedModel:
    """A float64 student with adapters on its head that are far from zero."""
    model = NEW.model_copy(update={"tie_embeddings": tied})
    loaded = fresh(True, model=model, lora=LoraConfig(rank=3, alpha=4.5, target_modules=["lm_head", "q_proj"]))
    loaded.model.double()
    with torch.no_grad():
        for name, p in loaded.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return loaded


def scored_by_the_head(loaded: LoadedModel, batch: Tensor) -> Tensor:
    hidden_ND = hidden_states(loaded, batch, torch.ones_like(batch))[:, :-1].flatten(0, 1)
    return score_tokens(head_of(loaded), hidden_ND, batch[:, 1:].flatten(), chunk_tokens=5).logp_N


def scored_by_the_model(loaded: LoadedModel, batch: Tensor) -> Tensor:
    logp = loaded.model(batch).logits[:, :-1, : loaded.vocab_size].log_softmax(-1)
    return logp.gather(-1, batch[:, 1:, None]).flatten()


@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_the_head_is_the_models_own_in_value_and_gradient(tied: bool):
    loaded = head_adapted(tied)
    batch = ids(loaded.vocab_size)
    pull = torch.randn(batch[:, 1:].numel(), dtype=torch.float64)
    trained = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert any("lm_head.lora_A" in n for n in trained)
    assert all("lora_" in n for n in trained)
    values, gradients = [], []
    for way in (scored_by_the_head, scored_by_the_model):
        values.append(way(loaded, batch))
        gradients.append(torch.autograd.grad((values[-1] * pull).sum(), list(trained.values())))
    torch.testing.assert_close(values[0], values[1], atol=1e-11, rtol=1e-11)
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    model: Any = loaded.model
    with torch.no_grad(), model.disable_adapter():
        assert not head_of(loaded).adapters
        base = scored_by_the_head(loaded, batch)
        torch.testing.assert_close(base, scored_by_the_model(loaded, batch))
        assert not torch.allclose(base, values[0], atol=1e-2)
    model.merge_adapter()
    assert not head_of(loaded).adapters
    if not tied:  # merged into a tied head, the embedding moves too
        torch.testing.assert_close(scored_by_the_head(loaded, batch), values[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_the_head_is_saved_merged_and_as_an_adapter(tied: bool, tmp_path: Path):
    loaded = head_adapted(tied)
    batch = ids(loaded.vocab_size)
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    save_final(loaded, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in loaded.model.named_parameters())
    assert loaded.model.config.tie_word_embeddings == tied
    with torch.no_grad():
        want = loaded.model(batch).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        torch.testing.assert_close(merged(batch).logits, want, atol=1e-5, rtol=1e-5)
        own = merged.get_input_embeddings().weight
        torch.testing.assert_close(own, loaded.model.get_base_model().get_input_embeddings().weight)
        base = fresh(model=NEW.model_copy(update={"tie_embeddings": tied})).model.double()
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        torch.testing.assert_close(adapted(batch).logits, want, atol=1e-5, rtol=1e-5)


def test_lora_on_the_head_samples_from_the_models_own_distribution():
    loaded = head_adapted(False)
    batch = ids(loaded.vocab_size)
    with torch.no_grad():
        hidden_RD = hidden_states(loaded, batch, torch.ones_like(batch))[:, -1]
        found = Sampler(head_of(loaded), SamplingOptions(temperature=0.7)).probabilities(hidden_RD)
        want = (loaded.model(batch).logits[:, -1, : loaded.vocab_size] / 0.7).softmax(-1)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"use_dora": True}, "Dora"), ({"lora_dropout": 0.1}, "lora_dropout"), ({"use_rslora": True}, None)],
)
def test_adapters_of_another_kind_on_the_head_are_refused_and_their_scale_is_theirs(
    options: dict[str, Any], named: str | None
):
    model = untied()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head"], **options))
    if named is None:
        assert [low.scale for low in head_of(adapted).adapters] == [3.0]
        return
    with pytest.raises(UserError, match=named):
        head_of(adapted)


def test_a_head_that_peft_trains_whole_is_the_copy_that_it_trains():
    model = untied()
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, options)
    trained = head_of(adapted).weight_VD
    assert trained.requires_grad
    with torch.no_grad():
        trained.add_(1.0)
    with adapted.disable_adapter():
        assert not torch.allclose(head_of(adapted).weight_VD, trained)


def test_a_run_trains_adapters_on_the_head_beside_its_start_as_reference(world: Path, tmp_path: Path):
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ["lm_head", "q_proj"]}
    objective = [{"policy_gradient": {}}, {"distill": {"divergence": "reverse_kl"}}, {"reference_kl": {"weight": 0.1}}]
    raw = raw_recipe(world, None, **with_teacher(world), student=section() | {"lora": lora}, objective=objective)
    with warnings.catch_warnings():
        # Saving unties the head, so that peft's advice on tied ones is of no use.
        warnings.filterwarnings("error", "Model has `tie_word_embeddings=True`")
        run(raw, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in rows)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert not torch.equal(final.get_output_embeddings().weight, final.get_input_embeddings().weight)
