"""Every published method by name: as data that reads back, and as one full tiny run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import raw_recipe, rows_of, run, with_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl.errors import UserError
from kdrl.explain import deviations, explain_objective
from kdrl.methods import all_methods, expanded, get_method
from kdrl.recipe import Recipe, load_recipe, plain
from kdrl.yamls import load_yaml

NAMES = {
    *("sft", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "opd", "gkd", "kdrl", "kdrl-annealed"),
    *("kdrl-mask-response", "kdrl-mask-group", "opd-then-rl", "trrd", "srpo", "hdpo"),
}
NO_TEACHER = {"sft", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "hdpo"}


def method_recipe(world: Path, name: str, **change: Any) -> dict[str, Any]:
    """The method with its own settings, but for what makes a run small."""
    rollout: dict[str, Any] = {"prompts": 4, "group": 1 if name in ("sft", "gkd") else 3, "dynamic_sampling": 0}
    if name == "dapo":
        rollout["dynamic_sampling"] = 2
    if name == "hdpo":
        # The method's own words need letters that the tiny tokenizer lacks.
        change["source"] = {"privileged": {"template": "{prompt}{answer} "}}
        change["task"] = {"verifier": {"name": f"{world / 'judge.py'}:breaks"}}
    teacher = {} if name in NO_TEACHER else with_teacher(world)
    return raw_recipe(world, name, rollout=rollout, log={"gradients_every": 1}, **teacher, **change)


def test_these_are_the_methods():
    assert set(all_methods()) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_one_full_run(name: str, world: Path, tmp_path: Path):
    """Two steps, finite losses, gradients that are not zero, and a folder that plain transformers loads."""
    result = run(method_recipe(world, name), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert all(row["skipped_updates"] == 0 for row in rows)
    terms = {next(iter(entry)) for entry in get_method(name).recipe["objective"]}
    assert {key.removeprefix("weight/") for row in rows for key in row if key.startswith("weight/")} == terms
    if name not in NO_TEACHER | {"gkd", "trrd"}:
        assert rows[-1]["teacher_calls"] > 0
        assert any(math.isfinite(row["kl_teacher"] or math.nan) for row in rows)
    model: Any = AutoModelForCausalLM.from_pretrained(result.model)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    ids = tokenizer("1+2=", return_tensors="pt")
    logits = model(**{k: v for k, v in ids.items() if k != "token_type_ids"}).logits
    assert bool(torch.isfinite(logits).all())
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_run_moves_the_student(name: str, world: Path, tmp_path: Path):
    from safetensors.torch import load_file

    weights = []
    for steps in (0, 2):
        result = run(method_recipe(world, name, steps=steps), tmp_path / str(steps))
        weights.append(load_file(result.model / "model.safetensors"))
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not (tmp_path / "0" / "metrics.jsonl").read_text()


def bare(world: Path, name: str) -> Recipe:
    raw = raw_recipe(world, name, **with_teacher(world))
    del raw["rollout"]
    return load_recipe(raw)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_method_as_published_deviates_from_nothing(name: str, world: Path):
    recipe = bare(world, name)
    assert deviations(recipe) == []
    shown = explain_objective(recipe)
    assert get_method(name).citation in shown
    assert "deviations" not in shown


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_resolved_recipe_reads_back(name: str, world: Path):
    recipe = bare(world, name)
    back = load_recipe(load_yaml(recipe.to_yaml(), "stored"))
    assert plain(back) == plain(recipe)
    assert back.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_method_says_where_it_comes_from(name: str):
    method = get_method(name)
    assert method.name == name
    assert "arXiv" in method.citation
    assert all(text.strip() for text in (method.title, method.formula, method.defaults, method.unknown))
    assert next(iter(method.recipe)) == "objective"
    assert load_yaml(expanded(method), "") == method.recipe


def test_a_method_without_its_teacher_is_refused(world: Path):
    for name in NAMES - NO_TEACHER:
        with pytest.raises(UserError, match=r"there is no teacher.*add teacher\.model="):
            load_recipe(raw_recipe(world, name))
    for name in NO_TEACHER - {"hdpo", "sft"}:
        load_recipe(raw_recipe(world, name))


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match=r"none is called 'kdlr'; did you mean 'kdrl'"):
        get_method("kdlr")
