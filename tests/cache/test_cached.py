"""Cached against local: the same numbers within the stated bounds, and exactly those that were stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import flat, made_responses, plain_logp, score, toy

from cache.making import KINDS, all_of, fill, writing
from kdrl.batch import Rollouts
from kdrl.errors import UserError
from kdrl.teachers import LocalTeacher
from kdrl.teachers.base import Evidence
from kdrl.teachers.cache_codec import Scored, codec_of
from kdrl.teachers.cached import CachedTeacher, keys_of
from kdrl.update import Updater

RESPONSES = made_responses(groups=4, origin="gold")
TERMS: dict[str, dict[str, Any]] = {
    "topk": {"divergence": "forward_kl", "support": {"topk": 9}},
    "draws": {"divergence": "forward_kl", "support": {"draws": 12}},
    "hidden": {"divergence": "forward_kl", "support": "full"},
}


@pytest.fixture(scope="module")
def teacher() -> Any:
    return toy(2, sharp=6.0)


@pytest.fixture(scope="module")
def student() -> Any:
    return toy(1, trainable=True, sharp=6.0)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def cached(kind: str, teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> CachedTeacher:
    return fill(teacher, tmp_path_factory.mktemp("cache") / kind, KINDS[kind], RESPONSES)


def need(cached: CachedTeacher) -> Any:
    return "distribution" if cached.gives.distribution else "few"


def test_sampled_tokens_are_the_local_ones(cached: CachedTeacher, teacher: Any):
    rollouts = Rollouts.of(RESPONSES[::-1])
    keep = torch.arange(rollouts.tokens) % 3 != 1
    for what in ("token", need(cached)):
        local = LocalTeacher(teacher, 4096).score(rollouts, keep, "token", 1.0)
        found = cached.score(rollouts, keep, what, 1.0)
        torch.testing.assert_close(found.logp_N, local.logp_N, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.scored_N, keep)
        assert found.calls == local.calls


def test_what_is_read_is_what_was_stored_whatever_is_asked(cached: CachedTeacher, teacher: Any, kind: str):
    """Any order of responses and any choice of tokens finds each token's own numbers."""
    rollouts = Rollouts.of(RESPONSES[::-1])
    everything = all_of(rollouts)
    keys = keys_of(rollouts, everything)
    whole = cached.score(rollouts, everything, need(cached), 1.0)
    # Scored a shard at a time, as the cache was: padding changes the last bits of a forward pass.
    keep = torch.rand(rollouts.tokens, generator=torch.Generator().manual_seed(1)) < 0.3
    part = cached.score(rollouts, keep, need(cached), 1.0)
    for name in ("ids_NK", "logp_NK", "weight_NK", "tail_N"):
        if whole.few is not None and getattr(whole.few, name) is not None:
            assert torch.equal(
                getattr(part.few, name)[part.where_N[keep]], getattr(whole.few, name)[whole.where_N[keep]]
            )
    if whole.hidden_MD is not None:
        assert part.hidden_MD is not None
        assert torch.equal(part.hidden_MD[part.where_N[keep]], whole.hidden_MD[whole.where_N[keep]])
    assert len(keys) == len(RESPONSES)


def test_nothing_asked_is_nothing_read(cached: CachedTeacher):
    rollouts = Rollouts.of(RESPONSES)
    for what in ("token", need(cached)):
        found = cached.score(rollouts, rollouts.trained_N & False, what, 1.0)
        assert found.calls == 0
        assert not found.scored_N.any()


def test_stored_numbers_are_the_models_own_within_the_bounds(cached: CachedTeacher, teacher: Any, kind: str):
    rollouts = Rollouts.of(RESPONSES)
    found = cached.score(rollouts, all_of(rollouts), need(cached), 1.0)
    want = torch.cat([plain_logp(teacher, r.prompt_ids, r.token_ids) for r in RESPONSES]).detach()
    if kind == "hidden":
        logp = found.logp(torch.arange(rollouts.tokens), want)
        assert ((logp - want).abs() * want.exp()).sum(-1).max() < 5e-3
        return
    assert found.few is not None
    few = found.few.at(found.where_N)
    off = (few.logp_NK.double() - want.gather(-1, few.ids_NK)).abs()
    if kind == "draws":
        assert few.weight_NK is not None
        assert off[few.weight_NK > 0].max() <= 0.005 + 1e-5
        return
    assert torch.equal(few.ids_NK[:, 0], want.argmax(-1))
    depth = want.max(-1, keepdim=True).values - want.gather(-1, few.ids_NK)
    span = depth.max(-1, keepdim=True).values * 1.002
    assert (off <= 2 * ((depth * span).sqrt() / 255 + span / 260100) + span / 255).all()


def losses(student: Any, evidence: Any, kind: str) -> tuple[float, torch.Tensor]:
    scored = score(student, RESPONSES, [{"distill": TERMS[kind] | {"on": ["gold"]}}], teacher=student)
    scored = replace(scored, evidence={"teacher": evidence})
    updater = Updater(student, 4096)
    updater.clear()
    loss = updater.accumulate(scored, list(range(scored.rollouts.rows)))
    return loss, flat(updater)


def test_the_loss_is_exactly_that_of_local_evidence_stored_the_same_way(
    cached: CachedTeacher, teacher: Any, student: Any, kind: str, tmp_path: Path
):
    """Through the disk or through memory alone: the same loss and gradient to the last bit."""
    rollouts = Rollouts.of(RESPONSES)
    everything = all_of(rollouts)
    local = LocalTeacher(teacher, 4096).score(rollouts, everything, "distribution", 1.0)
    lengths = tuple(len(r.token_ids) for r in RESPONSES)
    codec = codec_of(cached.store.manifest, teacher.vocab_size, 0)
    tensors = codec.encode(Scored(local, lengths, tuple(keys_of(rollouts, everything).values())))
    found = codec.decode(tensors, torch.arange(rollouts.tokens))
    hidden_MD = None if found.hidden_MD is None else found.hidden_MD
    memory = replace(local, few=found.few, hidden_MD=hidden_MD, head=local.head if hidden_MD is not None else None)
    disk = fill(teacher, tmp_path / "cache", KINDS[kind], RESPONSES, shard=len(RESPONSES))
    read = disk.score(rollouts, everything, need(disk), 1.0)
    one, other = losses(student, memory, kind), losses(student, read, kind)
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
    assert one[1].norm() > 0


def test_the_loss_is_the_local_one_within_bounds(cached: CachedTeacher, teacher: Any, student: Any, kind: str):
    rollouts = Rollouts.of(RESPONSES)
    everything = all_of(rollouts)
    local = LocalTeacher(teacher, 4096).score(rollouts, everything, "distribution", 1.0)
    want, exact = losses(student, local, "hidden" if kind == "draws" else kind)
    if kind == "draws":
        # One cache is noisy; the mean over caches is what is unbiased.
        seeds = [in_memory(teacher, local, rollouts, seed) for seed in range(40)]
        found = [losses(student, evidence, kind) for evidence in seeds]
        loss = sum(one for one, _ in found) / len(found)
        grads = torch.stack([each for _, each in found]).mean(0)
    else:
        loss, grads = losses(student, cached.score(rollouts, everything, need(cached), 1.0), kind)
    close = {"topk": 0.01, "draws": 0.1, "hidden": 0.005}[kind]
    assert abs(loss - want) <= close * want
    assert (grads - exact).norm() <= 2 * close * exact.norm()


def in_memory(teacher: Any, local: Evidence, rollouts: Rollouts, seed: int) -> Evidence:
    codec = codec_of(KINDS["draws"].settings(), teacher.vocab_size, seed)
    keys = tuple(keys_of(rollouts, all_of(rollouts)).values())
    tensors = codec.encode(Scored(local, tuple(len(r.token_ids) for r in RESPONSES), keys))
    few = codec.decode(tensors, torch.arange(rollouts.tokens)).few
    return replace(local, few=few, hidden_MD=None, head=None)


def test_another_temperature_is_refused(cached: CachedTeacher):
    rollouts = Rollouts.of(RESPONSES)
    with pytest.raises(
        UserError, match=r"scores at temperature 1, and the policy has 0\.7; set rollout\.temperature=1"
    ):
        cached.score(rollouts, all_of(rollouts), "token", 0.7)


def test_a_response_that_is_not_there_says_how_to_add_it(cached: CachedTeacher, kind: str):
    rollouts = Rollouts.of([*RESPONSES[:2], *made_responses(seed=9)])
    with pytest.raises(UserError, match=rf"does not hold 9 of 11 responses.*kdrl cache-teacher.*--kind {kind}"):
        cached.score(rollouts, all_of(rollouts), "token", 1.0)


def test_scores_at_another_temperature_are_the_models_at_it(teacher: Any, tmp_path: Path):
    stored = writing(teacher, tmp_path / "cache", KINDS["topk"], temperature=0.6)
    rollouts = Rollouts.of(RESPONSES)
    with stored.store:
        found = stored.score(rollouts, all_of(rollouts), "few", 0.6)
    want = torch.cat([plain_logp(teacher, r.prompt_ids, r.token_ids, 0.6) for r in RESPONSES])
    sampled = want.gather(-1, rollouts.tokens_N[:, None]).squeeze(-1).detach().float()
    torch.testing.assert_close(found.logp_N, sampled, atol=1e-5, rtol=1e-5)
    assert found.temperature == 0.6


def test_a_response_is_scored_once_and_then_read(teacher: Any, tmp_path: Path):
    """Written through: asked in any company and order, a response has the numbers of its first time."""
    stored = writing(teacher, tmp_path / "cache", KINDS["topk"])
    asked: list[int] = []
    real = stored.inner.score

    def spy(rollouts: Rollouts, *more: Any) -> Any:
        asked.append(rollouts.rows)
        return real(rollouts, *more)

    stored.inner.score = spy  # type: ignore[method-assign]
    with stored.store:
        first = Rollouts.of(RESPONSES[:5])
        one = stored.score(first, all_of(first), "few", 1.0)
        again = Rollouts.of([*RESPONSES[7:], *RESPONSES[:5], RESPONSES[0]])
        two = stored.score(again, all_of(again), "few", 1.0)
        third = stored.score(again, all_of(again), "few", 1.0)
    assert asked == [5, 5]
    start = again.offsets[len(RESPONSES[7:])]
    here = slice(start, start + first.tokens)
    assert torch.equal(one.logp_N, two.logp_N[here])
    assert one.few is not None
    assert two.few is not None
    assert third.few is not None
    assert torch.equal(one.few.logp_NK[one.where_N], two.few.logp_NK[two.where_N[here]])
    assert torch.equal(two.few.logp_NK, third.few.logp_NK)
