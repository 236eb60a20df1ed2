"""One copy of a prompt for all its rows: the same samples, and log-probs of a fresh forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdrl.engines import TorchEngine, decoding
from kdrl.engines.shared import SharedPrompts
from kdrl.models import encode_prompt
from kdrl.models.heads import causal_lm

from .toys import full_logp, toy

PROMPTS = ["1+2=", "34-5+6=", "7=", "12+34+56+78-9=", "0-0="]


def written(loaded, shared: int, *, rows: int = 64, samples: int = 5, prompts=PROMPTS, tokens: int = 12):
    # Several end tokens, so that rows leave at different times.
    engine = TorchEngine(replace(loaded, eos_ids=(1, 4, 9)), rows)
    assert engine.plan.shared > 1
    engine.plan = replace(engine.plan, shared=shared)
    texts = [encode_prompt(loaded, prompt) for prompt in prompts]
    found = engine.generate(texts, samples=samples, max_new_tokens=tokens, seed=3)
    return texts, found


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2", "mistral"])
@pytest.mark.parametrize("rows", [64, 7])
def test_samples_and_log_probs_are_those_of_rows_with_copies(architecture, rows):
    settings = {"sliding_window": None} if architecture == "mistral" else {}
    loaded = toy(architecture, **settings)
    texts, found = written(loaded, 1, rows=rows)
    _, wanted = written(loaded, 0, rows=rows)
    lengths = {len(sample.token_ids) for samples in found for sample in samples}
    assert len(lengths) > 2
    for text, mine, theirs in zip(texts, found, wanted, strict=True):
        for sample, other in zip(mine, theirs, strict=True):
            assert sample.token_ids == other.token_ids
            want = full_logp(loaded, text, sample.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(sample.logp), want, atol=2e-4, rtol=1e-4)


def test_prompts_are_kept_once_and_only_while_rows_continue_them(monkeypatch):
    held = []
    keep, init = SharedPrompts.keep, SharedPrompts.__init__

    def making(self, cache, parent_B):
        init(self, cache, parent_B)
        held.append(len(self._keys[0]))

    def keeping(self, keep_B):
        keep(self, keep_B)
        held.append(len(self._keys[0]))
        assert set(self._parent_B.tolist()) == set(range(held[-1]))

    monkeypatch.setattr(SharedPrompts, "__init__", making)
    monkeypatch.setattr(SharedPrompts, "keep", keeping)
    written(toy(), 1, samples=2, tokens=40)
    # The engine checks itself with three rows of two prompts, and drops one.
    assert held[0] == 2
    assert len(PROMPTS) in held
    assert held[-1] < len(PROMPTS)
    assert held[held.index(len(PROMPTS)) :] == sorted(held[held.index(len(PROMPTS)) :], reverse=True)


def test_short_prompts_and_prompts_of_one_row_are_not_shared(monkeypatch):
    made = []
    monkeypatch.setattr(SharedPrompts, "_arrange", lambda self: made.append(self))
    loaded = toy()
    rows = decoding.Rows(loaded, [[3, 4, 5], [3, 4, 5]], 4, decoding.Plan(True, fused=True, shared=4))
    assert rows._shared is None
    rows = decoding.Rows(loaded, [[3, 4, 5], [3, 4, 6]], 4, decoding.Plan(True, fused=True, shared=1))
    assert rows._shared is None
    assert not made
    rows = decoding.Rows(loaded, [[3, 4, 5], [3, 4, 5]], 4, decoding.Plan(True, fused=True, shared=3))
    assert rows._shared is not None


@pytest.mark.parametrize("order", [[0, 0, 1, 1, 2, 2], [0, 1, 0, 2, 1, 0], [2, 2, 2, 2, 0, 1]])
def test_rows_in_any_order_and_number_attend_to_their_own_prompt(order):
    loaded = toy()
    texts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    prompts, after = [texts[i] for i in order], [3, 1, 4, 1, 5, 9]
    found = []
    with torch.inference_mode():
        for shared in (0, 1):
            plan = decoding.Plan(True, ready_mask=True, fused=True, shared=shared)
            rows = decoding.Rows(loaded, prompts, 4, plan)
            rows.step(torch.tensor(after))
            rows.keep(torch.tensor([1, 2, 5]))
            rows.step(torch.tensor([2, 7, 1]))
            found.append(rows.hidden_BD)
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
        for row, last in zip((1, 2, 5), (2, 7, 1), strict=True):
            ids = torch.tensor([[*prompts[row], after[row], last]])
            hidden = causal_lm(loaded.model).model(input_ids=ids).last_hidden_state[:, -1]
            mine = found[1][(1, 2, 5).index(row)][None]
            torch.testing.assert_close(mine, hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma3_text"])
def test_prompts_that_go_through_in_parts_give_the_same_samples(architecture, monkeypatch):
    loaded = toy(architecture, **({"sliding_window": 64} if architecture == "gemma3_text" else {}))
    widths = []
    forward = decoding.Rows._forward

    def counting(self, ids_BL, *rest):
        widths.append(ids_BL.numel() if ids_BL.shape[1] > 1 else 0)
        return forward(self, ids_BL, *rest)

    monkeypatch.setattr(decoding.Rows, "_forward", counting)
    found = []
    for bound in (decoding._PREFILL, 20):
        monkeypatch.setattr(decoding, "_PREFILL", bound)
        engine = TorchEngine(loaded, 64)
        widths.clear()
        texts = [encode_prompt(loaded, prompt) for prompt in PROMPTS]
        found.append(engine.generate(texts, samples=3, max_new_tokens=8, seed=1))
        assert max(widths) == (70 if bound > 20 or architecture == "gemma3_text" else 14)
    for mine, theirs in zip(*found, strict=True):
        assert [s.token_ids for s in mine] == [s.token_ids for s in theirs]
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-5, rtol=1e-5)
