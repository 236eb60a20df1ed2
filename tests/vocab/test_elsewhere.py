"""A teacher of another tokenizer on a server or in a cache: asked in its own tokens, equal to the local one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cache.making import KINDS, writing
from served.server import Manners, serving
from tiny import assert_near, gradient, make_world, raw_recipe, rows_of, run

from kdrl.batch import Rollouts
from kdrl.doctor import Effort, examine
from kdrl.errors import UserError
from kdrl.models import LoadedModel, ModelConfig, load_model, save_final
from kdrl.recipe import load_recipe, merge
from kdrl.run import train
from kdrl.teachers import LocalTeacher
from kdrl.teachers.cache_command import cache_teacher
from kdrl.teachers.cache_config import Stored
from kdrl.teachers.cache_store import CacheStore
from kdrl.teachers.cached import CachedTeacher
from kdrl.teachers.client import Client
from kdrl.teachers.served import ServedTeacher
from kdrl.teachers.served_config import ServedConfig
from kdrl.vocab.teacher import VocabTeacher, Vocabularies

from .pairs import model_of, scored, teacher_of, written

TERMS = [{"chunk_kl": {"estimator": "k2"}}, {"chunk_distill": {"tau": 10.0}}]


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return model_of("byte-level", 1, trainable=True)


@pytest.fixture(scope="module", params=["characters", "sentencepiece"])
def teacher(request: pytest.FixtureRequest) -> LoadedModel:
    return model_of(request.param, 2)


def test_a_served_teacher_is_asked_in_its_own_tokens(student: LoadedModel, teacher: LoadedModel):
    responses, both = written(student), Vocabularies(student, teacher)
    rollouts = Rollouts.of(responses)
    local = teacher_of(student, teacher).score(rollouts, rollouts.trained_N, "token", 1.0)
    with serving(teacher) as server:
        client = Client(ServedConfig(urls=(server.url,), batch=4))
        served = VocabTeacher(ServedTeacher(client, server.manners.name, teacher.vocab_size), both)
        found = served.score(rollouts, rollouts.trained_N, "token", 1.0)
        sent = [ids for body in server.asked for ids in body["prompt"]]
        for entry in TERMS:
            mine = gradient(student, scored(student, served, responses, [entry]))
            want = gradient(student, scored(student, teacher_of(student, teacher), responses, [entry]))
            # The server computes in float32 what the toy computes in float64.
            assert (mine - want).norm() <= 1e-4 * want.norm()
    read = served.aligned(rollouts).read
    assert sorted(sent) == sorted(r.prompt_ids + r.token_ids for r in read.responses)
    assert torch.equal(found.scored_N, local.scored_N)
    assert (found.logp_N - local.logp_N).abs().max() < 1e-4
    assert all(torch.equal(found.columns[key], local.columns[key]) for key in found.columns if key != "chunk_rest")


def test_a_served_teachers_context_cuts_a_response(student: LoadedModel, teacher: LoadedModel):
    rollouts = Rollouts.of(written(student, ["the answer is the sum of the answer"] * 2))
    both = Vocabularies(student, teacher)

    def longest(pair: VocabTeacher) -> int:
        return max(len(r.prompt_ids) + len(r.token_ids) for r in pair.aligned(rollouts).read.responses)

    context = longest(teacher_of(student, teacher)) - 3
    client = Client(ServedConfig(urls=("http://127.0.0.1:1",)))
    pair = VocabTeacher(ServedTeacher(client, "toy", teacher.vocab_size, context=context), both)
    assert longest(pair) < context, "the server writes one token more"
    assert 0.0 < pair.numbers()["covered"] < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_through_and_read_back_is_the_local_teachers(
    kind: str, student: LoadedModel, teacher: LoadedModel, tmp_path: Path
):
    responses, both = written(student), Vocabularies(student, teacher)
    writer = writing(teacher, tmp_path, KINDS[kind])
    entries = [*TERMS, {"overlap_distill": {}}] if kind == "hidden" else TERMS
    with writer.store:
        through = [scored(student, VocabTeacher(writer, both), responses, [entry]) for entry in entries]
    reader = VocabTeacher(CachedTeacher(CacheStore.read(tmp_path)), both)
    for entry, one in zip(entries, through, strict=True):
        again = scored(student, reader, responses, [entry])
        local = scored(student, VocabTeacher(LocalTeacher(teacher, 4096), both), responses, [entry])
        assert 0 < again.evidence["teacher"].calls <= len(responses)
        assert torch.equal(again.evidence["teacher"].logp_N, one.evidence["teacher"].logp_N)
        assert torch.equal(gradient(student, again), gradient(student, one))
        slope = gradient(student, local)
        if "overlap_distill" in entry:  # hidden states are stored in 16 bits
            assert (gradient(student, again) - slope).norm() < 0.02 * slope.norm()
        else:
            assert_near(gradient(student, again), slope)


# --- whole runs ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("elsewhere"))
    loaded = copy.copy(model_of("byte-level", 7, sharp=4.0))
    loaded.model.float()
    save_final(loaded, folder / "byte-teacher")
    return folder


@pytest.fixture(scope="module")
def saved(world: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(world / "byte-teacher")), "cpu", trainable=False, seed=0)


def recipe_of(world: Path, method: str | None, **change: Any) -> dict[str, Any]:
    base = {"teacher": {"model": str(world / "byte-teacher")}, "rollout": {"group": 2}, "checkpoint": {"every": 0}}
    return merge(raw_recipe(world, method, **base), change)


def served_at(url: str, **more: Any) -> dict[str, Any]:
    return {"served": {"urls": [url], "backoff_s": 0.02, "batch": 2, "parity": 2} | more}


def final(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


def close(one: Path, other: Path) -> None:
    for mine, theirs in zip(rows_of(one), rows_of(other), strict=True):
        for name in ("loss", "grad_norm", "teacher_calls", "vocabulary/covered"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", ["kdrl-chunk", "alm"])
def test_a_run_is_the_same_with_a_served_teacher(method: str, world: Path, saved: LoadedModel, tmp_path: Path):
    more = {"rollout": {"group": 4}} if method == "kdrl-chunk" else {}
    run(recipe_of(world, method, **more), tmp_path / "local")
    said: list[str] = []
    with serving(saved, Manners(max_logprobs=64)) as server:
        raw = recipe_of(world, method, teacher=served_at(server.url), **more)

        train(raw, output=tmp_path / "served", say=said.append)
    close(tmp_path / "local", tmp_path / "served")
    told = " ".join(said)
    assert "served against local: log-probs of" in told
    assert "stand for the same text" in told
    assert "of the student's tokens aligned" in told


def test_an_on_policy_run_writes_through_and_a_second_one_asks_nothing(world: Path, saved: LoadedModel, tmp_path: Path):
    """Cached over served, in the teacher's own tokens."""
    cache = {"cache": {"path": str(tmp_path / "cache"), "write": True, "kind": "topk", "k": 8}}
    with serving(saved, Manners(max_logprobs=64)) as server:
        teacher = served_at(server.url, parity=0) | cache
        raw = recipe_of(world, "kdrl-chunk", teacher=teacher, rollout={"group": 4})
        run(raw, tmp_path / "one")
        scoring = [body for body in server.asked if body["prompt_logprobs"] == 8]
        count = len(server.asked)
        run(raw, tmp_path / "two")
        assert len(scoring) > 1
        assert len(server.asked) == count + 1, "only the check of the top-k limit"
    assert final(tmp_path / "one") == final(tmp_path / "two")
    run(recipe_of(world, "kdrl-chunk", rollout={"group": 4}), tmp_path / "local")
    close(tmp_path / "one", tmp_path / "local")


@pytest.mark.parametrize(("method", "stored"), [("alm", Stored(kind="topk", k=4)), ("uld", Stored(kind="hidden"))])
def test_a_cache_of_another_tokenizer_is_trained_from(method: str, stored: Stored, world: Path, tmp_path: Path):
    raw = recipe_of(world, method)
    done = cache_teacher(load_recipe(raw), tmp_path / "cache", stored, say=lambda text: None)
    assert done.responses > 0
    again = cache_teacher(load_recipe(raw), tmp_path / "cache", stored, say=lambda text: None)
    assert (again.responses, again.found) == (0, done.responses + done.found)
    run(raw, tmp_path / "local")
    run(recipe_of(world, method, teacher={"cache": str(tmp_path / "cache")}), tmp_path / "cached")
    close(tmp_path / "local", tmp_path / "cached")
    rows = rows_of(tmp_path / "cached")
    assert all(math.isfinite(row["loss"]) and row["teacher_calls"] > 0 for row in rows)


def test_terms_on_distributions_are_told_what_fits(world: Path, saved: LoadedModel, tmp_path: Path):
    with serving(saved, Manners(max_logprobs=64)) as server:
        for method in ("simple-ctkd", "uld", "gold", "alm-debiased", "multilevelot"):
            raw = recipe_of(world, method, teacher=served_at(server.url, parity=0))
            with pytest.raises(UserError, match=r"What fits of terms on .*chunk_kl.*chunk_distill.*kind hidden"):
                run(raw, tmp_path / method)
    stored = Stored(kind="topk", k=4)
    cache_teacher(load_recipe(recipe_of(world, "alm")), tmp_path / "cache", stored, say=lambda text: None)
    raw = recipe_of(world, "simple-ctkd", teacher={"cache": str(tmp_path / "cache")})
    with pytest.raises(UserError, match=r"which is log-probs of the sampled tokens\. What fits"):
        run(raw, tmp_path / "run")


def test_the_doctor_examines_a_served_teacher_of_another_tokenizer(world: Path, saved: LoadedModel):

    with serving(saved, Manners(max_logprobs=64)) as server:
        raw = recipe_of(world, "kdrl-chunk", teacher=served_at(server.url), rollout={"group": 4})
        findings = examine(load_recipe(raw), effort=Effort(problems=2, prompts=2, group=2))
    assert not [f.text for f in findings if f.verdict == "wrong" and f.what != "verifier"]
    assert {"vocabularies", "alignment (teacher)", "parity"} <= {f.what for f in findings}


def test_a_cache_of_the_students_tokens_is_refused(world: Path, tmp_path: Path):
    """Written for plain terms by a teacher of the student's tokenizer, read by a chunk term of another one."""
    plain = recipe_of(world, "kd", teacher={"model": str(world / "teacher")})
    cache_teacher(load_recipe(plain), tmp_path / "cache", Stored(kind="topk", k=4), say=lambda text: None)
    raw = recipe_of(world, "alm", teacher={"cache": str(tmp_path / "cache")})
    with pytest.raises(UserError, match=r"another tokenizer than teacher\.model has"):
        run(raw, tmp_path / "run")
