from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdrl.engines import TorchEngine, decoding, writing
from kdrl.engines.decoding import Plan
from kdrl.engines.torch_engine import _reproduces
from kdrl.errors import UserError
from kdrl.models import encode_prompt

from .toys import full_logp, toy

PROMPTS = ["1+2=", "34-5+6=", "7=", "1+2="]
ARCHITECTURES = {
    "qwen3": {},
    "llama": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 6, "head_dim": 8},
    "gemma3_text": {"sliding_window": 6, "_sliding_window_pattern": 2, "head_dim": 8},
    "mistral": {"sliding_window": 6},
    "cohere": {},
    "granite": {"logits_scaling": 4.0},
    "gpt_neox": {},
}


@pytest.fixture(scope="module")
def qwen():
    return toy("qwen3")


def flat(out):
    return [sample for samples in out for sample in samples]


def encoded(loaded, texts=PROMPTS):
    return [encode_prompt(loaded, text) for text in texts]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logp_is_that_of_a_fresh_forward(architecture):
    loaded = toy(architecture, **ARCHITECTURES[architecture])
    prompts = encoded(loaded)
    out = TorchEngine(loaded, 64).generate(prompts, samples=4, max_new_tokens=16, temperature=0.7, seed=3)
    for prompt, samples in zip(prompts, out, strict=True):
        for sample in samples:
            assert 1 <= len(sample.token_ids) == len(sample.logp) <= 16
            want = full_logp(loaded, prompt, sample.token_ids, 0.7)
            torch.testing.assert_close(torch.tensor(sample.logp), want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("max_rows", [1, 3, 5])
def test_a_sample_depends_on_nothing_else_in_the_batch(qwen, max_rows):
    prompts = encoded(qwen)
    ask = {"samples": 5, "max_new_tokens": 24, "seed": 11}
    whole = TorchEngine(qwen, 64).generate(prompts, **ask)
    parts = TorchEngine(qwen, max_rows).generate(prompts[:3][::-1], **ask)[::-1]
    fewer = TorchEngine(qwen, max_rows).generate(prompts[1:2], samples=2, max_new_tokens=24, seed=11)
    for a, b in [*zip(flat(whole[:3]), flat(parts), strict=True), *zip(whole[1], fewer[0], strict=False)]:
        assert (a.token_ids, a.ended) == (b.token_ids, b.ended)
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-4, rtol=1e-4)
    assert [s.token_ids for s in whole[0]] != [s.token_ids for s in whole[3]], "a repeated prompt repeats its draws"


def test_the_seed_decides(qwen):
    engine, prompts = TorchEngine(qwen, 64), encoded(qwen)
    ask = {"samples": 4, "max_new_tokens": 12}
    assert engine.generate(prompts, seed=5, **ask) == engine.generate(prompts, seed=5, **ask)
    assert engine.generate(prompts, seed=5, **ask) != engine.generate(prompts, seed=6, **ask)


def test_samples_follow_the_exact_distribution_of_three_steps():
    loaded = toy("qwen3", characters="01=", sharp=6.0)
    prompt = encode_prompt(loaded, "0=")
    count, temperature = 8000, 1.3
    drawn = TorchEngine(loaded, 4000).generate(
        [prompt], samples=count, max_new_tokens=3, temperature=temperature, seed=0
    )[0]
    seen: dict[tuple[int, ...], int] = {}
    for sample in drawn:
        seen[tuple(sample.token_ids)] = seen.get(tuple(sample.token_ids), 0) + 1
    statistic, cells, total = 0.0, 0, 0.0
    eos, vocabulary = loaded.eos_ids[0], range(loaded.vocab_size)
    texts = [t for n in (1, 2, 3) for t in itertools.product(vocabulary, repeat=n)]
    whole = [t for t in texts if eos not in t[:-1] and (len(t) == 3 or t[-1] == eos)]
    for text in whole:
        probability = float(full_logp(loaded, prompt, list(text), temperature).sum().exp())
        total += probability
        if count * probability >= 5:
            statistic += (seen.get(text, 0) - count * probability) ** 2 / (count * probability)
            cells += 1
    assert total == pytest.approx(1.0, abs=1e-4)
    assert set(seen) <= set(whole)
    assert cells > 20
    # 99.99 % of the chi-square law, by its normal approximation.
    assert statistic < cells + 3.72 * (2 * cells) ** 0.5


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma3_text"])
def test_greedy_is_what_generate_writes(architecture):
    loaded = toy(architecture, **ARCHITECTURES[architecture])
    for prompt, samples in zip(
        encoded(loaded),
        TorchEngine(loaded, 2).generate(encoded(loaded), samples=2, max_new_tokens=20, temperature=0.0, seed=0),
        strict=True,
    ):
        theirs = loaded.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
        )[0, len(prompt) :].tolist()
        for sample in samples:
            assert sample.token_ids == theirs
            want = full_logp(loaded, prompt, theirs, 1.0)
            torch.testing.assert_close(torch.tensor(sample.logp), want, atol=2e-4, rtol=1e-4)


def test_responses_end_at_the_first_end_token(qwen):
    samples = flat(TorchEngine(qwen, 16).generate(encoded(qwen), samples=40, max_new_tokens=40, seed=2))
    eos = qwen.eos_ids[0]
    assert any(s.ended for s in samples)
    assert not all(s.ended for s in samples)
    for sample in samples:
        assert eos not in sample.token_ids[:-1]
        assert sample.ended == (sample.token_ids[-1] == eos)
        assert sample.ended or len(sample.token_ids) == 40


@pytest.mark.parametrize(("pays", "look"), [(0.0, 1), (1e9, 1), (0.5, 8)])
def test_compaction_changes_no_sample(qwen, monkeypatch, pays, look):
    prompts, ask = encoded(qwen), {"samples": 8, "max_new_tokens": 40, "seed": 4}
    want = TorchEngine(qwen, 64).generate(prompts, **ask)
    monkeypatch.setattr(writing, "_COMPACTION_STEPS", pays)
    monkeypatch.setattr(writing, "_LOOK_EVERY", {"cpu": look})
    for a, b in zip(flat(TorchEngine(qwen, 64).generate(prompts, **ask)), flat(want), strict=True):
        assert (a.token_ids, a.ended) == (b.token_ids, b.ended)
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (4, 0.7)])
def test_filtered_samples_stay_in_the_filter_and_keep_unfiltered_logp(qwen, top_k, top_p):
    prompt = encode_prompt(qwen, "1+2=")
    engine = TorchEngine(qwen, 500, filtered_ok=True)
    drawn = engine.generate([prompt], samples=500, max_new_tokens=1, top_k=top_k, top_p=top_p, seed=0)[0]
    each = [[v] for v in range(qwen.vocab_size)]
    logp = {v[0]: float(full_logp(qwen, prompt, v, 1.0)[0]) for v in each}
    ranked = sorted(logp, key=lambda v: -logp[v])[: top_k or None]
    mass = torch.tensor([logp[v] for v in ranked]).softmax(0)
    allowed = {v for v, before in zip(ranked, (mass.cumsum(0) - mass).tolist(), strict=True) if before < top_p}
    assert {s.token_ids[0] for s in drawn} == allowed
    for sample in drawn:
        assert sample.logp[0] == pytest.approx(logp[sample.token_ids[0]], abs=1e-4)


def test_filtered_sampling_must_be_asked_for_by_name(qwen):
    for option in ({"top_p": 0.9}, {"top_k": 5}):
        with pytest.raises(UserError, match="refused"):
            TorchEngine(qwen, 4).generate([[3]], samples=1, max_new_tokens=2, seed=0, **option)


def test_a_stop_string_ends_the_row_where_it_first_stands(qwen):
    prompts, ask = encoded(qwen), {"samples": 30, "max_new_tokens": 30, "seed": 8}
    free = flat(TorchEngine(qwen, 64).generate(prompts, **ask))
    stopped = flat(TorchEngine(qwen, 64).generate(prompts, stop=["+4", "="], **ask))
    cut = 0
    for a, b in zip(free, stopped, strict=True):
        texts = [qwen.tokenizer.decode(a.token_ids[: n + 1]) for n in range(len(a.token_ids))]
        first = next((n + 1 for n, text in enumerate(texts) if "+4" in text or "=" in text), len(texts))
        assert b.token_ids == a.token_ids[:first]
        cut += first < len(texts)
        assert b.ended == (a.ended or first < len(texts) or texts[-1].endswith(("+4", "=")))
    assert cut > 0


def test_padded_vocabulary_rows_are_never_drawn():
    loaded = toy("qwen3")
    real = loaded.vocab_size
    loaded.model.resize_token_embeddings(real + 60, mean_resizing=False)
    with torch.no_grad():  # without the slice the padding would take nearly all of the mass
        loaded.model.get_output_embeddings().weight[real:] = loaded.model.get_output_embeddings().weight[:60].sum(0)
    samples = flat(TorchEngine(loaded, 64).generate(encoded(loaded), samples=20, max_new_tokens=10, seed=0))
    assert max(max(s.token_ids) for s in samples) < real
    prompt = encode_prompt(loaded, PROMPTS[0])
    want = full_logp(loaded, prompt, samples[0].token_ids, 1.0)
    torch.testing.assert_close(torch.tensor(samples[0].logp), want, atol=2e-4, rtol=1e-4)


def test_the_model_is_left_as_it_was(qwen):
    loaded = toy("qwen3")
    loaded.model.train()
    before = {name: p.clone() for name, p in loaded.model.state_dict().items()}
    TorchEngine(loaded, 8).generate(encoded(loaded), samples=2, max_new_tokens=4, seed=0)
    assert loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.state_dict().items())


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma3_text", "mistral"])
def test_every_plan_reproduces_the_full_forward(architecture):
    loaded = toy(architecture, **ARCHITECTURES[architecture])
    with torch.inference_mode():
        for plan in (Plan.fastest(loaded), Plan(roomy_cache=True), Plan()):
            assert _reproduces(loaded, plan), plan


def test_an_architecture_that_decodes_wrongly_is_refused(monkeypatch):
    step = decoding.Rows.step

    def forgets_its_position(rows, token_B):
        rows._position_B1 = rows._position_B1 - 1
        step(rows, token_B)

    monkeypatch.setattr(decoding.Rows, "step", forgets_its_position)
    with pytest.raises(UserError, match="Qwen3ForCausalLM"):
        TorchEngine(toy("qwen3"), 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"samples": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 200}, "context of 128"),
        ({"prompts": [[]]}, "no tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": "#"}, "list"),
    ],
)
def test_bad_requests_are_sentences(qwen, change, sentence):
    ask = {"prompts": [[3, 4]], "samples": 1, "max_new_tokens": 4, "seed": 0, **change}
    with pytest.raises(UserError, match=sentence):
        TorchEngine(qwen, 4).generate(**ask)


def test_no_prompts_give_no_samples(qwen):
    assert TorchEngine(qwen, 4).generate([], samples=2, max_new_tokens=4, seed=0) == []


@pytest.mark.parametrize("change", [{"autocast": "bfloat16"}, {"dtype": "bfloat16"}])
def test_autocast_and_bfloat16_are_as_near_to_float64_as_the_models_own_forward(change):
    """Root mean square in nats: below 0.02 on this toy, and at most 1.2 times that of one plain forward."""
    loaded = toy("qwen3")
    loaded.config = loaded.config.model_copy(update=change)
    if "dtype" in change:
        loaded.model.to(torch.bfloat16)
    exact = replace(loaded, model=copy.deepcopy(loaded.model).double(), config=toy("qwen3").config)
    prompts = encoded(loaded)
    out = TorchEngine(loaded, 64).generate(prompts, samples=8, max_new_tokens=12, seed=1)
    apart = {"engine": [], "forward": []}
    for prompt, samples in zip(prompts, out, strict=True):
        for sample in samples:
            want = full_logp(exact, prompt, sample.token_ids, 1.0)
            with loaded.autocast():
                plain = full_logp(loaded, prompt, sample.token_ids, 1.0)
            apart["engine"].append(torch.tensor(sample.logp) - want)
            apart["forward"].append(plain - want)
    error = {name: float(torch.cat(found).square().mean().sqrt()) for name, found in apart.items()}
    assert error["engine"] < 0.02
    assert error["engine"] < 1.2 * error["forward"]


class Casts(TorchDispatchMode):
    """Counts conversions of tensors of the given shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and tuple(args[0].shape) in self.shapes:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trainable", [False, True])
def test_autocast_casts_each_weight_once_a_call_however_many_tokens(trainable):
    loaded = toy("qwen3")
    loaded.config = loaded.config.model_copy(update={"autocast": "bfloat16"})
    loaded.model.requires_grad_(trainable)
    linear = [m.weight for m in loaded.model.model.modules() if isinstance(m, torch.nn.Linear)]
    engine = TorchEngine(replace(loaded, eos_ids=(-1,)), 64)
    for tokens in (4, 12):
        with Casts({tuple(w.shape) for w in linear}) as casts:
            engine.generate(encoded(loaded), samples=3, max_new_tokens=tokens, seed=0)
        assert casts.count == 2 * len(linear)  # for the prompts, and for the steps
    assert all(p.requires_grad == trainable for p in loaded.model.parameters())


def test_a_device_that_is_full_is_no_architecture_that_decodes_wrongly(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kdrl.engines.torch_engine._reproduces", full)
    with pytest.raises(torch.OutOfMemoryError):
        TorchEngine(toy("qwen3"), 4)
