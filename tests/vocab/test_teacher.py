"""A teacher that reads its own tokens: what it covers, where it stops, and whole runs with two tokenizers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import gradient, make_world, raw_recipe, rows_of, run

from kdrl.batch import Rollouts
from kdrl.build import Builder
from kdrl.errors import UserError
from kdrl.methods import get_method
from kdrl.models import LoadedModel, encode_prompt, save_final
from kdrl.recipe import load_recipe, merge
from kdrl.vocab.align import Group
from kdrl.vocab.pairing import check_vocabularies
from kdrl.vocab.teacher import Vocabularies

from .pairs import folder_of, logits_of, model_of, scored, teacher_of, written
from .tokenizers import tokenizer_of


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return model_of("byte-level", 1, trainable=True)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return model_of("characters", 2)


def test_a_chunks_log_prob_is_the_teachers_for_the_same_text(student: LoadedModel, teacher: LoadedModel):
    responses, pair = written(student), teacher_of(student, teacher)
    rollouts = Rollouts.of(responses)
    evidence = pair.score(rollouts, rollouts.trained_N, "token", 1.0)
    assert evidence.calls == len(responses)
    for row, r in enumerate(responses):
        ids = list(teacher.tokenizer(r.text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        ids += [teacher.eos_ids[0]] if r.ended else []
        logp = logits_of(teacher, encode_prompt(teacher, r.problem.prompt), ids)
        whole = logp.gather(-1, torch.tensor(ids)[:, None]).sum()
        start, end = rollouts.span(row)
        assert float(evidence.logp_N[start:end].sum()) == pytest.approx(float(whole.detach()), rel=1e-4)
    numbers = pair.numbers()
    assert numbers["covered"] == 1.0
    assert 0.0 < numbers["one_to_one"] < 1.0
    assert numbers["teacher_tokens_per_chunk"] > numbers["student_tokens_per_chunk"] >= 1.0


def test_only_chunks_that_are_asked_for_are_scored(student: LoadedModel, teacher: LoadedModel):
    responses, pair = written(student), teacher_of(student, teacher)
    rollouts = Rollouts.of(responses)
    keep_N = torch.zeros_like(rollouts.trained_N)
    keep_N[rollouts.offsets[1]] = True
    evidence = pair.score(rollouts, keep_N, "token", 1.0)
    assert evidence.calls == 1
    chunk_N = evidence.columns["chunk"]
    assert bool((evidence.scored_N == (chunk_N == chunk_N[rollouts.offsets[1]])).all())


def test_an_end_is_an_end(student: LoadedModel, teacher: LoadedModel):
    both = Vocabularies(student, teacher)
    ended = both.read([*student.tokenizer("0")["input_ids"], student.eos_ids[0]])  # type: ignore[misc]
    assert ended.ids[-1] == teacher.eos_ids[0]
    assert ended.groups == [Group((0, 1), (0, 1)), Group((1, 2), (1, 2))]
    assert both.read([student.eos_ids[0]]).ids == [teacher.eos_ids[0]]
    assert teacher.eos_ids[0] not in both.read(student.tokenizer("0")["input_ids"]).ids  # type: ignore[arg-type]


def test_what_the_teacher_cannot_write_or_read_is_left_out(student: LoadedModel, teacher: LoadedModel):
    both = Vocabularies(student, teacher)
    ids = list(student.tokenizer("12ж3")["input_ids"])  # type: ignore[arg-type]
    known = len(student.tokenizer("12")["input_ids"])  # type: ignore[arg-type]
    found = both.read([*ids, student.eos_ids[0]])
    assert found.groups[-1].student[1] == known
    assert teacher.eos_ids[0] not in found.ids
    pad = student.tokenizer.pad_token_id
    assert isinstance(pad, int)
    assert both.read([*ids[:known], pad, *ids[:known]]).groups[-1].student[1] == known
    assert both.read([pad]).groups == []


def test_a_response_that_passes_the_teachers_context_is_cut(student: LoadedModel):
    small = model_of("characters", 2, max_positions=24)
    responses = written(student, ["the answer is the sum of the answer"] * 2)
    pair = teacher_of(student, small)
    rollouts = Rollouts.of(responses)
    evidence = pair.score(rollouts, rollouts.trained_N, "token", 1.0)
    assert 0.0 < pair.numbers()["covered"] < 1.0
    assert bool(evidence.logp_N.isfinite().all())


def test_responses_of_nothing_the_teacher_can_write(student: LoadedModel, teacher: LoadedModel):
    responses = written(student, ["ж", "жж"])
    pair = teacher_of(student, teacher)
    rollouts = Rollouts.of(responses)
    for need in ("token", "distribution"):
        evidence = pair.score(rollouts, rollouts.trained_N, need, 1.0)  # type: ignore[arg-type]
        assert evidence.calls == 0
        assert not bool(evidence.scored_N.any())
    for entry in ({"chunk_kl": {}}, {"overlap_distill": {}}, {"group_distill": {}}):
        found = scored(student, pair, responses, [entry])
        assert not bool(found.active[0].keep_N.any())
        assert float(gradient(student, found).norm()) == 0.0


def test_chunks_with_untrained_tokens_are_left_out(student: LoadedModel, teacher: LoadedModel):
    response = written(student, ["the answer is 43."])[0]
    response.trained = [i > 0 for i in range(len(response.token_ids))]
    pair = teacher_of(student, teacher)
    found = pair.aligned(Rollouts.of([response]))
    assert not bool(found.reach_N[0])
    assert bool(found.reach_N[1:].all())


def test_a_collapsed_alignment_is_refused(student: LoadedModel, teacher: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    responses, pair = (
        written(student, ["12 + 31 - 4 = 39, so it is 39.", "31 - 4 + 12 = 39, so it is 39."]),
        teacher_of(student, teacher),
    )
    whole = "kdrl.vocab.teacher.align"
    monkeypatch.setattr(whole, lambda mine, theirs: [Group((0, len(mine)), (0, len(theirs)))])
    with pytest.raises(UserError, match=r"collapsed: 2 of 2 responses.*kdrl generate"):
        pair.aligned(Rollouts.of(responses))
    with pytest.raises(UserError, match="1 of 1 responses"):
        pair.aligned(Rollouts.of(responses[:1]))
    # Nothing that could be read beside it changes nothing; a short answer that is covered does.
    with pytest.raises(UserError, match="1 of 2 responses"):
        pair.aligned(Rollouts.of([responses[0], written(student, ["0", "ж"])[1]]))
    lone = pair.aligned(Rollouts.of([responses[0], written(student, ["0"])[0]]))
    assert lone.collapsed == 1
    assert bool(lone.reach_N.any())
    assert pair.aligned(Rollouts.of(written(student, ["0", "12"]))).collapsed == 0


def test_the_note_on_two_vocabularies(student: LoadedModel, teacher: LoadedModel):
    (note,) = check_vocabularies(student, teacher)
    assert "the teacher reads its own tokens" in note
    assert f"{Vocabularies(student, teacher).shared_2K.shape[1]} of {student.vocab_size} student" in note


METHODS = ["alm", "alm-debiased", "kdrl-chunk", "simple-ctkd", "uld", "multilevelot", "gold"]


@pytest.mark.parametrize("name", METHODS)
def test_another_teacher_is_another_gradient(name: str, student: LoadedModel, teacher: LoadedModel):
    entries = get_method(name).recipe["objective"]
    responses = written(student) + written(student, origin="gold")

    def slope(seed: int) -> torch.Tensor:
        pair = teacher_of(student, model_of("characters", seed), spaces=True)
        return gradient(student, scored(student, pair, responses, entries))

    one, again, two = slope(2), slope(2), slope(3)
    assert torch.equal(one, again)
    assert (one - two).norm() > 1e-5 * one.norm() > 0


# --- whole runs ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("vocab"))
    loaded = model_of("byte-level", 7, sharp=4.0)
    loaded.model.float()
    save_final(replace(loaded), folder / "byte-teacher")
    return folder


def recipe_of(world: Path, method: str | None = "kdrl-chunk", **change: Any) -> dict[str, Any]:
    base = {"teacher": {"model": str(world / "byte-teacher")}, "rollout": {"group": 2}, "log": {"gradients_every": 1}}
    return merge(raw_recipe(world, method, **base), change)


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_with_a_teacher_of_another_tokenizer(name: str, world: Path, tmp_path: Path):
    run(recipe_of(world, name, rollout={"group": 4} if name == "kdrl-chunk" else {}), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0.0
        assert row["vocabulary/covered"] > 0.5
        assert row["vocabulary/collapsed"] == 0
        assert row["teacher_calls"] > 0
    if name == "kdrl-chunk":
        assert all(row["kd_norm"] > 0 and row["rl_norm"] > 0 for row in rows)
        assert all(math.isfinite(row["kl_teacher"]) for row in rows)


def test_a_student_of_bytes_with_a_teacher_of_characters(world: Path, tmp_path: Path):
    own = {"student": {"model": raw_recipe(world)["student"]["model"], "tokenizer": folder_of("byte-level")}}
    raw = raw_recipe(world, "kdrl-chunk", teacher={"model": str(world / "teacher")}, rollout={"group": 4})
    raw["student"] = own["student"]
    run(raw, tmp_path / "run")
    assert all(row["grad_norm"] > 0 and 0 < row["vocabulary/covered"] <= 1 for row in rows_of(tmp_path / "run"))


def test_a_resumed_run_is_the_same(world: Path, tmp_path: Path):
    from kdrl.run import resume

    whole = run(recipe_of(world, steps=3, checkpoint={"every": 1}), tmp_path / "whole")
    cut = tmp_path / "cut"
    run(recipe_of(world, steps=3, checkpoint={"every": 1, "keep": 5}), cut)
    for folder in sorted((cut / "checkpoints").glob("*"))[1:]:
        for file in folder.glob("*"):
            file.unlink()
        folder.rmdir()
    again = resume(cut, say=lambda text: None)
    assert (again.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


def build(raw: dict[str, Any], folder: Path) -> list[str]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        return Builder(load_recipe(raw), folder, stack).notes


def test_a_term_that_needs_one_tokenizer_is_still_refused(world: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"another tokenizer.*chunk_kl, chunk_distill"):
        build(recipe_of(world, "kdrl"), tmp_path)
    with pytest.raises(UserError, match="another tokenizer"):
        build(recipe_of(world, "simple-ctkd", source="teacher"), tmp_path)


def test_notes_at_the_start(world: Path, tmp_path: Path):
    notes = " ".join(build(recipe_of(world, "uld"), tmp_path))
    assert "stand for the same text" in notes
    assert "of the student's tokens aligned" in notes
    notes = " ".join(build(recipe_of(world, None, objective=[{"sorted_distill": {}}], source="gold"), tmp_path))
    assert "cannot tell which token is likely" in notes


def test_a_teacher_that_cannot_write_the_text_is_refused(world: Path, tmp_path: Path):
    raw = recipe_of(world, "alm")
    raw["teacher"] = {"model": raw["student"]["model"], "tokenizer": {"characters": "0123456789+="}}
    with pytest.raises(UserError, match=r"of \d+ student tokens.* only"):
        build(raw, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"objective": [{"chunk_distill": {}}, {"distill": {}}]}, "name the teacher twice under `teachers`"),
        ({"objective": [{"chunk_kl": {"teacher": "self"}}]}, "the student has its own"),
        ({"objective": [{"chunk_kl": {"on": ["gold"]}}], "source": "gold"}, "use chunk_distill"),
        ({"objective": [{"chunk_kl": {}}], "teacher": {"prepare": {"output_adapter": {}}}}, "teacher.prepare fits"),
        (
            {"objective": [{"chunk_kl": {}}], "teacher": {"average": {"of": {"a": 1, "b": 1}}}, "several": True},
            "made of several",
        ),
    ],
)
def test_recipes_that_cannot_work(change: dict[str, Any], reason: str, world: Path):
    raw = recipe_of(world, None)
    if change.pop("several", False):
        raw["teachers"] = {n: {"model": str(world / "byte-teacher")} for n in ("a", "b")}
        raw["teacher"] = change.pop("teacher")
    raw["teacher"] |= change.pop("teacher", {})
    with pytest.raises(UserError, match=reason):
        load_recipe(json.loads(json.dumps(raw | change)))


def test_tokenizers_of_the_tests_are_different():
    assert len({len(tokenizer_of(kind).get_vocab()) for kind in ("byte-level", "characters", "sentencepiece")}) == 3
