"""The methods of reward and preference: each reads, teaches something, follows its teacher, and runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import gradient, made_responses, raw_recipe, rows_of, run, score, toy, with_teacher

from kdrl.batch import Response
from kdrl.errors import UserError
from kdrl.explain import deviations
from kdrl.methods import get_method
from kdrl.models import LoadedModel
from kdrl.recipe import load_recipe, plain
from kdrl.yamls import load_yaml

WRITTEN_BY_BOTH = {"luffy", "plad", "dpkd-sequence", "xpo"}
# Methods whose gradient reads the teacher's probabilities, not only its text.
SCORED = {"minillm", "dpkd-sequence", "rlsd", "mopd", "tgpo", "kdrl-shaped"}
ALONE = {"rapo", "oreal", "dpo", "simpo", "ipo", "kto", "infalign", "demo-rl"}
NAMES = sorted(WRITTEN_BY_BOTH | SCORED | ALONE | {"redi"})


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return toy(1, trainable=True)


def responses_of(name: str) -> list[Response]:
    """Responses of the writers that the method's source has, in groups of three."""
    responses = made_responses(origin="mixed" if name == "minillm" else "student")
    for i, r in enumerate(responses):
        r.reward += 0.25 * i  # graded, for a method that ranks
        if name == "redi" or (name in WRITTEN_BY_BOTH and i % 3 == 1):
            r.origin = "teacher"
    return responses


@pytest.mark.parametrize("name", NAMES)
def test_every_term_of_a_method_teaches_and_only_a_scoring_teacher_matters(name: str, student: LoadedModel):
    (first, *rest), responses = get_method(name).recipe["objective"], responses_of(name)
    for entry in [first, *rest]:
        found = gradient(student, score(student, responses, [entry], teacher=toy(2), reference=toy(3)))
        assert found.norm() > 1e-7, entry
    both = [gradient(student, score(student, responses, [first, *rest], teacher=toy(seed), reference=toy(3)))
            for seed in (2, 4)]  # fmt: skip
    assert ((both[0] - both[1]).norm() > 1e-6 * both[0].norm()) == (name in SCORED)


def tiny_recipe(world: Path, tmp_path: Path, name: str, **change: Any) -> dict[str, Any]:
    teacher = with_teacher(world) if name in WRITTEN_BY_BOTH | SCORED else {}
    rollout = {"prompts": 4, "group": {"minillm": 1, "plad": 1, "dpkd-sequence": 1, "xpo": 2, "redi": 2}.get(name, 3)}
    if name == "redi":
        path = tmp_path / "traces.jsonl"
        rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
        traces = [
            {"prompt": row["prompt"], "response": text, "correct": right, "reward": float(right)}
            for row in rows
            for text, right in ((row["solution"], True), ("1+1", False))
        ]
        path.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
        change["source"] = {"traces": {"path": str(path), "take": "pair"}}
    return raw_recipe(world, name, rollout=rollout, log={"gradients_every": 1}, **teacher, **change)


@pytest.mark.parametrize("name", NAMES)
def test_one_full_run(name: str, world: Path, tmp_path: Path):
    run(tiny_recipe(world, tmp_path, name), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert all(row["skipped_updates"] == 0 for row in rows)
    if "preference" in str(get_method(name).recipe["objective"]) and name != "kto":
        assert any(row["preference/pairs"] > 0 for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_as_published_deviates_from_nothing_and_reads_back(name: str, world: Path):
    raw = raw_recipe(world, name, **with_teacher(world))
    del raw["rollout"]
    recipe = load_recipe(raw)
    assert deviations(recipe) == []
    assert plain(load_recipe(load_yaml(recipe.to_yaml(), "stored"))) == plain(recipe)


@pytest.mark.parametrize(
    ("method", "change", "why"),
    [
        ("luffy", {"source": "student"}, "off_policy learns from a teacher's responses beside the student's own"),
        ("luffy", {"objective": [{"policy_gradient": {"on": ["student", "teacher"]}}]}, "off_policy: {shape: 0.1}"),
        ("dpo", {"optimizer": {"minibatches": 2}}, "would tear groups apart"),
        ("dpo", {"rollout": {"group": 1}}, "holds no pair"),
        ("plad", {"source": "teacher", "rollout": {"group": 2}}, "reads only that of teacher; set source: {pair"),
        ("plad", {"source": {"buffer": 0.5}, "objective": [{"preference": {"by": "origin"}}]}, "own replayed text"),
        ("kto", {"source": "teacher", "objective": [{"preference": {"loss": "kto"}}]}, "the policy's drift"),
        (
            "minillm",
            {"source": "teacher", "objective": [{"sequence_kl": {"on": ["teacher"]}}]},
            "estimates a KL from the student's own samples",
        ),
        (
            "oreal",
            {"source": "teacher", "objective": [{"reference_kl": {"direction": "forward", "on": ["teacher"]}}]},
            "estimates a KL from the student's own samples",
        ),
    ],
)
def test_pairings_that_cannot_work_are_refused(method: str, change: dict[str, Any], why: str, world: Path):
    with pytest.raises(UserError, match=why):
        load_recipe(raw_recipe(world, method, **(with_teacher(world) | change)))
