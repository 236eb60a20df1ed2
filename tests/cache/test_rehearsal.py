"""A doctor's look at a cache that a run would write: what the run refuses is told, and no disk is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import made_responses, raw_recipe, run, toy, with_teacher

from cache.making import KINDS, all_of, keyed, writing
from kdrl.batch import Rollouts
from kdrl.doctor import Effort, Finding, examine
from kdrl.errors import UserError
from kdrl.models import head_of
from kdrl.recipe import load_recipe
from kdrl.teachers import LocalTeacher
from kdrl.teachers.base import Need
from kdrl.teachers.cache_codec import head_tensors
from kdrl.teachers.cache_identity import identity
from kdrl.teachers.cache_rehearsal import Rehearsal
from kdrl.teachers.cached import WritingTeacher


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_rehearsal_gives_what_a_written_cache_gives(kind: str, tmp_path: Path):
    loaded, responses = toy(1), made_responses()
    rollouts = Rollouts.of(responses)
    content = identity(loaded.config, loaded, loaded, KINDS[kind].settings(), 1.0, 0)
    head = None
    if kind == "hidden":
        head, content["head"] = head_tensors(head_of(loaded))
    store = Rehearsal.write(tmp_path / "none", content, head)
    teachers = [WritingTeacher(LocalTeacher(loaded, 4096), store), writing(loaded, tmp_path / "real", KINDS[kind])]
    need: Need = "distribution" if kind == "hidden" else "few"
    one, other = (t.score(rollouts, all_of(rollouts), need, 1.0) for t in teachers)
    assert torch.equal(one.logp_N, other.logp_N)
    for name in ("hidden_MD",) if kind == "hidden" else ("few",):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert torch.equal(mine, theirs) if kind == "hidden" else torch.equal(mine.logp_NK, theirs.logp_NK)
    teachers[1].store.close()
    assert not (tmp_path / "none").exists()


def test_what_is_stored_is_read_and_nothing_is_added(tmp_path: Path):
    loaded, responses = toy(1), made_responses()
    real = writing(loaded, tmp_path / "real", KINDS["topk"])
    real.put(keyed(responses[:4]), "cpu")
    real.store.close()
    before = {p.name: p.read_bytes() for p in (tmp_path / "real").iterdir()}
    content = identity(loaded.config, loaded, loaded, KINDS["topk"].settings(), 1.0, 0)
    teacher = WritingTeacher(LocalTeacher(loaded, 4096), Rehearsal.write(tmp_path / "real", content))
    assert len(teacher.store.places) == len(keyed(responses[:4]))
    teacher.put(keyed(responses[4:]), "cpu")
    assert len(teacher.store.places) == len(keyed(responses))
    assert {p.name: p.read_bytes() for p in (tmp_path / "real").iterdir()} == before


def recipe_of(world: Path, cache: dict[str, Any], support: Any) -> dict[str, Any]:
    distill = {"divergence": "reverse_kl", "support": support}
    raw = raw_recipe(world, None, objective=[{"distill": distill}], **with_teacher(world))
    raw["task"]["verifier"] = {"name": "numeric", "workers": 1}
    raw["teacher"]["cache"] = {"write": True, **cache}
    return raw


def look(raw: dict[str, Any]) -> list[Finding]:
    return examine(load_recipe(raw), effort=Effort(problems=2, prompts=2, group=2))


def wrongs(findings: list[Finding]) -> list[str]:
    return [f.text for f in findings if f.verdict == "wrong"]


def test_the_doctor_tells_what_training_refuses_of_a_cache_that_it_would_write(world: Path, tmp_path: Path):
    eight = {"path": str(tmp_path / "cache"), "kind": "topk", "k": 8}
    fine = recipe_of(world, eight, {"topk": 8})
    assert not wrongs(look(fine))
    assert not (tmp_path / "cache").exists()
    run(fine, tmp_path / "fine")
    before = {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()}
    faults = {
        "full": recipe_of(world, eight, "full"),
        "kind": recipe_of(world, {"path": eight["path"], "kind": "hidden"}, {"topk": 8}),
        "k": recipe_of(world, eight | {"k": 4}, {"topk": 4}),
        "file": recipe_of(world, eight | {"path": str(world / "data.jsonl" / "cache")}, {"topk": 8}),
    }
    for name, raw in faults.items():
        found = wrongs(look(raw))
        with pytest.raises((UserError, OSError)) as refused:
            run(raw, tmp_path / name)
        assert found
        assert name == "file" or str(refused.value) in found
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()} == before
