"""Samples that are told of as they finish: each once, as it is returned, as early as the rows are looked at."""

from __future__ import annotations

from typing import Any

import pytest

from kdrl.engines import TorchEngine, decoding, writing
from kdrl.engines.joint import JointEngine, mixed
from kdrl.models import LoadedModel, encode_prompt

from .test_refill import LONG, refilling
from .toys import toy

ASK: dict[str, Any] = {"samples": 5, "max_new_tokens": 40, "seed": 4}


class Told:
    """Remembers what it was called with, and how many steps had been taken by then."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int, Any]] = []
        self.steps: list[int] = []
        self.taken = 0
        plain = decoding.Rows.step

        def step(rows: Any, token_B: Any) -> None:
            self.taken += 1
            plain(rows, token_B)

        patch.setattr(decoding.Rows, "step", step)

    def __call__(self, prompt: int, sample: int, written: Any) -> None:
        self.calls.append((prompt, sample, written))
        self.steps.append(self.taken)

    def check(self, out: list[list[Any]]) -> None:
        """Each sample once, equal to what was returned."""
        want = {(i, j): sample for i, samples in enumerate(out) for j, sample in enumerate(samples)}
        assert len(self.calls) == len(want)
        assert {(i, j): sample for i, j, sample in self.calls} == want


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return toy("qwen3")


@pytest.mark.parametrize("look_every", [1, 8])
@pytest.mark.parametrize("rows", [64, 7])
@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_each_sample_is_told_once_and_is_the_same(
    loaded: LoadedModel, look_every: int, rows: int, refill: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writing, "_LOOK_EVERY", {"cpu": look_every})
    prompts = [encode_prompt(loaded, text) for text in LONG]
    engine = refilling(loaded, rows) if refill else TorchEngine(loaded, rows)
    want = engine.generate(prompts, temperature=temperature, **ASK)
    told = Told(monkeypatch)
    assert engine.generate(prompts, temperature=temperature, done=told, **ASK) == want
    told.check(want)


@pytest.mark.parametrize("look_every", [1, 8])
def test_a_sample_is_told_of_at_the_first_look_after_its_last_token(
    loaded: LoadedModel, look_every: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writing, "_LOOK_EVERY", {"cpu": look_every})
    prompts = [encode_prompt(loaded, text) for text in LONG]
    engine, told = TorchEngine(loaded, 64), Told(monkeypatch)
    engine.generate(prompts, done=told, **ASK)
    lengths = [len(sample.token_ids) for _, _, sample in told.calls]
    assert min(lengths) + 8 < max(lengths)
    # The n-th token is chosen after n - 1 steps, and looked at before the n-th.
    assert told.steps == [-(-n // look_every) * look_every - 1 for n in lengths]


@pytest.mark.parametrize("rows", [64, 7])
def test_two_writers_together_tell_too(loaded: LoadedModel, rows: int, monkeypatch: pytest.MonkeyPatch):
    teacher = toy("llama", seed=2)
    engine = JointEngine(TorchEngine(loaded, rows), TorchEngine(teacher, rows))
    prompts = [encode_prompt(loaded, text) for text in LONG]
    want = engine.generate(prompts, mixed(0.3), **ASK)
    told = Told(monkeypatch)
    assert engine.generate(prompts, mixed(0.3), done=told, **ASK) == want
    told.check(want)


def test_what_the_listener_raises_ends_the_writing(loaded: LoadedModel):
    def done(prompt: int, sample: int, written: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        TorchEngine(loaded, 8).generate([[3, 4]], done=done, **ASK)
