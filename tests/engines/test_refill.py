from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kdrl.engines import TorchEngine, writing
from kdrl.engines.decoding import Plan
from kdrl.models import LoadedModel, encode_prompt
from kdrl.models.heads import decoder_of

from .toys import full_logp, toy

LONG = ["1+2=", "34-5+6=", "7=", "12+34+56+78-9=", "0-0=", "5+5+5+5="]


def refilling(loaded: LoadedModel, rows: int) -> TorchEngine:
    """An engine that refills, which it does by itself on a GPU alone."""
    engine = TorchEngine(loaded, rows)
    assert not engine.plan.refill
    assert Plan.fastest(loaded).roomy_cache
    engine.plan = replace(engine.plan, refill=True)
    return engine


def fused(plan: Plan) -> Plan:
    return replace(plan, fused=True)


def plain(plan: Plan) -> Plan:
    return replace(plan, fused=False)


def static(plan: Plan) -> Plan:
    return replace(plan, fused=True, static=True)


@pytest.mark.parametrize("change", [fused, plain, static])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2", "gpt2"])
def test_refilled_rows_write_what_fresh_rows_write(architecture, change, monkeypatch):
    """Prompts of six lengths through four rows: buffers move, masks are made anew, places change hands."""
    loaded = toy(architecture)
    prompts = [encode_prompt(loaded, text) for text in LONG]
    ask = {"samples": 5, "max_new_tokens": 60, "seed": 4}
    alone = TorchEngine(loaded, 64)
    alone.plan = replace(alone.plan, refill=False, compact=False, fused=False)
    want = alone.generate(prompts, **ask)
    few = refilling(loaded, 4)
    few.plan = few.plan if architecture == "gpt2" else change(few.plan)
    for cost in (0.0, 1.0, 3.0):
        monkeypatch.setattr(writing, "_REFILL_STEPS", cost)
        found = few.generate(prompts, **ask)
        for a, b in zip(itertools.chain(*found), itertools.chain(*want), strict=True):
            assert (a.token_ids, a.ended) == (b.token_ids, b.ended)
            torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=2e-4, rtol=1e-4)
    lengths = [len(s.token_ids) for s in itertools.chain(*want)]
    assert min(lengths) < 10  # else no place would change hands at different times
    assert max(lengths) > 30


def test_logp_of_refilled_rows_is_that_of_a_fresh_forward():
    loaded = toy("qwen3")
    prompts = [encode_prompt(loaded, text) for text in LONG]
    out = refilling(loaded, 3).generate(prompts, samples=4, max_new_tokens=40, temperature=0.8, seed=5)
    for prompt, samples in zip(prompts, out, strict=True):
        for sample in samples:
            want = full_logp(loaded, prompt, sample.token_ids, 0.8)
            torch.testing.assert_close(torch.tensor(sample.logp), want, atol=3e-4, rtol=1e-4)


def test_refilled_rows_follow_the_exact_distribution():
    loaded = toy("qwen3", characters="01=", sharp=6.0)
    prompt = encode_prompt(loaded, "0=")
    count, steps = 6000, 3
    out = refilling(loaded, 97).generate([prompt], samples=count, max_new_tokens=steps, seed=2)[0]
    seen: dict[tuple[int, ...], int] = {}
    for sample in out:
        key = tuple(sample.token_ids)
        seen[key] = seen.get(key, 0) + 1
    law, eos = {}, loaded.eos_ids[0]
    for length in range(1, steps + 1):
        for tokens in itertools.product(range(loaded.vocab_size), repeat=length):
            if eos not in tokens[:-1] and (length == steps or tokens[-1] == eos):
                law[tokens] = float(full_logp(loaded, prompt, list(tokens), 1.0).sum().exp())
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-4)
    cells = [t for t, p in law.items() if p * count >= 5]
    rest = count - sum(seen.get(t, 0) for t in cells)
    chi = sum((seen.get(t, 0) - law[t] * count) ** 2 / (law[t] * count) for t in cells)
    left = (1 - sum(law[t] for t in cells)) * count
    chi += (rest - left) ** 2 / max(left, 1.0)
    assert chi < len(cells) + 5 * (2 * len(cells)) ** 0.5, (chi, len(cells))


def test_each_prompt_is_run_once_however_many_rows_it_waits_for():
    loaded = toy("llama")
    prompts = [encode_prompt(loaded, text) for text in LONG]
    read: list[int] = []

    def count(module, args, kwargs):
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:
            read.append(int(ids.shape[0]))

    engine = refilling(loaded, 5)
    handle = decoder_of(loaded.model).register_forward_pre_hook(count, with_kwargs=True)
    engine.generate(prompts, samples=12, max_new_tokens=12, seed=0)
    handle.remove()
    assert sum(read) == len(prompts)


def test_a_row_is_not_held_by_a_long_one():
    """With refill, steps are near the sum of all lengths over the rows; without it each wave waits for its longest."""
    loaded = toy("qwen3")
    prompts = [encode_prompt(loaded, text) for text in LONG]
    ask = {"samples": 20, "max_new_tokens": 100, "seed": 1}
    steps = {}
    for name, change in {"refill": {}, "waves": {"refill": False, "compact": False}}.items():
        engine = refilling(loaded, 8)
        engine.plan = replace(engine.plan, fused=False, **change)
        taken = []
        handle = decoder_of(loaded.model).register_forward_pre_hook(
            lambda module, args, kwargs, taken=taken: taken.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        out = engine.generate(prompts, **ask)
        handle.remove()
        steps[name] = sum(shape[1] == 1 for shape in taken)
    written = sum(len(s.token_ids) for s in itertools.chain(*out))
    assert steps["refill"] < 1.5 * written / 8 + 100
    assert steps["refill"] < 0.6 * steps["waves"]


def test_lora_is_added_to_the_fused_weights():
    from kdrl.models import load_model

    from .toys import toy_config

    config = toy_config("llama").model_dump()
    from kdrl.models import ModelConfig

    loaded = load_model(ModelConfig.model_validate({**config, "lora": {"rank": 4}}), "cpu", trainable=True, seed=0)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    engine = TorchEngine(loaded, 8)
    assert engine.plan.fused
    prompt = encode_prompt(loaded, "1+2=")
    for sample in engine.generate([prompt], samples=4, max_new_tokens=12, seed=0)[0]:
        want = full_logp(loaded, prompt, sample.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(sample.logp), want, atol=2e-4, rtol=1e-4)
        with loaded.model.disable_adapter():
            assert not torch.allclose(full_logp(loaded, prompt, sample.token_ids, 1.0), want, atol=1e-2)
