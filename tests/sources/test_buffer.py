"""DistiLLM's replay buffer: when it writes, when it replays, and that its contents survive a restart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines.toys import toy
from tiny import problem

from kdrl.models import LoadedModel, encode_prompt
from kdrl.objectives.schedules import Schedule
from kdrl.sources.base import Source, restore_to, state_of
from kdrl.sources.buffer import BufferSource
from kdrl.sources.mixture import uniform

from .scripted import Script, judge, request


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return toy()


def buffer(model: LoadedModel, share: Any = 1.0, size: int = 12, seed: int = 0) -> BufferSource:
    return BufferSource(
        Script("student"),
        Script("gold", 1),
        Schedule(share),
        size,
        samples=2,
        model=model,
        judge=judge(lambda text: text.split("/")[2] == "0"),
        next_problem=lambda position: problem(str(position), f"{position}="),
        seed=seed,
    )


def kinds(source: Source, steps: int) -> list[str]:
    return [source.write(request(step, steps))[0].origin for step in range(steps)]


def test_the_draw_decides_as_the_paper_says(model: LoadedModel):
    """By hand from the same draws: phi (1 - t/T), phi while not full, phi, else fixed data."""
    steps, phi, size = 300, 0.6, 30
    source, stored, want = buffer(model, phi, size), 0, []
    for step in range(steps):
        r = uniform(0, "buffer", step)
        new = r < phi * (1 - step / steps) or (r < phi and stored < size)
        stored = min(size, stored + 6 * new)
        want.append("student" if new else "buffer" if r < phi else "gold")
    assert kinds(source, steps) == want
    shares = [want.count(kind) / steps for kind in ("student", "buffer", "gold")]
    # Over the run: phi/2 new, phi/2 replayed, 1 - phi fixed.
    assert shares == pytest.approx([0.3, 0.3, 0.4], abs=0.09)


def test_without_a_share_all_is_fixed_and_with_a_full_one_none(model: LoadedModel):
    assert set(kinds(buffer(model, 0.0), 40)) == {"gold"}
    assert set(kinds(buffer(model, 1.0), 40)) == {"student", "buffer"}


def test_it_forgets_the_oldest_and_replays_only_what_it_holds(model: LoadedModel):
    source, written = buffer(model, size=9), list[tuple[int, tuple[int, ...]]]()
    for step in range(60):
        before = list(written[-9:])
        responses = source.write(request(step, 60))
        if responses[0].origin == "student":
            written += [(step * 3 + r.group, tuple(r.token_ids)) for r in responses]
            assert [(e.position, e.token_ids) for e in source.entries] == written[-9:]
            continue
        found = [(int(r.problem.id), tuple(r.token_ids)) for r in responses]
        assert len(found) == 6, "as many as the student would write"
        left = list(before)
        for one in found:
            left.remove(one)  # each entry at most once
        assert len({r.group for r in responses}) == 6
        for r in responses:
            assert r.prompt_ids == encode_prompt(model, r.problem.prompt)
            assert r.judged
            assert r.correct == (r.token_ids[0] == 2), "the verdict of when it was written"
            assert r.logp is None


def test_replays_are_uniform_over_the_buffer(model: LoadedModel):
    source = buffer(model, size=12)
    for step in range(2):
        source.write(request(step, 1000))
    seen: dict[tuple[int, ...], int] = {}
    rounds = 600
    for n in range(rounds):
        for r in source._replay(request(2, 1000, seed=n)):
            key = (int(r.problem.id), *r.token_ids)
            seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 12
    # Each of 12 is among the 6 drawn with probability 1/2.
    assert all(abs(count - rounds / 2) <= 5 * (rounds / 4) ** 0.5 for count in seen.values())


@pytest.mark.parametrize("cut", [0, 1, 5, 23])
def test_a_restored_buffer_goes_on_alike(model: LoadedModel, cut: int):
    def texts(source: Source, steps: range) -> list[list[tuple[str, list[int], float, int]]]:
        return [[(r.origin, r.token_ids, r.reward, r.group) for r in source.write(request(step, 40))] for step in steps]

    whole = buffer(model, 0.7)
    texts(whole, range(cut))
    values, tensors = state_of(whole)
    want = texts(whole, range(cut, 40))
    assert {origin for step in want for origin, *_ in step} >= {"buffer", "gold"}

    resumed = buffer(model, 0.7)
    restore_to(resumed, values, {name: tensor.clone() for name, tensor in tensors.items()})
    assert texts(resumed, range(cut, 40)) == want
    assert all(tensor.dtype == torch.int64 for tensor in tensors.values())


def test_numbers_are_told(model: LoadedModel):
    source = buffer(model, 0.9)
    ask = request(0, 40)
    source.write(ask)
    assert ask.out.numbers() == {"source/buffer_share": 0.9, "source/buffer_size": 6.0}
    assert ask.out.generated == 6
