"""Every published method by name: as data that reads back, and as one full tiny run.

What each one minimises is in `tests/methods`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import raw_recipe, rows_of, run, section, with_teacher
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl.checks import build_objective
from kdrl.errors import UserError
from kdrl.explain import deviations, explain_objective
from kdrl.methods import all_methods, expanded, get_method
from kdrl.recipe import Recipe, load_recipe, plain
from kdrl.yamls import load_yaml

NAMES = sorted(all_methods())
# Without a model beside the student.
NO_TEACHER = {
    *("sft", "miniplm", "agent-distillation", "redi"),
    *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "demo-rl", "infalign", "oreal", "rapo"),
    *("dpo", "ipo", "kto", "simpo"),
    *("hdpo", "mft", "mkd", "ps-kd", "bitdistiller", "tsld", "sdft", "sdpo", "opsd"),
}
# The tiny tokenizer lacks the letters of these methods' own words, and one reads a file.
SPECIAL: dict[str, Callable[[Path], dict[str, Any]]] = {
    "hdpo": lambda world: {
        "source": {"privileged": {"template": "{prompt}{answer} "}},
        "task": {"verifier": {"name": f"{world / 'judge.py'}:breaks"}},
    },
    "redi": lambda world: {"source": {"traces": {"path": str(traces(world)), "take": "pair"}}},
    "sdft": lambda world: {"self_teacher": {"context": "{prompt}{solution} "}},
    "opsd": lambda world: {"self_teacher": {"context": "{prompt}{solution} "}},
    "sdpo": lambda world: {"self_teacher": {"context": "{prompt}{sibling} "}},
    "dapo": lambda world: {"rollout": {"dynamic_sampling": 2}},
    # A trace in a group of two leaves one rollout, and its advantage is not zero then.
    "luffy": lambda world: {"rollout": {"group": 3}},
    # Their teacher has experts.
    "moe-ka": lambda world: {"teacher": mixture()},
    "moe-sar": lambda world: {"teacher": mixture()},
}
# Their folders are also read by plain transformers: whole weights, adapters merged, weights rounded.
READ_BACK = ("grpo", "kd", "kd-lora", "bitdistiller", "distillm-2")


def mixture() -> dict[str, Any]:
    """A new teacher of four experts a layer, of which it takes two."""
    return section(architecture="mixtral", layers=2, settings={"num_local_experts": 4, "num_experts_per_tok": 2})


def traces(world: Path) -> Path:
    """A right and a wrong trace of every problem, as `kdrl generate` writes them."""
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    lines = []
    for row in rows:
        for text, right in ((row["solution"], True), ("0;", False)):
            known = {"prompt": row["prompt"], "answer": row["answer"], "response": text}
            lines.append(json.dumps({**known, "reward": float(right), "correct": right}))
    path = world / "traces.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def method_recipe(world: Path, name: str, **change: Any) -> dict[str, Any]:
    """The method with its own settings, but for what makes a run small."""
    group = get_method(name).recipe.get("rollout", {}).get("group", 2)
    rollout = {"prompts": 3, "group": min(group, 2), "dynamic_sampling": 0, "max_new_tokens": 5}
    special = SPECIAL.get(name, lambda world: {})(world)
    rollout |= special.pop("rollout", {})
    teacher = {} if name in NO_TEACHER else with_teacher(world)
    given = {**teacher, **special, **change}
    return raw_recipe(world, name, rollout=rollout, log={"gradients_every": 1}, **given)


def asks(recipe: Recipe) -> bool:
    """Whether a term reads a teacher's numbers."""
    return any(t.needs.teacher is not None or t.needs.features for t in build_objective(recipe).terms)


@pytest.fixture(scope="module")
def untouched(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The student's weights before any step."""
    result = run(method_recipe(world, "sft", steps=0), tmp_path_factory.mktemp("untouched") / "run")
    assert not (result.model.parent / "metrics.jsonl").read_text()
    return load_file(result.model / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_one_full_run(name: str, world: Path, tmp_path: Path, untouched: dict[str, Tensor]):
    """Two steps, finite losses, gradients that are not zero, and weights that moved."""
    raw = method_recipe(world, name)
    result = run(raw, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert all(row["skipped_updates"] == 0 for row in rows)
    recipe = load_recipe(raw)
    named = set(build_objective(recipe).names)
    assert {key.removeprefix("weight/") for row in rows for key in row if key.startswith("weight/")} == named
    assert (rows[-1]["teacher_calls"] > 0) == asks(recipe)
    after = load_file(result.model / "model.safetensors")
    assert after.keys() == untouched.keys()
    assert any(not after[key].equal(untouched[key]) for key in after)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    if name in READ_BACK:
        model: Any = AutoModelForCausalLM.from_pretrained(result.model)
        ids = AutoTokenizer.from_pretrained(result.model)("1+2=", return_tensors="pt")
        assert bool(model(input_ids=ids["input_ids"]).logits.isfinite().all())


def bare(world: Path, name: str) -> Recipe:
    """The method as published: only what a recipe must add."""
    teacher = {} if name in NO_TEACHER else with_teacher(world)
    raw = raw_recipe(world, name, **teacher)
    for left in ("rollout", "optimizer", "evaluate"):
        del raw[left]
    return load_recipe(raw)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_as_published_deviates_from_nothing_and_reads_back(name: str, world: Path):
    recipe = bare(world, name)
    assert deviations(recipe) == []
    shown = explain_objective(recipe)
    assert get_method(name).citation in shown
    assert "deviations" not in shown
    back = load_recipe(load_yaml(recipe.to_yaml(), "stored"))
    assert plain(back) == plain(recipe)
    assert back.to_yaml() == recipe.to_yaml()


def test_a_nested_setting_that_the_method_names_is_a_deviation(world: Path):
    change = {"student": {"lora": {"rank": 4}}, "optimizer": {"lr": 1.0e-3, "clip": 2.0}}
    found = deviations(load_recipe(raw_recipe(world, "kd-lora", **with_teacher(world), **change)))
    assert "student.lora.rank: 8 -> 4" in found
    assert "optimizer.lr: 5e-05 -> 0.001" in found
    assert not any("clip" in line for line in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_where_it_comes_from(name: str):
    method = get_method(name)
    assert method.name == name
    assert re.search(r"arXiv \d{4}\.\d{4,5}|blog", method.citation)
    assert all(text.strip() for text in (method.title, method.formula, method.defaults, method.unknown))
    assert not method.title.endswith(".")
    assert next(iter(method.recipe)) == "objective"
    assert load_yaml(expanded(method), "") == method.recipe


def test_a_method_without_its_teacher_is_refused(world: Path):
    for name in set(NAMES) - NO_TEACHER:
        raw = method_recipe(world, name)
        del raw["teacher"]
        with pytest.raises(UserError, match=r"there is no teacher.*add teacher\.model=|teacher\.model is missing"):
            load_recipe(raw)
    for name in NO_TEACHER:
        load_recipe(method_recipe(world, name))


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match=r"none is called 'kdlr'; did you mean 'kdrl'"):
        get_method("kdlr")
