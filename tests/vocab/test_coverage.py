"""How much of what a student writes a teacher of another tokenizer reads: measured, noted, warned of, refused."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_world, raw_recipe, rows_of, section

from kdrl.build import Builder
from kdrl.doctor import Effort, Finding, examine
from kdrl.doctor_samples import measure
from kdrl.models import encode_prompt
from kdrl.recipe import load_recipe, merge
from kdrl.run import train
from kdrl.trainer import Trainer
from kdrl.vocab.teacher import Vocabularies

from .pairs import logits_of

DIGITS = "0123456789+-=# "


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose prompts a teacher of digits can write, and no solutions."""
    folder = make_world(tmp_path_factory.mktemp("coverage"))
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    plain = "".join(json.dumps({key: row[key] for key in ("prompt", "answer")}) + "\n" for row in rows)
    (folder / "plain.jsonl").write_text(plain)
    return folder


def recipe_of(world: Path, characters: str = DIGITS, **change: Any) -> dict[str, Any]:
    teacher = section() | {"tokenizer": {"characters": characters}}
    raw = raw_recipe(world, "kdrl-chunk", teacher=teacher, rollout={"group": 4}, log={"progress": "plain"})
    return merge(raw, {"task": {"path": str(world / "plain.jsonl")}} | change)


def found_of(raw: dict[str, Any], what: str) -> Finding:
    raw = merge(raw, {"task": {"verifier": {"name": "numeric", "workers": 1}}})
    findings = examine(load_recipe(raw), effort=Effort(problems=2, prompts=2, group=4))
    return next(f for f in findings if f.what == what)


def test_a_run_that_trains_on_little_says_so_once(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told: list[str] = []
    train(recipe_of(world, steps=3), output=tmp_path / "run", say=lambda text: told.append(str(text)))
    assert all(row["vocabulary/covered"] < 0.5 for row in rows_of(tmp_path / "run"))
    assert capsys.readouterr().out.count("note: teacher: only") == 1
    assert any("prompts of the problems" in note and "is not known yet" in note for note in told)


def test_a_run_that_is_covered_says_nothing(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told: list[str] = []
    raw = recipe_of(world, section()["tokenizer"]["characters"][::-1], task={"path": str(world / "data.jsonl")})
    train(raw, output=tmp_path / "run", say=lambda text: told.append(str(text)))
    assert all(row["vocabulary/covered"] > 0.9 for row in rows_of(tmp_path / "run"))
    assert "note:" not in capsys.readouterr().out
    note = next(text for text in told if "tokens aligned" in text)
    assert "solutions of the problems" in note
    assert "not known yet" not in note


def test_the_doctor_calls_it_wrong(world: Path):
    found = found_of(recipe_of(world), "alignment")
    assert (found.verdict, "choose a teacher that writes this text" in found.text) == ("wrong", True)


def test_the_doctors_ratio_is_that_of_whole_chunks(world: Path, tmp_path: Path):
    with ExitStack() as stack:
        builder = Builder(load_recipe(recipe_of(world, DIGITS + "abcdefgh")), tmp_path / "run", stack)
        parts = builder.parts()
        found = measure(builder, parts, 0)
        responses = Trainer(parts).trial(0).rollouts.responses
        teacher = builder.models["teacher"]
        both, ratios, covered = Vocabularies(parts.student, teacher), [], 0
        for r in responses:
            read = both.read(r.token_ids)
            if not read.ids:
                continue
            logq = _written(parts.student, r.prompt_ids, r.token_ids)
            logp = _written(teacher, encode_prompt(teacher, r.problem.prompt), read.ids)
            for group in read.groups:
                covered += group.student[1] - group.student[0]
                ratios.append(float(logp[slice(*group.teacher)].sum() - logq[slice(*group.student)].sum()))
    gap = found.gaps["teacher"]
    assert gap.ratio == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)
    assert gap.magnitude == pytest.approx(sum(map(abs, ratios)) / len(ratios), abs=1e-4)
    assert gap.covered == pytest.approx(covered / sum(len(r.token_ids) for r in responses))
    assert 0.0 < (gap.covered or 0.0) < 1.0
    assert "of a chunk, over" in found_of(recipe_of(world), "teacher's R").text


def _written(loaded: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
    return logits_of(loaded, prompt, ids).detach().gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
